"""End-to-end time of a training iteration over the time of its network calls alone."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.processes import BUILD, Side
from benchmarks.results import Headline, Ratio, Result, milliseconds

TARGET = 1.10
WARM_UP = 2


def run(recipe: str, overrides: list[str], repeats: int, threads: int | None) -> Result:
    """Alternates A (an iteration) and B (the UNet forwards, forward-backwards and VAE decodes of that very iteration).

    Args:
        recipe: what is trained: a recipe's name or a YAML file.
        overrides: `a.b=value`, as for `etude train --set`.
        repeats: pairs of A and B, after two pairs that are thrown away.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    settings = {"recipe": recipe, "overrides": overrides, "work": str(BUILD)}
    with Side(sys.executable, "benchmarks.etude_side", settings, threads, cpu=False) as side:
        info = side.info
        pairs = [side.ask("overhead") for _ in range(WARM_UP + repeats)][WARM_UP:]
    parts = _parts(pairs)
    headline = Headline(
        "iteration / bare network", Ratio.of(parts["iteration"], parts["bare network"]), TARGET, at_most=True
    )
    return Result(
        "overhead",
        headline,
        ["part of an iteration", "median, ms", "over the bare network"],
        [[name, milliseconds(values), str(Ratio.of(values, parts["bare network"]))] for name, values in parts.items()],
        settings={
            **settings,
            "repeats": repeats,
            "device": info["device"],
            "threads": info["threads"],
            "calls": pairs[0]["calls"],
        },
        measurements={"pairs": pairs},
        versions={"etude": info["versions"]},
    )


def _parts(pairs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Seconds of each part, by pair. What a phase takes beyond its network calls is its overhead."""

    def each(*names: str, kind: str = "bare") -> list[float]:
        return [sum(pair[kind].get(name, 0.0) for name in names) for pair in pairs]

    def beyond(phase: str, *names: str) -> list[float]:
        return [a - b for a, b in zip(each(phase, kind="phases"), each(*names), strict=True)]

    total = [pair["seconds"] for pair in pairs]
    phases = each("rollout", "rewards", "update", kind="phases")
    return {
        "iteration": total,
        "bare network": each("forward", "forward_backward", "decode"),
        "bare: UNet forward (rollout)": each("forward"),
        "bare: UNet forward and backward (replay)": each("forward_backward"),
        "bare: VAE decode": each("decode"),
        "rollout beyond its network calls": beyond("rollout", "forward", "decode"),
        "rewards": each("rewards", kind="phases"),
        "update beyond its network calls": beyond("update", "forward_backward"),
        "metrics, checkpoint": [a - b for a, b in zip(total, phases, strict=True)],
    }
