"""What the peers' noise levels amount to: the gDDIM eta with the same std, for short steps and at real ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from etude.errors import EtudeError, unknown
from etude.sampling.kernels import equivalent_eta, make_kernel
from etude.sampling.paths import FlowPath, Grid

# Who trains with what: the method, the kernel, its published level, and where it is published.
PUBLISHED = (
    ("Flow-GRPO", "flow_sde", 0.7, "2505.05470"),
    ("Flow-GRPO, its largest", "flow_sde", 1.2, "2505.05470"),
    ("MixGRPO", "flow_sde", 0.7, "2507.21802"),
    ("DanceGRPO", "dance_sde", 0.3, "2505.07818"),
    ("Flow-CPS", "cps", 0.8, "2509.05952"),
    ("DDPM posterior", "gddim", 1.0, "2006.11239"),
    ("etude's recipes", "gddim", 1.2, "2510.10767"),
)
PIPELINES = ("flux", "sd3")
STEP_NAMES = ("first", "middle", "last")


@dataclass(frozen=True)
class PeerRow:
    """One method's noise as gDDIM etas.

    Attributes:
        method: who uses it.
        kernel: its name in `etude.registry.KERNELS`.
        level: its stochasticity, in its own unit.
        small_step: the eta it amounts to as steps at sigma = 0.5 become short.
        etas: the eta with the same std at each of the steps asked for; infinite where GDDIM has it for none.
    """

    method: str
    kernel: str
    level: float
    small_step: float
    etas: tuple[float, ...]


@dataclass(frozen=True)
class PeerTable:
    """The rows, and the steps that their etas are of: (sigma_t, sigma_u) at the first, middle and last stochastic step."""

    steps: tuple[tuple[float, float], ...]
    rows: tuple[PeerRow, ...]


def peer_table(
    num_steps: int = 25, shift: float = 3.0, pipeline: str = "flux", levels: Iterable[tuple[str, float]] = ()
) -> PeerTable:
    """Translates the published noise levels, and any others, to the eta with the same std.

    The stochastic steps of N are all but the first, which starts at pure noise, and the last, which ends without any.

    Args:
        num_steps: N, at least 3.
        shift: sigma -> shift sigma / (1 + (shift - 1) sigma), the model's time shift (exp(mu) for a dynamic one).
        pipeline: whose levels are shifted: "flux" takes 1, 1 - 1/N .. 1/N; "sd3" the scheduler's own, which end near 0.
        levels: more rows, as (kernel, level).

    Raises:
        EtudeError: for fewer than 3 steps, an unknown pipeline or kernel, and a level that its kernel refuses.
    """
    if num_steps < 3:
        raise EtudeError(f"{num_steps} steps have no stochastic one between pure noise and the image: give at least 3.")
    if pipeline not in PIPELINES:
        raise unknown("pipeline", pipeline, PIPELINES)
    even = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).tolist()
    grid = FlowPath.from_config({"shift": shift}).grid(num_steps, even if pipeline == "flux" else None)
    at = [1, (num_steps - 1) // 2, num_steps - 2]
    wanted = [
        *((method, kernel, level) for method, kernel, level, _ in PUBLISHED),
        *(("yours", *own) for own in levels),
    ]
    rows = tuple(_row(method, kernel, level, grid, at) for method, kernel, level in wanted)
    return PeerTable(tuple((float(grid.s[i]), float(grid.s[i + 1])) for i in at), rows)


def _row(method: str, kernel: str, level: float, grid: Grid, at: Sequence[int]) -> PeerRow:
    made = make_kernel(kernel, level)
    source = torch.tensor(at)
    etas = equivalent_eta(made, (grid.a[source], grid.s[source]), (grid.a[source + 1], grid.s[source + 1]))
    return PeerRow(method, kernel, level, float(made.small_step_eta((0.5, 0.5))), tuple(etas.tolist()))


def cells(table: PeerTable) -> tuple[list[str], list[list[str]]]:
    """The table as text: the columns' titles, and the rows."""
    names = (f"{name} {start:.3f} to {end:.3f}" for name, (start, end) in zip(STEP_NAMES, table.steps, strict=True))
    rows = [
        [row.method, row.kernel, f"{row.level:g}", *(_shown(eta) for eta in (row.small_step, *row.etas))]
        for row in table.rows
    ]
    return ["method", "kernel", "level", "short steps", *names], rows


def markdown(table: PeerTable) -> str:
    """The table in Markdown."""
    titles, rows = cells(table)
    rule = ["---" if i < 2 else "---:" for i in range(len(titles))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (titles, rule, *rows))


def _shown(eta: float) -> str:
    return "∞" if math.isinf(eta) else f"{eta:.3f}"
