"""The time of an iteration by part and by operation of torch, each as a share of the iteration."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.processes import BUILD, Side
from benchmarks.results import Headline, Ratio, Result, milliseconds

WARM_UP = 2
NETWORKS = ("network", "autoencoder")
"""Words in the name of a part in which networks compute."""


def run(recipes: list[str], overrides: list[str], repeats: int, threads: int | None) -> Result:
    """Profiles `repeats` iterations of each recipe, after two that are thrown away."""
    BUILD.mkdir(parents=True, exist_ok=True)
    found, info = {}, {}
    for recipe in recipes:
        settings = {"recipe": recipe, "overrides": overrides, "work": str(BUILD)}
        with Side(sys.executable, "benchmarks.etude_side", settings, threads) as side:
            info = side.info
            for _ in range(WARM_UP):
                side.ask("iterate")
            found[recipe] = [side.ask("profile") for _ in range(repeats)]
    return _result(found, {"overrides": overrides, "repeats": repeats, "threads": info["threads"]}, info["versions"])


def _result(found: dict[str, list[dict[str, Any]]], settings: dict[str, Any], versions: dict[str, str]) -> Result:
    shares = {recipe: _shares(profiles) for recipe, profiles in found.items()}
    heads = [
        Headline(f"{recipe}, share of an iteration that is not the networks'", _outside(profiles))
        for recipe, profiles in found.items()
    ]
    names = list(dict.fromkeys(name for parts in shares.values() for name in parts))
    total = ["iteration, ms", *(milliseconds([one["seconds"] for one in profiles]) for profiles in found.values())]
    cells = [[name, *(_cell(parts.get(name)) for parts in shares.values())] for name in names]
    return Result(
        "profile",
        heads[0],
        ["share of an iteration", *found],
        [total, *cells],
        settings=settings,
        measurements={"profiles": found},
        versions={"etude": versions},
        further=heads[1:],
    )


def parts(profile: dict[str, Any]) -> dict[str, float]:
    """Seconds of all parts of an iteration; the rest of each phase is a part of its own."""
    timed, phases = profile["parts"], profile["phases"]

    def rest(phase: str, prefix: str) -> float:
        return float(phases[phase] - sum(value for name, value in timed.items() if name.startswith(prefix)))

    left = {
        "rollout: kernel, noise, the rest": rest("rollout", "rollout: "),
        "rewards": phases["rewards"],
        "replay: loss, the rest": rest("update", "replay: "),
        "metrics": profile["seconds"] - sum(phases[p] for p in ("rollout", "rewards", "update")) - timed["checkpoint"],
    }
    return {name: {**timed, **left}[name] for name in sorted({**timed, **left}, key=_order)}


def _order(name: str) -> tuple[int, bool]:
    phase = next((i for i, p in enumerate(("rollout", "rewards", "replay")) if name.startswith(p)), 3)
    return phase, name.endswith("the rest")


def _shares(profiles: list[dict[str, Any]]) -> dict[str, Ratio]:
    """Shares of each part and each group of operations, by name."""
    totals, others = [one["seconds"] for one in profiles], [one["operations_seconds"] for one in profiles]
    each = [parts(one) for one in profiles]
    groups = {name: [one["operations"][name] for one in profiles] for name in profiles[0]["operations"]}
    counted = [sum(one["operations"].values()) for one in profiles]
    groups["between operations: Python"] = [a - b for a, b in zip(others, counted, strict=True)]
    return {
        **{name: Ratio.of([one[name] for one in each], totals) for name in each[0]},
        **{f"torch, {name}": Ratio.of(values, others) for name, values in groups.items()},
    }


def _outside(profiles: list[dict[str, Any]]) -> Ratio:
    each = [{n: v for n, v in parts(one).items() if not any(word in n for word in NETWORKS)} for one in profiles]
    return Ratio.of([sum(one.values()) for one in each], [one["seconds"] for one in profiles])


def _cell(share: Ratio | None) -> str:
    return "" if share is None else f"{100 * share.median:.1f} %"
