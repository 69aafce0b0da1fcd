"""Real architectures with random weights on a GPU: how much of the card an iteration uses, what it takes of its memory, what settings gain.

Each case is a process of its own with a time limit, and the results are written after each, so that
a process that fails or hangs costs no other its figures. A process imports its libraries while the one
before it is measured. FLOPs are counted by torch on one call; the rate that they are divided by is
that of a bfloat16 product of matrices in the same process.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.processes import Side
from benchmarks.results import Headline, Ratio, Result
from etude.config import load_config

LIMIT = 100.0
"""Seconds that a case may take, loading and all iterations included."""
STARTING = 60.0
"""Seconds that its process may take to import the libraries."""
AROUND = 1.05
"""Target: seconds of rollout and update over those of their network calls."""
REPLAY = 0.35
"""Target: share of the device's rate that the update reaches."""
FASTER = 4.0
"""Target: seconds of an embedded model's iteration without CUDA graphs over those with them."""
Tree = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model at a size, the work of an iteration, and the share of the device's rate that its rollout is to reach.

    Attributes:
        variant: name of `settings` in the tables. Empty: the case that the others of its model and size are compared with.
        settings: settings of the recipe beside the case's own, by section and name.
    """

    model: str
    side: int
    images: int
    steps: int
    target: float | None = None
    group: int = 1
    window: int | None = None
    checkpointing: bool = False
    variant: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str:
        return f"{self.model} {self.side}"

    @property
    def name(self) -> str:
        return f"{self.base}, {self.variant}" if self.variant else self.base

    def config(self, tiny: bool) -> Tree:
        """The recipe of the case as a tree: two iterations, sizes that find themselves, a reward without a network."""
        flow = self.model in ("sd35", "flux")
        images, steps = (4, 4) if tiny else (self.images, self.steps)
        window = {"size": min(self.window, 2) if tiny else self.window} if self.window else None
        tree: Tree = {
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
        return with_settings(tree, self.settings)


@dataclass(frozen=True)
class Embedded(Case):
    """An embedded model with its recipe, whose work the recipe says."""

    recipe: str = ""

    @property
    def base(self) -> str:
        return self.recipe

    def config(self, tiny: bool) -> Tree:
        few: Tree = {"iterations": 2, "rollout.images_per_iteration": 16} if tiny else {"iterations": 6}
        few |= {"evaluation.num_images": 8, "evaluation.every": 100, "evaluation.held_out_rewards": []}
        return dict(yaml.safe_load(load_config(self.recipe, {**few, **self.settings}).to_yaml()))


def with_settings(tree: Tree, settings: Mapping[str, Any]) -> Tree:
    """The tree with further settings, by names like `memory.offload`."""
    changed = dict(tree)
    for name, value in settings.items():
        section, _, rest = name.partition(".")
        changed[section] = {**changed.get(section, {}), rest: value} if rest else value
    return changed


_LAST = {"channels_last": True}
_OWN = {"autocast": False, **_LAST}
_REGIONAL = {"compile": "regional", "objective.old_log_prob": "replay", "optimizer.fused": True}
_GRAPHS = {"compile": "graphs"}
_DDPO = Embedded("emoji-sd", 32, 0, 0, recipe="emoji-ddpo")
_MIXGRPO = Embedded("emoji-flux", 32, 0, 0, recipe="emoji-mixgrpo")
_SD15 = Case("sd15", 512, 16, 10, 0.40)
_SDXL = Case("sdxl", 1024, 4, 8, 0.55)
_SD35 = Case("sd35", 512, 8, 10, 0.55, group=4)
_FLUX = Case("flux", 512, 8, 6, 0.60, group=8, window=4, checkpointing=True)
CASES: tuple[Case, ...] = (
    _DDPO,
    replace(_DDPO, variant="graphs", settings=_GRAPHS),
    _MIXGRPO,
    replace(_MIXGRPO, variant="graphs", settings=_GRAPHS),
    _SD15,
    _FLUX,
    _SDXL,
    _SD35,
    replace(_SD15, variant="channels last, no autocast", settings=_OWN),
    replace(_SDXL, variant="channels last, no autocast", settings=_OWN),
    replace(_SD15, variant="channels last, regional", settings={**_LAST, **_REGIONAL}),
    replace(_SDXL, variant="channels last, regional", settings={**_LAST, **_REGIONAL}),
    replace(_SD15, variant="gradients of the rollout", settings={"objective.gradients": "rollout"}),
    replace(_FLUX, variant="regional", settings=_REGIONAL),
    replace(_SD35, variant="regional", settings=_REGIONAL),
    replace(_SD15, variant="channels last", settings=_LAST),
    Case("flux", 1024, 2, 6, 0.60, group=2, window=4, checkpointing=True),
)
"""Plain cases first, then what settings gain, in the order in which an answer is worth its seconds."""


def run(
    cases: Sequence[Case],
    tiny: bool,
    out: Path,
    limit: float = LIMIT,
    on_result: Callable[[Result], None] = lambda result: None,
    within: float | None = None,
) -> Result:
    """Measures every case in a process of its own; the results so far are in `out` after each.

    Args:
        tiny: very small models of the same classes, also on a CPU: whether all of it works.
        limit: seconds of each process.
        on_result: called with the results so far after each case.
        within: seconds after which no further case is begun. Default: no end.

    Raises:
        RuntimeError: no case could be measured.
    """
    measured: dict[str, Tree] = {}
    failed: dict[str, str] = {}
    end = time.monotonic() + within if within is not None else float("inf")
    following = _start(cases[0], tiny)
    try:
        for case, after in zip(cases, [*cases[1:], None], strict=True):
            if time.monotonic() > end:
                failed[case.name] = "no time was left"
                continue
            try:
                with following as side:
                    info = side.receive(STARTING)
                    if after is not None:
                        following = _start(after, tiny)
                    side.send("measure")
                    measured[case.name] = {**info, **side.receive(limit)}
            except (RuntimeError, TimeoutError) as error:
                failed[case.name] = str(error)
            if measured:
                result = _result(cases, measured, failed, tiny)
                result.write(out)
                on_result(result)
    finally:
        following.stop()
    if not measured:
        raise RuntimeError(f"no case could be measured: {next(iter(failed.values()))}")
    return result


def _start(case: Case, tiny: bool) -> Side:
    settings = {"model": case.model, "tiny": tiny, "dtype": "bfloat16", "config": case.config(tiny)}
    return Side(sys.executable, "benchmarks.gpu_side", settings, cpu=False, wait=False)


def _result(cases: Sequence[Case], measured: dict[str, Tree], failed: dict[str, str], tiny: bool) -> Result:
    done = [case for case in cases if case.name in measured]
    heads = [head for case in done for head in _headlines(case, measured)]
    rows = [row for case in done for row in _rows(case, measured)]
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
        settings={"tiny": tiny, "device": first["device"], "cases": [vars(case) for case in cases]},
        measurements={"measured": measured, "failed": failed},
        versions={"etude": first["versions"]},
        further=heads[1:],
    )


def _headlines(case: Case, measured: dict[str, Tree]) -> list[Headline]:
    """The numbers of a case; of a variant also how much faster its rollout and update are than the plain case's."""
    report, plain = measured[case.name], measured.get(case.base)
    heads = []
    if case.variant and plain is not None:
        seconds = [sum(tree["phases"][phase] for phase in ("rollout", "update")) for tree in (plain, report)]
        target = FASTER if isinstance(case, Embedded) else None
        heads.append(Headline(f"{case.name}: plain / this", Ratio.of(seconds[:1], seconds[1:]), target, at_most=False))
    flops = (plain or report)["network"]
    for phase, target in (("rollout", case.target), ("update", REPLAY if case.target else None)):
        if case.target and flops and case.settings.get("objective.gradients") != "rollout":
            share = Ratio.of([flops[phase]["flops"] / report["phases"][phase]], [report["rate"]])
            heads.append(Headline(f"{case.name}: share of the device's rate in the {phase}", share, target, False))
    if network := report["network"]:
        spent = [sum(report["phases"][phase] for phase in network), sum(each["seconds"] for each in network.values())]
        heads.append(
            Headline(
                f"{case.name}: rollout and update over their network calls", Ratio.of(spent[:1], spent[1:]), AROUND
            )
        )
    if report["estimated_bytes"]:
        ratio = Ratio.of([report["estimated_bytes"]], [report["peak_bytes"]])
        heads.append(Headline(f"{case.name}: estimate / peak memory", ratio))
    return heads


def _rows(case: Case, measured: dict[str, Tree]) -> list[list[str]]:
    report, rows = measured[case.name], []
    for phase, seconds in report["phases"].items():
        cells = [case.name, phase, f"{seconds:.3f}", *[""] * 6]
        if phase in report["network"]:
            alone = report["network"][phase]
            rate = alone["flops"] / seconds
            share = f"{rate / report['rate']:.1%}"
            cells[3:7] = [f"{alone['seconds']:.3f}", f"{alone['flops'] / 1e12:.3g}", f"{rate / 1e12:.3g}", share]
        if phase == "total":
            sizes = report["peak_bytes"], report["estimated_bytes"]
            cells[7:] = [f"{size / 2**30:.1f}" if size else "" for size in sizes]
        rows.append(cells)
    return rows
