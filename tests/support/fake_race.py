"""A race whose runs are made up: the improvement of each grows evenly with what it has spent."""

from __future__ import annotations

import json

import numpy as np

from etude.measuring.pairs import by_quantity, compare
from etude.race.entries import Entries
from etude.race.race_file import parse_race
from etude.study.measurement import sampler_settings, samplers

IMAGES, PROMPTS = 32, 16
TEXT = """
name: made up
base: emoji-mixgrpo
overrides:
  sampling.num_steps: 4
  rollout.images_per_iteration: 4
  rollout.images_per_prompt: 2
  objective.kl_coef: 0.0
  evaluation.held_out_rewards: [alignment, colorfulness]
budget: 400
evaluations: 2
seeds: [0, 1, 2]
num_images: 32
baseline: slow
pilots: {budget: 100, seed: 9, num_images: 32, largest_fall: {alignment: 5}}
x-rates: &rates {optimizer.learning_rate: [0.001, 0.002]}
methods:
  slow: {group: windows, overrides: {sampling.window.size: 2}, pilots: *rates}
  fast: {group: windows, overrides: {sampling.window.size: 2, sampling.eta: 0.5}, pilots: *rates}
  NFT: {base: emoji-flux-nft, pilots: *rates}
heats:
  - {rewards: colorfulness, targets: [5, 10, 40]}
  - {rewards: alignment, targets: [1], methods: [slow, NFT]}
"""


def entries(text=TEXT):
    return Entries(parse_race(text))


def write(entries, directory, gains, noise=0.0):
    """Write every run as done. A pilot's gain is that of its method, and the second pilot has twice as much."""
    for entry in entries.all:
        gain = gains[entry.method]
        for number, cell in enumerate(entry.pilots, start=1):
            write_run(entries, cell, directory, number * gain, noise)
        for planned in entry.cells:
            write_run(entries, entries.settle(planned, directory), directory, gain, noise)


def write_run(entries, cell, directory, gain, noise=0.0, fall=1.0, scale=400):
    """Write one run whose trained reward rises by `gain` in `scale` evaluations; the held-out one falls by `fall`."""
    run, config = directory.cell(cell), cell.config
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config.to_yaml())
    (run / "summary.json").write_text("{}")
    rng = np.random.default_rng([config.seed, *map(ord, cell.slug)])
    clusters = [i % PROMPTS for i in range(IMAGES)]
    names = [*config.rewards, *config.evaluation.held_out_rewards]
    base = {name: 50 + 5 * np.random.default_rng(config.seed).standard_normal(IMAGES) for name in names}
    spread = noise * rng.standard_normal(IMAGES)

    def ode(share):
        return {n: v + share * ((gain if n in config.rewards else -fall) + spread) for n, v in base.items()}

    spent, lines = entries.counter.spent(config), []
    for iteration in range(config.iterations + 1):
        row = {"iteration": iteration, "seconds": {"rollout": 1.0, "evaluation": 7.0, "total": 8.0}}
        row |= {"memory_mb": 1.0}
        if iteration % config.evaluation.every == 0 or iteration == config.iterations:
            found = ode(spent[iteration] / scale)
            sde = {name: values + 3 for name, values in found.items()}
            row["evaluation"] = {"eta": 1.0, "num_steps": 4, **by_quantity(compare(found, sde, base, clusters))}
            if config.evaluation.image_scores:
                sides = {"ode": found, "sde": sde, "base": base}
                row["scores"] = {k: {n: v.tolist() for n, v in s.items()} for k, s in sides.items()}
                row["scores"]["clusters"] = clusters
        lines.append(json.dumps(row))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if not cell.measured:
        return
    rows, end = [], ode(spent[-1] / scale)
    for sampler in samplers(config, cell.measurement):
        settings = sampler_settings(sampler)
        gap = {"ode": 0.0, "sde": 3.0}[settings["kind"]]
        sides = {"scores": end, "base": base}
        rows.append(settings | {k: {n: (v + gap).tolist() for n, v in s.items()} for k, s in sides.items()})
    measured = {
        "measurement": cell.measurement.model_dump(mode="json"), "seed": config.seed, "prompts": [f"p{i}" for i in range(PROMPTS)],
        "clusters": clusters, "samplers": rows, "best": None, "levels": {}, "base_image": None, "seconds": 3.0,
    }  # fmt: skip
    (run / "scores.json").write_text(json.dumps(measured))
