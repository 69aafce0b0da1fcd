"""SD1.5 at its real size on a GPU: the same LoRA iteration by etude and by TRL's DDPOTrainer, in turns."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu import with_settings
from benchmarks.processes import BUILD, Side
from benchmarks.prompts import PROMPTS
from benchmarks.results import Headline, Ratio, Result

TARGET = 2.0
WARM_UP = 2
IMAGES, STEPS, UPDATES = 16, 10, 1
SAMPLE, TRAIN = 16, 8
"""Rows of a network call in both programs, without guidance's second half."""
LEARNING_RATE, CLIP_RANGE, GUIDANCE = 3e-4, 1e-4, 5.0


@dataclass(frozen=True)
class Entry:
    """etude with some settings."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


ENTRIES = (
    Entry("TRL's rows a call"),
    Entry("channels last, whole rollout and 16 rows a replay", {"channels_last": True, "objective.batch_size": 16}),
)


def run(python: Path, tiny: bool, repeats: int, limit: float = 120.0) -> Result:
    """Alternates iterations of TRL and of etude with each group of settings.

    Args:
        python: interpreter of an environment with TRL.
        tiny: a very small model, also on a CPU: whether all of it works.
        repeats: number of iterations of each after the first two.
        limit: seconds within which a process must answer.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="gpu-trl-") as folder:
        work = Path(folder)
        pipeline = {"directory": str(work / "pipeline"), "full_size": "sd15", "tiny": tiny}
        with Side(sys.executable, "benchmarks.pipeline_side", pipeline, cpu=False):
            pass
        ours = [
            Side(sys.executable, "benchmarks.etude_side", _settings(work, i, entry, tiny), cpu=False, wait=False)
            for i, entry in enumerate(ENTRIES)
        ]
        theirs = Side(python, "benchmarks.trl_side", _peer(work, tiny), cpu=False, wait=False)
        sides = [*ours, theirs]
        try:
            info = [side.receive(limit) for side in sides]
            seconds: list[list[float]] = [[] for _ in sides]
            for _ in range(WARM_UP + repeats):
                for side, spent in zip(sides, seconds, strict=True):
                    side.send("iterate")
                    spent.append(side.receive(limit)["seconds"])
        finally:
            for side in sides:
                side.stop()
    return _result([spent[WARM_UP:] for spent in seconds], info, {"tiny": tiny, "repeats": repeats})


def _result(seconds: list[list[float]], info: list[dict[str, Any]], settings: dict[str, Any]) -> Result:
    *ours, theirs = seconds
    ratios = [Ratio.of(theirs, own) for own in ours]
    heads = [
        Headline(f"SD1.5, LoRA, bfloat16: TRL / etude, {entry.name}", ratio, TARGET, at_most=False)
        for entry, ratio in zip(ENTRIES, ratios, strict=True)
    ]
    rows = [["TRL", f"{median(theirs):.3f}", ""]]
    rows += [
        [f"etude, {entry.name}", f"{median(own):.3f}", str(ratio)]
        for entry, own, ratio in zip(ENTRIES, ours, ratios, strict=True)
    ]
    return Result(
        "gpu_trl",
        heads[0],
        ["program", "seconds an iteration", "TRL / this"],
        rows,
        settings={**settings, "images": IMAGES, "num_steps": STEPS, "sample": SAMPLE, "train": TRAIN},
        measurements={"seconds": seconds, "info": info},
        versions={"etude": info[0]["versions"], "trl": info[-1]["versions"]},
        further=heads[1:],
    )


def _settings(work: Path, number: int, entry: Entry, tiny: bool) -> dict[str, Any]:
    prompts, path = work / "prompts.txt", work / f"recipe-{number}.yaml"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    tree = {
        "model": str(work / "pipeline"),
        "resolution": 64 if tiny else 512,
        "dtype": "bfloat16",
        "rewards": {"benchmarks.workload:brightness": 1.0},
        "prompts": {"train": str(prompts), "evaluation": "animals"},
        "sampling": {"kernel": "ddim", "eta": 1.0, "num_steps": STEPS, "guidance_scale": GUIDANCE},
        "rollout": {"images_per_iteration": IMAGES, "images_per_prompt": 1, "batch_size": SAMPLE},
        "lora": {"rank": 4, "alpha": 4, "targets": ["to_k", "to_q", "to_v", "to_out.0"]},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "objective": {"kind": "ppo", "clip_range": CLIP_RANGE, "updates_per_epoch": UPDATES, "batch_size": TRAIN},
        "advantage": {"kind": "per_prompt"},
        "evaluation": {"num_images": 2, "num_steps": 1, "grid_images": 2},
    }
    path.write_text(json.dumps(with_settings(tree, entry.settings)), encoding="utf-8")  # JSON is YAML
    return {"recipe": str(path), "overrides": [], "work": str(work)}


def _peer(work: Path, tiny: bool) -> dict[str, Any]:
    return {
        "pipeline": str(work / "pipeline"),
        "work": str(work),
        "images": IMAGES,
        "num_steps": STEPS,
        "updates": UPDATES,
        "seed": 0,
        "sample_batch_size": SAMPLE,
        "train_batch_size": TRAIN,
        "lora": True,
        "cpu": tiny,
        "guidance_scale": GUIDANCE,
        "learning_rate": LEARNING_RATE,
        "clip_range": CLIP_RANGE,
    }
