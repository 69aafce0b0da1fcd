"""Time and memory of an iteration against the size of its micro-batches, in rows of a network call."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

from benchmarks.processes import BUILD, Side
from benchmarks.results import Headline, Ratio, Result, milliseconds

TARGET = 1.1
WARM_UP = 1
SIZES = (1, 4, 12, 24, 60)
IMAGES = 24


def run(
    recipes: list[str],
    overrides: list[str],
    repeats: int,
    threads: int | None,
    sizes: tuple[int, ...] = SIZES,
    images: int = IMAGES,
) -> Result:
    """Runs an iteration with micro-batches of each size in turn, for each recipe.

    Args:
        recipes: recipes to train.
        overrides: `a.b=value`, as for `etude train --set`.
        repeats: number of rounds, after one that is thrown away.
        sizes: largest numbers of images in a call of the rollout, and of (image, step) pairs in a
            call of the replay.
        images: number of images of an iteration; the recipes sample all of them at once.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    found, info = {}, {}
    for recipe in recipes:
        with ExitStack() as stack:
            sides = {
                size: stack.enter_context(
                    Side(
                        sys.executable,
                        "benchmarks.etude_side",
                        {"recipe": recipe, "overrides": [*_sizes(size, images), *overrides], "work": str(BUILD)},
                        threads,
                    )
                )
                for size in sizes
            }
            rounds = [
                {str(size): side.ask("iterate") for size, side in sides.items()} for _ in range(WARM_UP + repeats)
            ]
            peaks = {str(size): side.ask("memory")["peak_bytes"] for size, side in sides.items()}
            info = sides[sizes[0]].info
        found[recipe] = {"rounds": rounds[WARM_UP:], "peak_bytes": peaks}
    settings = {
        "images": images,
        "sizes": sizes,
        "overrides": overrides,
        "repeats": repeats,
        "threads": info["threads"],
    }
    return _result(found, images, settings, info["versions"])


def _sizes(size: int, images: int) -> list[str]:
    return [
        f"rollout.images_per_iteration={images}",
        f"rollout.batch_size={size}",
        f"objective.batch_size={size}",
    ]


def _result(found: dict[str, Any], images: int, settings: dict[str, Any], versions: dict[str, str]) -> Result:
    """The ratios of each size's iteration to the iteration of the recipes, with all images at once."""
    heads, rows = [], []
    for recipe, measured in found.items():
        rounds, peaks = measured["rounds"], measured["peak_bytes"]

        def seconds(size: str, phase: str | None = None, rounds: list[Any] = rounds) -> list[float]:
            return [one[size]["phases"][phase] if phase else one[size]["seconds"] for one in rounds]

        ratios = {size: Ratio.of(seconds(size), seconds(str(images))) for size in peaks}
        fastest = min(ratios, key=lambda size: ratios[size].median)
        against = Ratio.of(seconds(str(images)), seconds(fastest))
        heads.append(
            Headline(
                f"{recipe}, iteration with the recipe's micro-batches / with the fastest ({fastest})", against, TARGET
            )
        )
        rows += [
            [
                recipe,
                size,
                milliseconds(seconds(size)),
                str(ratio),
                milliseconds(seconds(size, "rollout")),
                milliseconds(seconds(size, "update")),
                f"{peaks[size] / 1e6:.0f}",
            ]
            for size, ratio in ratios.items()
        ]
    return Result(
        "micro_batch",
        heads[0],
        ["recipe", "micro-batch", "iteration, ms", f"over {images}", "rollout, ms", "update, ms", "peak memory, MB"],
        rows,
        settings=settings,
        measurements=found,
        versions={"etude": versions},
        further=heads[1:],
    )
