"""End-to-end time of a training iteration over the time of its network calls alone."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.processes import BUILD, Side
from benchmarks.results import Headline, Ratio, Result, milliseconds

TARGET = 1.05
WARM_UP = 2


def run(recipes: list[str], overrides: list[str], repeats: int, threads: int | None) -> Result:
    """Alternates A (an iteration) and B (the network calls of that iteration alone), for each recipe.

    B consists of the denoiser's forwards and forward-backwards, and the VAE's decodes.

    Args:
        recipes: recipes to train, as names or YAML files.
        overrides: `a.b=value`, as for `etude train --set`.
        repeats: number of pairs of A and B, after two pairs that are thrown away.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    found, info = {}, {}
    for recipe in recipes:
        settings = {"recipe": recipe, "overrides": overrides, "work": str(BUILD)}
        with Side(sys.executable, "benchmarks.etude_side", settings, threads, cpu=False) as side:
            info = side.info
            found[recipe] = [side.ask("overhead") for _ in range(WARM_UP + repeats)][WARM_UP:]
    chosen = {"recipes": recipes, "overrides": overrides, "repeats": repeats}
    return _result(found, {**chosen, **{key: info[key] for key in ("device", "threads")}}, info["versions"])


def _result(found: dict[str, list[dict[str, Any]]], settings: dict[str, Any], versions: dict[str, str]) -> Result:
    parts = {recipe: _parts(pairs) for recipe, pairs in found.items()}
    ratios = {
        recipe: {name: Ratio.of(values, each["bare network"]) for name, values in each.items()}
        for recipe, each in parts.items()
    }
    heads = [
        Headline(f"{recipe}: iteration / bare network", each["iteration"], TARGET) for recipe, each in ratios.items()
    ]
    names = list(next(iter(parts.values())))
    return Result(
        "overhead",
        heads[0],
        [
            "part of an iteration",
            *(column for recipe in parts for column in (f"{recipe}, ms", "over the bare network")),
        ],
        [
            [name, *(cell for r in parts for cell in (milliseconds(parts[r][name]), str(ratios[r][name])))]
            for name in names
        ],
        settings=settings,
        measurements={"pairs": found},
        versions={"etude": versions},
        further=heads[1:],
    )


def _parts(pairs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Seconds of each part, by pair. The overhead of a phase is its time without its network calls."""

    def each(*names: str, kind: str = "bare") -> list[float]:
        return [sum(pair[kind].get(name, 0.0) for name in names) for pair in pairs]

    def beyond(phase: str, *names: str) -> list[float]:
        return [a - b for a, b in zip(each(phase, kind="phases"), each(*names), strict=True)]

    total = [pair["seconds"] for pair in pairs]
    phases = each("rollout", "rewards", "update", kind="phases")
    return {
        "iteration": total,
        "bare network": each("forward", "forward_backward", "decode"),
        "bare: denoiser forward (rollout)": each("forward"),
        "bare: denoiser forward and backward (replay)": each("forward_backward"),
        "bare: VAE decode": each("decode"),
        "rollout beyond its network calls": beyond("rollout", "forward", "decode"),
        "rewards": each("rewards", kind="phases"),
        "update beyond its network calls": beyond("update", "forward_backward"),
        "metrics, checkpoint": [a - b for a, b in zip(total, phases, strict=True)],
    }
