"""Strong scaling: the same iteration by one process and by two, with one thread each."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.processes import BUILD, Group, Side
from benchmarks.results import Headline, Ratio, Result, milliseconds

TARGET = 1.8
WARM_UP = 1
PROCESSES = 2
ONE, TWO, THREADS = "1 process", f"{PROCESSES} processes", f"1 process of {PROCESSES} threads"


@dataclass(frozen=True)
class Work:
    """The work of every iteration, in micro-batches of the same size on all sides."""

    images: int = 16
    batch: int = 8


def run(recipes: list[str], overrides: list[str], work: Work, repeats: int) -> Result:
    """Runs an iteration by one process, by two, and by one with two threads in turn, for each recipe.

    Args:
        recipes: recipes to train.
        overrides: `a.b=value`, as for `etude train --set`.
        repeats: number of rounds of one iteration each, after one that is thrown away.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    sizes = [
        f"rollout.images_per_iteration={work.images}",
        f"rollout.batch_size={work.batch}",
        f"objective.batch_size={work.batch}",
    ]
    found, info = {}, {}
    for recipe in recipes:
        settings = {"recipe": recipe, "overrides": [*sizes, *overrides], "work": str(BUILD)}
        with ExitStack() as stack:
            side = "benchmarks.etude_side"
            one = stack.enter_context(Side(sys.executable, side, settings, 1))
            two = stack.enter_context(Group(side, settings, PROCESSES, 1))
            threads = stack.enter_context(Side(sys.executable, side, settings, PROCESSES))
            info = one.info
            rounds = [
                {ONE: [one.ask("iterate")], TWO: two.ask("iterate"), THREADS: [threads.ask("iterate")]}
                for _ in range(WARM_UP + repeats)
            ]
        found[recipe] = rounds[WARM_UP:]
    return _result(found, {**asdict(work), "overrides": overrides, "repeats": repeats}, info["versions"])


def _result(
    found: dict[str, list[dict[str, list[dict[str, Any]]]]], settings: dict[str, Any], versions: dict[str, str]
) -> Result:
    heads, rows = [], []
    for recipe, rounds in found.items():
        seconds = {name: [_seconds(one[name]) for one in rounds] for name in (ONE, TWO, THREADS)}
        ratios = {name: Ratio.of(seconds[ONE], seconds[name]) for name in (TWO, THREADS)}
        heads.append(Headline(f"{recipe}, iteration: {ONE} / {TWO}", ratios[TWO], TARGET, at_most=False))
        rows.append([recipe, ONE, milliseconds(seconds[ONE]), *_phases(rounds, ONE), ""])
        rows += [
            [recipe, name, milliseconds(seconds[name]), *_phases(rounds, name), str(ratios[name])] for name in ratios
        ]
    return Result(
        "scaling",
        heads[0],
        ["recipe", "side", "iteration, ms", "rollout, ms", "update, ms", f"{ONE} / this"],
        rows,
        settings=settings,
        measurements={"rounds": found},
        versions={"etude": versions},
        further=heads[1:],
    )


def _seconds(replies: list[dict[str, Any]]) -> float:
    """Seconds of an iteration: those of the last process to finish."""
    return max(reply["seconds"] for reply in replies)


def _phases(rounds: list[dict[str, list[dict[str, Any]]]], name: str) -> list[str]:
    def slowest(phase: str) -> list[float]:
        return [max(reply["phases"][phase] for reply in one[name]) for one in rounds]

    return [milliseconds(slowest("rollout")), milliseconds(slowest("update"))]
