"""The same DDPO iteration by etude and by TRL's DDPOTrainer, in turns, each in its own environment."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.processes import BUILD, Side
from benchmarks.prompts import PROMPTS
from benchmarks.results import Headline, Ratio, Result, milliseconds

TARGET = 3.0
WARM_UP = 2
BARE_REPEATS = 5
TOLERANCE = 1e-3
UPDATES = 2
DIFFERENCES = "differences: log-prob, loss, gradient"
REQUIREMENTS = Path(__file__).resolve().parent / "trl-requirements.txt"
HYPER_PARAMETERS = {"guidance_scale": 5.0, "learning_rate": 1e-5, "clip_range": 1e-4}


@dataclass(frozen=True)
class Work:
    """The work of both sides in one iteration, which ends with two optimiser steps.

    Attributes:
        channels: channels of the two levels of the UNet.
        latent_size: height and width of the 4-channel latents.
        images: number of images of the iteration.
        num_steps: number of steps of the sampler; all of them are trained.
    """

    channels: tuple[int, int]
    latent_size: int = 8
    images: int = 32
    num_steps: int = 10


@dataclass(frozen=True)
class Comparison:
    """One line of the table: work, TRL's batch sizes (sample, train), etude's (rollout, objective)."""

    work: Work
    trl: tuple[int, int]
    etude: tuple[int, int]


def run(
    comparisons: list[Comparison], repeats: int, threads: int | None, seed: int = 0, environment: Path | None = None
) -> Result:
    """Alternates iterations of etude and TRL for each comparison, and times etude's network calls alone.

    Args:
        comparisons: lines of the table.
        repeats: number of pairs of each comparison, after two that are thrown away, since TRL
            writes no checkpoint in its first iteration.
        environment: TRL's virtual environment. Default: one under build/, created if missing.
    """
    python = (environment or peer_environment()) / "bin" / "python"
    BUILD.mkdir(parents=True, exist_ok=True)
    runs = []
    for comparison in comparisons:
        with tempfile.TemporaryDirectory(dir=BUILD, prefix="trl-") as folder:
            runs.append(_compare(comparison, python, Path(folder), repeats, threads, seed))
    return _result(runs, {**HYPER_PARAMETERS, "repeats": repeats, "seed": seed})


def _compare(
    comparison: Comparison, python: Path, folder: Path, repeats: int, threads: int | None, seed: int
) -> dict[str, Any]:
    work, pipeline = comparison.work, folder / "pipeline"
    build = {"directory": str(pipeline), "channels": list(work.channels), "latent_size": work.latent_size, "seed": seed}
    with Side(sys.executable, "benchmarks.pipeline_side", build):
        pass
    etude = {"recipe": _recipe(folder, pipeline, comparison, seed), "overrides": [], "work": str(folder)}
    peer = {
        "pipeline": str(pipeline),
        "work": str(folder),
        "images": work.images,
        "num_steps": work.num_steps,
        "updates": UPDATES,
        "seed": seed,
        "sample_batch_size": comparison.trl[0],
        "train_batch_size": comparison.trl[1],
        **HYPER_PARAMETERS,
    }
    with (
        Side(sys.executable, "benchmarks.etude_side", etude, threads) as ours,
        Side(python, "benchmarks.trl_side", peer, threads) as theirs,
    ):
        measured = _alternate(ours, theirs, folder, repeats)
        return {"comparison": asdict(comparison), "etude": ours.info, "trl": theirs.info, **measured}


def peer_environment() -> Path:
    """TRL's virtual environment, built anew if the requirements have changed."""
    directory, text = BUILD / "trl-venv", REQUIREMENTS.read_bytes()
    stamp, digest = directory / ".installed", hashlib.sha256(text).hexdigest()
    if not stamp.is_file() or stamp.read_text() != digest:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
        command = [str(directory / "bin" / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*command, "--requirement", str(REQUIREMENTS)], check=True)
        stamp.write_text(digest)
    return directory


def _alternate(ours: Side, theirs: Side, work: Path, repeats: int) -> dict[str, Any]:
    """Checks that both sides compute the same, then alternates their iterations."""
    if ours.info["parameters"] != theirs.info["parameters"]:
        raise RuntimeError(
            f"etude trains {ours.info['parameters']} parameters and TRL {theirs.info['parameters']}: not the same work."
        )
    rollout = work / "rollout.safetensors"
    prompts = theirs.ask("parity", path=str(rollout))["prompts"]
    parity = ours.ask("parity", path=str(rollout), prompts=prompts)
    if parity["log_prob"] > TOLERANCE or parity["loss"] > TOLERANCE or parity["gradient"] > TOLERANCE:
        raise RuntimeError(f"etude and TRL do not compute the same loss on the same rollout: they differ by {parity}.")
    seconds: dict[str, list[float]] = {"etude": [], "trl": []}
    for _ in range(WARM_UP + repeats):
        seconds["etude"].append(ours.ask("iterate")["seconds"])
        seconds["trl"].append(theirs.ask("iterate")["seconds"])
    bare = [sum(ours.ask("overhead")["bare"].values()) for _ in range(BARE_REPEATS)]
    return {"parity": parity, "seconds": {name: values[WARM_UP:] for name, values in seconds.items()}, "bare": bare}


def _result(runs: list[dict[str, Any]], settings: dict[str, Any]) -> Result:
    ratios = [Ratio.of(run["seconds"]["trl"], run["seconds"]["etude"]) for run in runs]
    heads = [
        Headline(f"TRL / etude, {_channels(run)}, TRL's batches {_batches(run, 'trl')}", ratio, TARGET, at_most=False)
        for run, ratio in zip(runs, ratios, strict=True)
    ]
    return Result(
        "trl",
        heads[0],
        [
            "work",
            "TRL batches (sample, train)",
            "etude batches (rollout, replay)",
            "TRL, ms",
            "etude, ms",
            "TRL / etude",
            "etude's network calls alone, ms",
            "TRL / these",
            DIFFERENCES,
        ],
        [
            [*_cells(run), str(ratio), *_bound(run), _differences(run["parity"])]
            for run, ratio in zip(runs, ratios, strict=True)
        ],
        settings={**settings, "threads": runs[0]["etude"]["threads"]},
        measurements={"runs": runs},
        versions={name: runs[0][name]["versions"] for name in ("etude", "trl")},
        further=heads[1:],
    )


def _bound(run: dict[str, Any]) -> list[str]:
    """The bound for any trainer with etude's batches: TRL's iteration over etude's network calls."""
    return [milliseconds(run["bare"]), f"{median(run['seconds']['trl']) / median(run['bare']):.2f}"]


def _cells(run: dict[str, Any]) -> list[str]:
    work, seconds = run["comparison"]["work"], run["seconds"]
    done = f"{work['images']} images x {work['num_steps']} steps, {_channels(run)}, latents {work['latent_size']}"
    batches = [_batches(run, name) for name in ("trl", "etude")]
    return [done, *batches, milliseconds(seconds["trl"]), milliseconds(seconds["etude"])]


def _channels(run: dict[str, Any]) -> str:
    return f"UNet {'-'.join(map(str, run['comparison']['work']['channels']))}"


def _batches(run: dict[str, Any], name: str) -> str:
    return "{}, {}".format(*run["comparison"][name])


def _differences(parity: dict[str, float]) -> str:
    return ", ".join(f"{parity[name]:.0e}" for name in ("log_prob", "loss", "gradient"))


def _recipe(folder: Path, pipeline: Path, comparison: Comparison, seed: int) -> str:
    """The settings of TRL's DDPOConfig as settings of etude."""
    work, (rollout, replay) = comparison.work, comparison.etude
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    guidance, clip_range = HYPER_PARAMETERS["guidance_scale"], HYPER_PARAMETERS["clip_range"]
    tree = {
        "model": str(pipeline),
        "seed": seed,
        "rewards": {"benchmarks.workload:brightness": 1.0},
        "prompts": {"train": str(prompts), "evaluation": "animals"},
        "sampling": {"kernel": "ddim", "eta": 1.0, "num_steps": work.num_steps, "guidance_scale": guidance},
        "rollout": {"images_per_iteration": work.images, "images_per_prompt": 1, "batch_size": rollout},
        "lora": {"rank": 0},
        "optimizer": {"learning_rate": HYPER_PARAMETERS["learning_rate"]},
        "objective": {"kind": "ppo", "clip_range": clip_range, "updates_per_epoch": UPDATES, "batch_size": replay},
        "advantage": {"kind": "per_prompt"},
        "evaluation": {"num_images": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return str(path)
