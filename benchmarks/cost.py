"""Time of an iteration against images x steps, and whether it is a line."""

from __future__ import annotations

import statistics
import sys
from contextlib import ExitStack
from itertools import product
from typing import Any

from benchmarks.fit import Line, line
from benchmarks.processes import BUILD, Side
from benchmarks.results import Headline, Ratio, Result, milliseconds

TARGET = 0.1
WARM_UP = 1
IMAGES, STEPS, BATCH = (8, 16, 32), (5, 10, 20), 8
"""Micro-batch. It divides every number of images, so that all calls have the same size."""


def run(
    recipe: str,
    overrides: list[str],
    repeats: int,
    threads: int | None,
    images: tuple[int, ...] = IMAGES,
    steps: tuple[int, ...] = STEPS,
) -> Result:
    """Runs one iteration for each number of images and of steps in turn, and fits a line to the medians.

    Args:
        recipe: recipe to train, with every step trained.
        overrides: `a.b=value`, as for `etude train --set`.
        repeats: number of rounds, after one that is thrown away.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        sides = {
            point: stack.enter_context(
                Side(
                    sys.executable,
                    "benchmarks.etude_side",
                    {"recipe": recipe, "overrides": [*_sizes(*point), *overrides], "work": str(BUILD)},
                    threads,
                )
            )
            for point in product(images, steps)
        }
        rounds = [[side.ask("iterate")["seconds"] for side in sides.values()] for _ in range(WARM_UP + repeats)]
        info = next(iter(sides.values())).info
    settings = {
        "recipe": recipe,
        "overrides": overrides,
        "batch": BATCH,
        "repeats": repeats,
        "threads": info["threads"],
    }
    return _result(list(sides), rounds[WARM_UP:], settings, info["versions"])


def _sizes(images: int, steps: int) -> list[str]:
    return [
        f"rollout.images_per_iteration={images}",
        "rollout.images_per_prompt=4",
        f"rollout.batch_size={BATCH}",
        f"objective.batch_size={BATCH}",
        "objective.updates_per_epoch=2",
        f"sampling.num_steps={steps}",
    ]


def _result(
    points: list[tuple[int, int]], rounds: list[list[float]], settings: dict[str, Any], versions: dict[str, str]
) -> Result:
    work = [float(images * steps) for images, steps in points]
    seconds = [statistics.median(one[i] for one in rounds) for i in range(len(points))]
    fit = line(work, seconds, [1 / t**2 for t in seconds])  # equal weights for equal relative errors
    largest = max(abs(t - fit(w)) / fit(w) for w, t in zip(work, seconds, strict=True))
    head = Headline(
        "largest distance of an iteration's time from the line / the line", Ratio.of([largest], [1.0]), TARGET
    )
    rows = [
        [str(i), str(s), str(i * s), milliseconds([t]), milliseconds([fit(w)]), f"{100 * (t / fit(w) - 1):+.1f} %"]
        for (i, s), w, t in zip(points, work, seconds, strict=True)
    ]
    rows.append(
        [
            "fit",
            "",
            "",
            f"{1e3 * fit.intercept:.1f} + {1e3 * fit.slope:.2f} x images x steps",
            "",
            f"R2 = {fit.r2:.5f}",
        ]
    )
    return Result(
        "cost",
        head,
        ["images", "steps", "images x steps", "iteration, ms", "line, ms", "residual"],
        rows,
        settings=settings,
        measurements={"points": points, "rounds": rounds, "fit": _tree(fit)},
        versions={"etude": versions},
    )


def _tree(fit: Line) -> dict[str, float]:
    return {"intercept_seconds": fit.intercept, "seconds_per_image_step": fit.slope, "r2": fit.r2}
