"""The directory of a finished study with made-up scores, for tests of its readers."""

from __future__ import annotations

import io
import json

import numpy as np
from PIL import Image

from etude.measuring.pairs import by_quantity, compare
from etude.study.directory import StudyDirectory
from etude.study.measurement import sampler_settings, samplers
from etude.study.study_file import parse_study

REWARDS = ("alignment", "colorfulness")
BEST = 2.0
"""Advantage of the best weights over the last, in every reward."""
TREE = {
    "name": "made up",
    "base": "emoji-ddpo",
    "overrides": {
        "iterations": 8,
        "evaluation.num_images": 8,
        "evaluation.held_out_rewards": list(REWARDS),
        "checkpoint.best": "colorfulness",
    },
    "seeds": [0, 1, 2],
    "grids": [
        {"name": "eta", "keys": {"rewards": list(REWARDS), "sampling.eta": [0.5, 1.0, 2.0]}},
        {"name": "steps", "keys": {"rewards": ["colorfulness"], "sampling.eta": [1.0], "sampling.num_steps": [20, 50]}},
    ],
    "cells": [{"rewards": "colorfulness", "sampling.kernel": "ddim", "sampling.eta": 1.1}],
    "measurement": {
        "num_images": 32,
        "matrix": {"solvers": ["heun", "dpmsolver++"], "etas": [0.5, 1.0, 2.0]},
        "shown": 3,
    },
}
SMALL = {
    "name": "small",
    "base": "emoji-ddpo",
    "overrides": {"iterations": 2, "evaluation.held_out_rewards": ["alignment", "colorfulness"]},
    "seeds": [0, 1],
    "grids": [{"keys": {"rewards": ["colorfulness"], "sampling.eta": [0.5, 1.0]}}],
    "measurement": {"num_images": 16},
}
"""Four cells that are read fast."""


def made_up(tree=TREE, gain=lambda eta: 10 * eta - 3 * eta**2, text="name: made up\n"):
    """A study, and the gain in ODE reward by training at an eta."""
    return parse_study(tree, text=text), gain


def write(study, gain, root):
    """Write a directory in which every cell is done."""
    directory = StudyDirectory(root)
    for cell in study.cells:
        _write_cell(cell, directory, gain)
    return directory


def _write_cell(cell, directory, gain):
    run, config = directory.cell(cell), cell.config
    (run / "samples").mkdir(parents=True)
    (run / "config.yaml").write_text(config.to_yaml())
    rng = np.random.default_rng([config.seed, round(10 * config.sampling.eta), config.sampling.num_steps])
    prompts = [f"prompt {i}" for i in range(16)]
    clusters = [i % 16 for i in range(cell.measurement.num_images)]
    shared = np.random.default_rng(config.seed).standard_normal(len(clusters))
    base = {r: 60 + 8 * np.sin(np.array(clusters)) + 5 * shared for r in REWARDS}
    eta, steps = config.sampling.eta, config.sampling.num_steps

    def scores(reward, at, tuned, strange=0.0):
        lift = gain(eta) if reward in config.rewards and tuned else 0.0
        return base[reward] + lift - 20 * at**2 / steps + strange + rng.standard_normal(len(clusters))

    rows = []
    for sampler in samplers(config, cell.measurement):
        settings = sampler_settings(sampler)
        at, strange = settings["eta"], 0.4 * (settings["kind"] == "solver")
        both = {
            name: {r: scores(r, at, tuned, strange).tolist() for r in REWARDS}
            for name, tuned in (("scores", True), ("base", False))
        }
        rows.append({**settings, **both})
    levels = {}
    for count in {row["steps"] for row in rows}:
        a = np.linspace(0.1, 1, count + 1)
        levels[str(count)] = {"a": a.tolist(), "s": np.sqrt(1 - a**2).tolist()}
    picture = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (8, 24, 3), dtype=np.uint8)).save(picture, format="PNG")
    (run / "samples" / "study.png").write_bytes(picture.getvalue())
    (directory.root / "base").mkdir(exist_ok=True)
    (directory.root / "base" / "b.png").write_bytes(picture.getvalue())
    best = {r: [score + BEST for score in rows[0]["scores"][r]] for r in REWARDS}
    measured = {
        "measurement": cell.measurement.model_dump(mode="json"), "seed": config.seed, "prompts": prompts, "clusters": clusters,
        "samplers": rows, "best": best, "levels": levels, "base_image": "b.png", "seconds": 3.0,
    }  # fmt: skip
    (run / "scores.json").write_text(json.dumps(measured))
    (run / "summary.json").write_text("{}")
    lines = []
    for iteration in range(config.iterations + 1):
        row = {"iteration": iteration, "seconds": {"total": 1.5}}
        if iteration % config.evaluation.every == 0:
            share = iteration / config.iterations
            ode = {r: base[r] + share * (gain(eta) if r in config.rewards else 0) for r in REWARDS}
            sde = {r: v - 20 * eta**2 / steps * (1 - share / 2) for r, v in ode.items()}
            row["evaluation"] = {"eta": eta, "num_steps": steps, **by_quantity(compare(ode, sde, base, clusters))}
        lines.append(json.dumps(row))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
