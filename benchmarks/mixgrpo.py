"""Time of iterations of MixGRPO and MixGRPO-Flash over those of GRPO, at the same images and steps."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import BUILD, Side
from benchmarks.results import Headline, Ratio, Result, milliseconds

WARM_UP = 2
HEADS = 12
"""Heads of the random transformer, of 32 channels each. They make it wide enough that the fixed cost
of a call, negligible beside the time of a full-size network, does not dominate calls of few
rows."""
FULL, MIXED, UNSHARED, FLASH, RECORDED = "GRPO", "MixGRPO", "MixGRPO, nothing shared", "MixGRPO-Flash", "recorded"


@dataclass(frozen=True)
class Work:
    """The work of every iteration. Default: the share of one of 8 processes in `flux-mixgrpo`.

    Attributes:
        images: number of images, in groups of `group` images of one prompt and one initial noise.
        num_steps: number of steps of the sampler.
        window: number of steps that MixGRPO trains. The window moves by one step in each iteration,
            so that all its places count alike.
        compression: Flash's compression of the steps after the window.
        updates: number of optimiser steps.
        batch: largest number of rows in a network call.
    """

    images: int = 48
    group: int = 12
    num_steps: int = 25
    window: int = 4
    compression: float = 0.4
    updates: int = 4
    batch: int = 24

    @property
    def groups(self) -> int:
        return self.images // self.group

    @property
    def places(self) -> range:
        """Places of the window; the step at pure noise and the step to clean data cannot be trained."""
        return range(1, self.num_steps - self.window)


def evaluations(work: Work, compression: float | None = None) -> tuple[int, int]:
    """Network evaluations of one group over all places of the window: rollout, and replay with gradients.

    The steps before the window are computed once for the whole group.

    Args:
        compression: compression of the steps after the window. None: no compression.
    """
    forwards = 0
    for start in work.places:
        rest = work.num_steps - start - work.window
        tail = rest if compression is None else max(1, round(rest * compression))
        forwards += start + work.group * (work.window + tail)
    return forwards, work.group * work.window * len(work.places)


def bound(work: Work, cost: float) -> float:
    """Flash over MixGRPO, counted in network evaluations; one with gradients costs `cost` others."""
    (flash, trained), (mixed, _) = evaluations(work, work.compression), evaluations(work)
    return (flash + trained * cost) / (mixed + trained * cost)


def run(work: Work, model: str | None, repeats: int, threads: int | None, seed: int = 0, heads: int = HEADS) -> Result:
    """Runs GRPO, MixGRPO with and without shared prefix, Flash, and MixGRPO's network calls in turn.

    Args:
        model: name or directory of a FLUX model. Default: a random one.
        repeats: number of rounds of one iteration each, after two that are thrown away: the number
            of places of the window, or a multiple.
        heads: heads of the random model's transformer.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="mixgrpo-") as name, ExitStack() as stack:
        folder = Path(name)
        if model is None:
            model = str(folder / "pipeline")
            with Side(sys.executable, "benchmarks.pipeline_side", {"directory": model, "heads": heads, "seed": seed}):
                pass
        sides = {
            variant: stack.enter_context(
                Side(sys.executable, "benchmarks.etude_side", _settings(folder, work, model, variant, seed), threads)
            )
            for variant in (FULL, MIXED, UNSHARED, FLASH, RECORDED)
        }
        rounds = [_round(sides) for _ in range(WARM_UP + repeats)][WARM_UP:]
        info = {variant: side.info for variant, side in sides.items()}
    return _result(work, rounds, info, {"repeats": repeats, "seed": seed, "heads": heads})


def _round(sides: dict[str, Side]) -> dict[str, Any]:
    """Seconds of one iteration of each side, all with the window at the same place."""
    found: dict[str, Any] = {v: side.ask("iterate")["seconds"] for v, side in sides.items() if v != RECORDED}
    return {**found, RECORDED: sides[RECORDED].ask("overhead")}


def _settings(folder: Path, work: Work, model: str, variant: str, seed: int) -> dict[str, Any]:
    """The recipe of a side; the recipes differ by the window alone."""
    window: dict[str, Any] = {"strategy": "progressive", "size": work.window, "iters_per_shift": 1, "stride": 1}
    if variant == FLASH:
        window["compression"] = work.compression
    tree = {
        "model": model,
        "seed": seed,
        "rewards": {"benchmarks.workload:brightness": 1.0},
        "prompts": {"train": "animals", "evaluation": "animals"},
        "sampling": {
            "kernel": "gddim",
            "eta": 1.2,
            "num_steps": work.num_steps,
            "guidance_scale": 3.5,
            "window": None if variant == FULL else window,
        },
        "rollout": {
            "images_per_iteration": work.images,
            "images_per_prompt": work.group,
            "shared_noise": True,
            "batch_size": work.batch,
        },
        "objective": {"kind": "ppo", "updates_per_epoch": work.updates, "batch_size": work.batch},
        "advantage": {"kind": "group"},
        "evaluation": {"num_images": 2},
    }
    path = folder / f"{variant.replace(' ', '-')}.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return {"recipe": str(path), "overrides": [], "work": str(folder), "share_prefix": variant != UNSHARED}


def _result(work: Work, rounds: list[dict[str, Any]], info: dict[str, Any], settings: dict[str, Any]) -> Result:
    seconds = {v: [one[v] for one in rounds] for v in (FULL, MIXED, UNSHARED, FLASH)}
    recorded = [one[RECORDED]["seconds"] for one in rounds]
    bare = [sum(one[RECORDED]["bare"].values()) for one in rounds]

    def round_over(name: str, own: list[float], others: list[float], target: float) -> Headline:
        return Headline(name, _whole_rounds(work, own, others), target, at_most=True)

    mixed = round_over(f"{MIXED} / {FULL}", seconds[MIXED], seconds[FULL], 0.45)
    flash = round_over(f"{FLASH} / {MIXED}", seconds[FLASH], seconds[MIXED], 0.75)
    network = round_over(f"{MIXED} / its network calls alone", recorded, bare, 1.05)
    shared = Headline(f"{UNSHARED} / {MIXED}", _whole_rounds(work, seconds[UNSHARED], seconds[MIXED]))

    def row(
        name: str, variant: str, own: list[float], others: list[float], over: str, aim: Headline | None
    ) -> list[str]:
        target = "" if aim is None else f"at most {aim.target:g}: {'met' if aim.met else 'missed'}"
        total = f"{_whole_rounds(work, own, others).median:.3f}"
        trained = str(info[variant]["trained_steps"])
        return [name, trained, milliseconds(own), over, str(Ratio.of(own, others)), total, target]

    first = f"{FULL}, {work.num_steps} steps, {work.groups} groups of {work.group}"
    return Result(
        "mixgrpo",
        mixed,
        ["iteration", "trained steps", "median, ms", "compared with", "ratio", "whole round", "target"],
        [
            [first, str(info[FULL]["trained_steps"]), milliseconds(seconds[FULL]), "", "", "", ""],
            row(MIXED, MIXED, seconds[MIXED], seconds[FULL], FULL, mixed),
            row(UNSHARED, UNSHARED, seconds[UNSHARED], seconds[MIXED], MIXED, None),
            row(FLASH, FLASH, seconds[FLASH], seconds[MIXED], MIXED, flash),
            row(f"{MIXED}, recorded", MIXED, recorded, bare, "its network calls alone", network),
            *_network(work, [one[RECORDED]["timed"] for one in rounds]),
        ],
        settings={
            **settings,
            "work": asdict(work),
            "threads": info[FULL]["threads"],
            "parameters": info[FULL]["parameters"],
        },
        measurements={"rounds": rounds},
        versions={"etude": info[FULL]["versions"]},
        further=[flash, network, shared],
    )


def _whole_rounds(work: Work, own: list[float], others: list[float]) -> Ratio:
    """Ratios of sums over all places of the window: the cost of a run whose window visits all of them."""
    starts = range(0, len(own), len(work.places))
    sums = [[sum(each[start : start + len(work.places)]) for start in starts] for each in (own, others)]
    return Ratio.of(*sums)


def _network(work: Work, rounds: list[list[dict[str, Any]]]) -> list[list[str]]:
    """Cost of a row of a bare call, in the prefix and with gradients, and Flash's ratio from it."""

    def a_row(kind: str, rows: int) -> list[float]:
        found = [[one for one in calls if (one["kind"], one["rows"]) == (kind, rows)] for calls in rounds]
        return [sum(one["seconds"] for one in same) / sum(one["calls"] * rows for one in same) for same in found]

    full, trained = a_row("forward", work.batch), a_row("forward_backward", work.batch)
    cost, name = Ratio.of(trained, full), f"network: a row of {work.batch}"

    def against(what: str, own: list[float]) -> list[str]:
        return [what, "", milliseconds(own), name, str(Ratio.of(own, full)), "", ""]

    return [
        [name, "", milliseconds(full), "", "", "", ""],
        against(f"network: a row of {work.groups}, before the window", a_row("forward", work.groups)),
        against("network: a row with gradients (c)", trained),
        [f"{FLASH}, by the formula at c = {cost.median:.2f}", "", "", MIXED, "", f"{bound(work, cost.median):.3f}", ""],
    ]
