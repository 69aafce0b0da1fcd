"""Iterations of MixGRPO and MixGRPO-Flash over those of GRPO on the whole trajectory, at the same images and steps."""

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
HEADS = 6
"""Of the random transformer: as wide as the embedded model's."""
FULL, MIXED, UNSHARED, FLASH, RECORDED = "GRPO", "MixGRPO", "MixGRPO, nothing shared", "MixGRPO-Flash", "recorded"


@dataclass(frozen=True)
class Work:
    """What every iteration does.

    Attributes:
        images: sampled, in groups of `group` images of one prompt and one initial noise.
        num_steps: of the sampler.
        window: the steps that MixGRPO trains. It moves by one step in each iteration, so that all its places count alike.
        compression: of the steps after it, in Flash.
        updates: optimiser steps.
    """

    images: int = 24
    group: int = 12
    num_steps: int = 25
    window: int = 4
    compression: float = 0.4
    updates: int = 2


def run(work: Work, model: str | None, repeats: int, threads: int | None, seed: int = 0, heads: int = HEADS) -> Result:
    """Takes turns: GRPO, MixGRPO with and without a shared prefix, Flash, and MixGRPO with its network calls alone.

    Args:
        model: a FLUX model by its name or directory; None: a random one.
        repeats: rounds of one iteration each, after two that are thrown away. As many as the window has places, or a multiple.
        heads: of the random model's transformer.
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
    """One iteration of each, all with the window at the same place. Seconds."""
    found: dict[str, Any] = {v: side.ask("iterate")["seconds"] for v, side in sides.items() if v != RECORDED}
    return {**found, RECORDED: sides[RECORDED].ask("overhead")}


def _settings(folder: Path, work: Work, model: str, variant: str, seed: int) -> dict[str, Any]:
    """A side's recipe; all share everything but the window."""
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
            "batch_size": work.images,
        },
        "objective": {"kind": "ppo", "updates_per_epoch": work.updates, "batch_size": work.images},
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
    mixed = Headline(f"{MIXED} / {FULL}", Ratio.of(seconds[MIXED], seconds[FULL]), 0.45, at_most=True)
    flash = Headline(f"{FLASH} / {MIXED}", Ratio.of(seconds[FLASH], seconds[MIXED]), 0.75, at_most=True)
    network = Headline(f"{MIXED} / its network calls alone", Ratio.of(recorded, bare), 1.10, at_most=True)

    def row(name: str, values: list[float], variant: str, compared: str, ratio: Ratio, target: str) -> list[str]:
        trained = str(info[variant]["trained_steps"])
        return [name, trained, milliseconds(values), compared, str(ratio), target]

    def judged(name: str, values: list[float], variant: str, headline: Headline) -> list[str]:
        target = f"at most {headline.target:g}: {'met' if headline.met else 'missed'}"
        return row(name, values, variant, headline.name.partition(" / ")[2], headline.ratio, target)

    groups = f"{work.images // work.group} groups of {work.group}"
    first = f"{FULL}, {work.num_steps} steps, {groups}"
    shared = Ratio.of(seconds[UNSHARED], seconds[MIXED])
    return Result(
        "mixgrpo",
        mixed,
        ["iteration", "trained steps", "median, ms", "compared with", "ratio", "target"],
        [
            [first, str(info[FULL]["trained_steps"]), milliseconds(seconds[FULL]), "", "", ""],
            judged(MIXED, seconds[MIXED], MIXED, mixed),
            row(UNSHARED, seconds[UNSHARED], UNSHARED, MIXED, shared, ""),
            judged(FLASH, seconds[FLASH], FLASH, flash),
            judged(f"{MIXED}, recorded", recorded, MIXED, network),
        ],
        settings={
            **settings,
            "work": asdict(work),
            "threads": info[FULL]["threads"],
            "parameters": info[FULL]["parameters"],
        },
        measurements={"rounds": rounds},
        versions={"etude": info[FULL]["versions"]},
    )
