"""Real architectures with random weights on a GPU: how much of the card an iteration uses, and what it takes of its memory.

Each model is a process of its own with a time limit, and the results are written after each, so that
a process that fails or hangs costs no other its figures. FLOPs are counted by torch on one call; the
rate that they are divided by is that of a bfloat16 product of matrices in the same process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import Side
from benchmarks.results import Headline, Ratio, Result

LIMIT = 100.0
"""Seconds that a model may take, loading and both iterations included."""
AROUND = 1.05
"""Target: seconds of rollout and update over those of their network calls."""
REPLAY = 0.35
"""Target: share of the device's rate that the update reaches."""


@dataclass(frozen=True)
class Case:
    """A model at a size, the work of an iteration, and the share of the device's rate that its rollout is to reach."""

    model: str
    side: int
    images: int
    steps: int
    target: float
    group: int = 1
    window: int | None = None
    checkpointing: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} {self.side}"

    def config(self, tiny: bool) -> dict[str, Any]:
        """The recipe of the case as a tree: two iterations, sizes that find themselves, a reward without a network."""
        flow = self.model in ("sd35", "flux")
        images, steps = (4, 4) if tiny else (self.images, self.steps)
        window = {"size": min(self.window, 2) if tiny else self.window} if self.window else None
        return {
            "resolution": 64 if tiny else self.side,
            "iterations": 2,
            "rewards": {"jpeg_compressibility": 1.0},
            "prompts": {"train": "animals", "evaluation": "animals-eval"},
            "sampling": {"eta": 1.0, "num_steps": steps, "guidance_scale": 3.5 if flow else 5.0, "window": window},
            "rollout": {
                "images_per_iteration": images,
                "images_per_prompt": min(self.group, images),
                "batch_size": "auto",
            },
            "objective": {"updates_per_epoch": 1, "batch_size": "auto"},
            "advantage": {"kind": "group" if self.group > 1 else "per_prompt"},
            "evaluation": {"every": 2, "num_images": 2, "num_steps": 1, "grid_images": 2},
            "memory": {"gradient_checkpointing": self.checkpointing, "decode_batch_size": "auto"},
            "checkpoint": {"every": 2},
        }


CASES = (
    Case("sd15", 512, 16, 10, 0.40),
    Case("sdxl", 1024, 4, 8, 0.55),
    Case("sd35", 512, 8, 10, 0.55, group=4),
    Case("flux", 512, 12, 6, 0.60, group=12, window=4, checkpointing=True),
    Case("flux", 1024, 4, 6, 0.60, group=4, window=4, checkpointing=True),
)


def run(
    cases: Sequence[Case],
    tiny: bool,
    out: Path,
    limit: float = LIMIT,
    on_result: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Measures every case in a process of its own; the results so far are in `out` after each.

    Args:
        tiny: very small models of the same classes, also on a CPU: whether all of it works.
        limit: seconds of each process.
        on_result: called with the results so far after each case.

    Raises:
        RuntimeError: no case could be measured.
    """
    measured: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for case in cases:
        settings = {"model": case.model, "tiny": tiny, "dtype": "bfloat16", "config": case.config(tiny)}
        try:
            with Side(sys.executable, "benchmarks.gpu_side", settings, cpu=False, wait=False) as side:
                info = side.receive(limit)
                side.send("measure")
                measured[case.name] = {**info, **side.receive(limit)}
        except (RuntimeError, TimeoutError) as error:
            failed[case.name] = str(error)
        if measured:
            result = _result(measured, failed, tiny)
            result.write(out)
            on_result(result)
    if not measured:
        raise RuntimeError(f"no case could be measured: {next(iter(failed.values()))}")
    return result


def _result(measured: dict[str, dict[str, Any]], failed: dict[str, str], tiny: bool) -> Result:
    heads = [head for case in CASES if case.name in measured for head in _headlines(case, measured[case.name])]
    rows = [row for name, report in measured.items() for row in _rows(name, report)]
    rows += [[name, "failed", *[""] * 6, error.splitlines()[-1][:80]] for name, error in failed.items()]
    first = next(iter(measured.values()))
    return Result(
        "gpu",
        heads[0],
        [
            "model, pixels",
            "phase",
            "seconds",
            "network alone",
            "TFLOP",
            "TFLOP/s",
            "of the rate",
            "peak GiB",
            "estimate GiB",
        ],
        rows,
        settings={"tiny": tiny, "device": first["device"], "cases": [vars(case) for case in CASES]},
        measurements={"measured": measured, "failed": failed},
        versions={"etude": first["versions"]},
        further=heads[1:],
    )


def _headlines(case: Case, report: dict[str, Any]) -> list[Headline]:
    phases, network = report["phases"], report["network"]
    spent = [sum(part[phase] for phase in network) for part in (phases, {n: v["seconds"] for n, v in network.items()})]
    rollout, update = (Ratio.of([_rate(report, phase)], [report["rate"]]) for phase in ("rollout", "update"))
    return [
        Headline(f"{case.name}: share of the device's rate in the rollout", rollout, case.target, at_most=False),
        Headline(f"{case.name}: share of the device's rate in the update", update, REPLAY, at_most=False),
        Headline(f"{case.name}: rollout and update over their network calls", Ratio.of(spent[:1], spent[1:]), AROUND),
        Headline(f"{case.name}: estimate / peak memory", Ratio.of([report["estimated_bytes"]], [report["peak_bytes"]])),
    ]


def _rate(report: dict[str, Any], phase: str) -> float:
    return float(report["network"][phase]["flops"] / report["phases"][phase])


def _rows(name: str, report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for phase, seconds in report["phases"].items():
        cells = [name, phase, f"{seconds:.3f}", *[""] * 6]
        if phase in report["network"]:
            alone, rate = report["network"][phase], _rate(report, phase)
            share = f"{rate / report['rate']:.1%}"
            cells[3:7] = [f"{alone['seconds']:.3f}", f"{alone['flops'] / 1e12:.3g}", f"{rate / 1e12:.3g}", share]
        if phase == "total":
            cells[7:] = [f"{report[key] / 2**30:.1f}" for key in ("peak_bytes", "estimated_bytes")]
        rows.append(cells)
    return rows
