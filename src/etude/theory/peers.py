"""The peers' noise levels as the gDDIM eta with the same std."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from etude.errors import EtudeError, unknown
from etude.sampling.kernels import equivalent_eta, make_kernel
from etude.sampling.paths import FlowPath, Grid

PUBLISHED = (
    ("Flow-GRPO", "flow_sde", 0.7, "2505.05470"),
    ("Flow-GRPO, its largest", "flow_sde", 1.2, "2505.05470"),
    ("MixGRPO", "flow_sde", 0.7, "2507.21802"),
    ("DanceGRPO", "dance_sde", 0.3, "2505.07818"),
    ("Flow-CPS", "cps", 0.8, "2509.05952"),
    ("Precise", "precise", 1.5, "2605.23522"),
    ("FDFO", "churn", 0.0025, "2603.12893"),
    ("DDPM posterior", "gddim", 1.0, "2006.11239"),
    ("etude's recipes", "gddim", 1.2, "2510.10767"),
)
"""Methods with their kernel, their noise level in its unit, and the arXiv number of the source."""
PIPELINES = ("flux", "sd3")
STEP_NAMES = ("first", "middle", "last")


@dataclass(frozen=True)
class PeerRow:
    """One method's noise as gDDIM etas; an eta is infinite where no gDDIM has that std."""

    method: str
    kernel: str  # its name in `etude.registry.KERNELS`
    level: float  # the stochasticity, in the kernel's unit
    small_step: float  # the eta of short steps at sigma = 0.5
    etas: tuple[float, ...]  # at each step of the table


@dataclass(frozen=True)
class PeerTable:
    """Rows of etas, and (sigma_t, sigma_u) of the first, middle and last stochastic step."""

    steps: tuple[tuple[float, float], ...]
    rows: tuple[PeerRow, ...]


def peer_table(
    num_steps: int = 25, shift: float = 3.0, pipeline: str = "flux", levels: Iterable[tuple[str, float]] = ()
) -> PeerTable:
    """Translate the published noise levels, and more if given, to the gDDIM eta with the same std.

    Of N steps all are stochastic but the first, which starts at pure noise, and the last, which
    ends without noise.

    Args:
        num_steps: N, at least 3.
        shift: the model's time shift, sigma -> shift sigma / (1 + (shift - 1) sigma).
        pipeline: "flux" has the levels 1, 1 - 1/N .. 1/N; "sd3" has its scheduler's, which end near
            0.
        levels: more rows, as (kernel, level).

    Raises:
        EtudeError: there are fewer than 3 steps, the pipeline or a kernel is unknown, or a kernel
            refuses its level.
    """
    if num_steps < 3:
        raise EtudeError(f"{num_steps} steps have no stochastic one between pure noise and the image: give at least 3.")
    if pipeline not in PIPELINES:
        raise unknown("pipeline", pipeline, PIPELINES)
    even = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).tolist()
    grid = FlowPath.from_config({"shift": shift}).grid(num_steps, even if pipeline == "flux" else None)
    at = [1, (num_steps - 1) // 2, num_steps - 2]
    methods = [*(entry[:3] for entry in PUBLISHED), *(("yours", *own) for own in levels)]
    rows = tuple(_row(method, kernel, level, grid, at) for method, kernel, level in methods)
    return PeerTable(tuple((float(grid.s[i]), float(grid.s[i + 1])) for i in at), rows)


def _row(method: str, name: str, level: float, grid: Grid, at: Sequence[int]) -> PeerRow:
    kernel, source = make_kernel(name, level), torch.tensor(at)
    etas = equivalent_eta(kernel, (grid.a[source], grid.s[source]), (grid.a[source + 1], grid.s[source + 1]))
    return PeerRow(method, name, level, float(kernel.small_step_eta((0.5, 0.5))), tuple(etas.tolist()))


def cells(table: PeerTable) -> tuple[list[str], list[list[str]]]:
    """Format the table as text: the titles of the columns, and the rows."""
    names = (f"{name} {start:.3f} to {end:.3f}" for name, (start, end) in zip(STEP_NAMES, table.steps, strict=True))
    rows = []
    for row in table.rows:
        etas = ("∞" if math.isinf(eta) else f"{eta:.3f}" for eta in (row.small_step, *row.etas))
        rows.append([row.method, row.kernel, f"{row.level:g}", *etas])
    return ["method", "kernel", "level", "short steps", *names], rows


def markdown(table: PeerTable) -> str:
    """Format the table in Markdown."""
    titles, rows = cells(table)
    rule = ["---" if i < 2 else "---:" for i in range(len(titles))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (titles, rule, *rows))
