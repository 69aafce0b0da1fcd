"""The same DDPO iteration by etude and by TRL's DDPOTrainer, each in its own environment, one after the other."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.processes import BUILD, Side
from benchmarks.prompts import PROMPTS
from benchmarks.results import Headline, Ratio, Result, milliseconds

TARGET = 2.0
WARM_UP = 2
TOLERANCE = 1e-3
REQUIREMENTS = Path(__file__).resolve().parent / "trl-requirements.txt"
HYPER_PARAMETERS = {"guidance_scale": 5.0, "learning_rate": 1e-5, "clip_range": 1e-4}


def run(
    images: int,
    num_steps: int,
    channels: tuple[int, int],
    latent_size: int,
    trl_batches: list[tuple[int, int]],
    etude_batches: tuple[int, int],
    repeats: int,
    threads: int | None,
    seed: int = 0,
    environment: Path | None = None,
) -> Result:
    """Alternates an iteration of etude with one of TRL, for each of TRL's batch sizes.

    Args:
        images: per iteration; both take two optimiser steps on them.
        num_steps: of the sampler, all of them trained.
        channels: of the UNet's levels, with latents of `latent_size`.
        trl_batches: (sample_batch_size, train_batch_size); the headline is against the fastest.
        etude_batches: (rollout.batch_size, objective.batch_size).
        repeats: pairs, after two that are thrown away (TRL writes no checkpoint in its first iteration).
        environment: TRL's virtual environment; default: one under build/, made when it is missing.
    """
    python = (environment or peer_environment()) / "bin" / "python"
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="trl-") as folder:
        work = Path(folder)
        pipeline = work / "pipeline"
        build = {"directory": str(pipeline), "channels": list(channels), "latent_size": latent_size, "seed": seed}
        with Side(sys.executable, "benchmarks.pipeline_side", build):
            pass
        etude = {"recipe": _recipe(work, pipeline, images, num_steps, etude_batches, seed), "overrides": [], "work": folder}
        peer = {"pipeline": str(pipeline), "work": folder, "images": images, "num_steps": num_steps, "updates": 2, "seed": seed}
        runs = []
        for sample, train in trl_batches:
            settings = {**peer, **HYPER_PARAMETERS, "sample_batch_size": sample, "train_batch_size": train}
            with Side(sys.executable, "benchmarks.etude_side", etude, threads) as ours, Side(python, "benchmarks.trl_side", settings, threads) as theirs:
                runs.append({"batches": [sample, train], **_alternate(ours, theirs, work, repeats)})
                infos = {"etude": ours.info, "trl": theirs.info}
    return _result(runs, infos, {**build, **peer, **HYPER_PARAMETERS, "etude_batches": list(etude_batches), "repeats": repeats})


def peer_environment() -> Path:
    """TRL's virtual environment, built when the requirements have changed since it was last built."""
    directory, text = BUILD / "trl-venv", REQUIREMENTS.read_bytes()
    stamp, digest = directory / ".installed", hashlib.sha256(text).hexdigest()
    if not stamp.is_file() or stamp.read_text() != digest:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
        command = [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, "--requirement", str(REQUIREMENTS)], check=True)
        stamp.write_text(digest)
    return directory


def _alternate(ours: Side, theirs: Side, work: Path, repeats: int) -> dict[str, Any]:
    """Checks that both compute the same, then takes turns."""
    if ours.info["parameters"] != theirs.info["parameters"]:
        raise RuntimeError(f"etude trains {ours.info['parameters']} parameters and TRL {theirs.info['parameters']}: not the same work.")
    rollout = work / "rollout.safetensors"
    prompts = theirs.ask("parity", path=str(rollout))["prompts"]
    parity = ours.ask("parity", path=str(rollout), prompts=prompts)
    if parity["log_prob"] > TOLERANCE or parity["loss"] > TOLERANCE or parity["gradient"] > TOLERANCE:
        raise RuntimeError(f"etude and TRL do not compute the same loss on the same rollout: they differ by {parity}.")
    seconds: dict[str, list[float]] = {"etude": [], "trl": []}
    for _ in range(WARM_UP + repeats):
        seconds["etude"].append(ours.ask("iterate")["seconds"])
        seconds["trl"].append(theirs.ask("iterate")["seconds"])
    return {"parity": parity, "seconds": {name: values[WARM_UP:] for name, values in seconds.items()}}


def _result(runs: list[dict[str, Any]], infos: dict[str, Any], settings: dict[str, Any]) -> Result:
    ratios = [Ratio.of(run["seconds"]["trl"], run["seconds"]["etude"]) for run in runs]
    closest = min(ratios, key=lambda ratio: ratio.median)
    ours = "{} / {}".format(*settings["etude_batches"])
    return Result(
        "trl",
        Headline("TRL / etude, time of an iteration, TRL at its fastest batch sizes", closest, TARGET, at_most=False),
        ["TRL batches (sample / train)", "etude batches", "TRL, ms", "etude, ms", "TRL / etude", "differences: log-prob, loss, gradient"],
        [
            [
                "{} / {}".format(*run["batches"]),
                ours,
                milliseconds(run["seconds"]["trl"]),
                milliseconds(run["seconds"]["etude"]),
                str(ratio),
                ", ".join(f"{run['parity'][name]:.1e}" for name in ("log_prob", "loss", "gradient")),
            ]
            for run, ratio in zip(runs, ratios, strict=True)
        ],
        settings={**settings, "threads": infos["etude"]["threads"], "parameters": infos["etude"]["parameters"]},
        measurements={"runs": runs},
        versions={name: info["versions"] for name, info in infos.items()},
    )


def _recipe(work: Path, pipeline: Path, images: int, num_steps: int, batches: tuple[int, int], seed: int) -> str:
    """What TRL's DDPOConfig says, in etude's words."""
    prompts = work / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    tree = {
        "model": str(pipeline),
        "seed": seed,
        "rewards": {"benchmarks.workload:brightness": 1.0},
        "prompts": {"train": str(prompts), "evaluation": "animals"},
        "sampling": {"kernel": "ddim", "eta": 1.0, "num_steps": num_steps, "guidance_scale": HYPER_PARAMETERS["guidance_scale"]},
        "rollout": {"images_per_iteration": images, "images_per_prompt": 1, "batch_size": batches[0]},
        "lora": {"rank": 0},
        "optimizer": {"learning_rate": HYPER_PARAMETERS["learning_rate"]},
        "objective": {"kind": "ppo", "clip_range": HYPER_PARAMETERS["clip_range"], "updates_per_epoch": 2, "batch_size": batches[1]},
        "advantage": {"kind": "per_prompt"},
        "evaluation": {"num_images": 2},
    }
    path = work / "recipe.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return str(path)
