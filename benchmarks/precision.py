"""Iterations that sample in half precision and train in float32: time, and ratios before the update."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

from benchmarks.processes import BUILD, Side
from benchmarks.results import Headline, Ratio, Result, milliseconds

WARM_UP = 1
FULL = "float32"
SIDES = {
    FULL: ["rollout.dtype=null"],
    "bfloat16": ["rollout.dtype=bfloat16"],
    "bfloat16, ratios from the replay": ["rollout.dtype=bfloat16", "objective.old_log_prob=replay"],
    "float16": ["rollout.dtype=float16"],
}
SMALL = ["rollout.images_per_iteration=4", "rollout.images_per_prompt=2", "objective.updates_per_epoch=2"]
"""Small, since a CPU without half-precision arithmetic takes many times as long."""


def run(recipes: list[str], overrides: list[str], repeats: int, threads: int | None) -> Result:
    """Runs an iteration in each precision in turn, for each recipe.

    Args:
        recipes: recipes to train.
        overrides: `a.b=value`, as for `etude train --set`, after those that make the iteration
            small.
        repeats: number of rounds, after one that is thrown away.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    found, info = {}, {}
    for recipe in recipes:
        with ExitStack() as stack:
            sides = {
                name: stack.enter_context(_side(recipe, [*SMALL, *own, *overrides], threads))
                for name, own in SIDES.items()
            }
            rounds = [
                {name: {**side.ask("iterate"), "metrics": side.ask("metrics")} for name, side in sides.items()}
                for _ in range(WARM_UP + repeats)
            ]
            info = sides[FULL].info
        found[recipe] = {"rounds": rounds[WARM_UP:], "clip_range": info["clip_range"]}
    settings = {"overrides": [*SMALL, *overrides], "repeats": repeats}
    return _result(found, {**settings, **{key: info[key] for key in ("threads", "device")}}, info["versions"])


def _side(recipe: str, overrides: list[str], threads: int | None) -> Side:
    settings = {"recipe": recipe, "overrides": overrides, "work": str(BUILD)}
    return Side(sys.executable, "benchmarks.etude_side", settings, threads, cpu=False)


def _result(found: dict[str, Any], settings: dict[str, Any], versions: dict[str, str]) -> Result:
    heads, rows = [], []
    for recipe, measured in found.items():
        rounds, clip_range = measured["rounds"], measured["clip_range"]

        def seconds(name: str, phase: str | None = None, rounds: list[Any] = rounds) -> list[float]:
            return [one[name]["phases"][phase] if phase else one[name]["seconds"] for one in rounds]

        def deviation(name: str, key: str, unit: float, rounds: list[Any] = rounds) -> Ratio:
            return Ratio.of([one[name]["metrics"][key] for one in rounds], [unit] * len(rounds))

        for name in SIDES:
            total, sampling = (Ratio.of(seconds(name, phase), seconds(FULL, phase)) for phase in (None, "rollout"))
            start = deviation(name, "rollout_ratio_deviation", 1.0)
            largest = deviation(name, "rollout_ratio_max_deviation", 1.0)
            share = deviation(name, "rollout_ratio_deviation", clip_range)
            clipped = deviation(name, "clipfrac", 1.0)
            times = [milliseconds(seconds(name)), str(total), milliseconds(seconds(name, "rollout")), str(sampling)]
            ratio = [f"{start.median:.1e}", f"{largest.high:.1e}", f"{share.median:.3f}", f"{clipped.median:.2f}"]
            rows.append([recipe, name, *times, *ratio])
            if name != FULL:
                heads.append(Headline(f"{recipe}, rollout in {name}: iteration / that in {FULL}", total))
            if name in ("bfloat16", "float16"):
                heads.append(
                    Headline(
                        f"{recipe}, rollout in {name}: the ratio's distance from 1 at the start / clip range", share
                    )
                )
    return Result(
        "precision",
        heads[0],
        [
            "recipe",
            "rollout",
            "iteration, ms",
            f"over {FULL}",
            "rollout, ms",
            f"over {FULL}",
            "the ratio's mean distance from 1 at the start",
            "largest",
            "mean / clip range",
            "clipped",
        ],
        rows,
        settings=settings,
        measurements=found,
        versions={"etude": versions},
        further=heads[1:],
    )
