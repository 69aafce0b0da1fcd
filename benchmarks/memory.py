"""Peak memory of training against steps, images and parameters, beside what must be kept."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fit import line
from benchmarks.processes import BUILD, Side
from benchmarks.results import Headline, Ratio, Result

TARGET = 1.15
FLOAT_BYTES = 4
ADAM_FLOATS = 4
"""Number of floats: the parameter, its gradient and two moments."""
CHANNELS = (4, 8, 8)
BATCH_SIZE = 4
"""Small batches (and channels), so that the network's memory does not hide that of the latents."""
ONE_ROW = {"rank": 0, "images": 2, "batch": 1, "guidance": 1.0, "latent_size": 8}
"""Full fine-tuning with calls of one row and no guidance, so that activations do not hide parameters."""
ITERATIONS = 2


@dataclass(frozen=True)
class Sweep:
    """A sweep over one quantity, all else equal.

    Attributes:
        name: name of the quantity.
        points: settings of each process.
        count: function from a process's report to its amount of the quantity.
        expected: bytes that one more unit must take.
    """

    name: str
    points: list[dict[str, Any]]
    count: Callable[[dict[str, Any]], float]
    expected: Callable[[dict[str, Any]], float]


def run(
    steps: list[int], images: list[int], channels: list[int], latent_size: int, threads: int | None, seed: int = 0
) -> Result:
    """Runs a process for each point of three sweeps and fits slopes to their peak resident memories.

    Args:
        steps: numbers of steps, at least two, at the second number of images.
        images: numbers of images per iteration, at 10 steps.
        channels: channels of a UNet that is trained as a whole, on few images; its parameters grow
            with their square.
        latent_size: height and width of the 4-channel latents, large enough to show beside torch's
            own memory.
    """
    sweeps = [
        Sweep(
            "trained step",
            [{"steps": n, "images": images[1]} for n in steps],
            lambda info: info["trained_steps"],
            lambda info: info["images"] * FLOAT_BYTES * (info["dimensions"] + 1),
        ),
        Sweep(
            "image", [{"images": n} for n in images], lambda info: info["images"], lambda info: info["bytes_per_image"]
        ),
        Sweep(
            "trained parameter",
            [{"channels": (width, 2 * width), **ONE_ROW} for width in channels],
            lambda info: info["parameters"],
            lambda info: ADAM_FLOATS * FLOAT_BYTES,
        ),
    ]
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="memory-") as folder:
        found = {
            sweep.name: [
                _peak(Path(folder), {"latent_size": latent_size, **point}, threads, seed) for point in sweep.points
            ]
            for sweep in sweeps
        }
    return _result(sweeps, found, {"latent_size": latent_size, "iterations": ITERATIONS, "seed": seed})


def _peak(folder: Path, point: dict[str, Any], threads: int | None, seed: int) -> dict[str, Any]:
    """The report of a process after its iterations, with its peak memory."""
    settings = {"recipe": _recipe(folder, point, seed), "overrides": [], "work": str(folder)}
    with Side(sys.executable, "benchmarks.etude_side", settings, threads) as side:
        for _ in range(ITERATIONS):
            side.ask("iterate")
        return {**side.info, **side.ask("memory")}


def _result(sweeps: list[Sweep], found: dict[str, list[dict[str, Any]]], settings: dict[str, Any]) -> Result:
    heads, rows = [], []
    for sweep in sweeps:
        infos = found[sweep.name]
        counts, peaks = [float(sweep.count(info)) for info in infos], [float(info["peak_bytes"]) for info in infos]
        expected, grown = sweep.expected(infos[0]), line(counts, peaks)
        heads.append(
            Headline(
                f"growth of peak memory per {sweep.name} / the bytes it must take",
                Ratio.of([grown.slope], [expected]),
                TARGET,
            )
        )
        rows += [
            [f"{sweep.name}s: {count:,.0f}", f"{peak / 1e6:.1f}", f"{count * expected / 1e6:.1f}"]
            for count, peak in zip(counts, peaks, strict=True)
        ]
        rows.append([f"growth per {sweep.name}, bytes", f"{grown.slope:,.1f}", f"{expected:,.1f}"])
    return Result(
        "memory",
        heads[0],
        ["sweep", "peak memory, MB", "of which it must take, MB"],
        rows,
        settings=settings,
        measurements={"sweeps": found},
        versions={"etude": found[sweeps[0].name][0]["versions"]},
        further=heads[1:],
    )


def _recipe(folder: Path, point: dict[str, Any], seed: int) -> str:
    """Saves a pipeline and a recipe. Batches do not depend on the numbers of steps and images."""
    channels, size, images = point.get("channels", CHANNELS), point["latent_size"], point["images"]
    batch = point.get("batch", BATCH_SIZE)
    pipeline = folder / f"pipeline-{'-'.join(map(str, channels))}-{size}"
    if not pipeline.is_dir():
        # Only the trained network grows with the channels.
        same = {"vae_channels": CHANNELS[:2], "latent_size": size, "seed": seed}
        build = {"directory": str(pipeline), "channels": list(channels), **same}
        with Side(sys.executable, "benchmarks.pipeline_side", build):
            pass
    tree = {
        "model": str(pipeline),
        "seed": seed,
        "rewards": {"benchmarks.workload:brightness": 1.0},
        "prompts": {"train": "animals", "evaluation": "animals"},
        "sampling": {
            "kernel": "gddim",
            "eta": 1.2,
            "guidance_scale": point.get("guidance", 5.0),
            "num_steps": point.get("steps", 10),
        },
        "rollout": {"images_per_iteration": images, "images_per_prompt": 1, "batch_size": batch},
        "lora": {"rank": point.get("rank", 4)},
        "objective": {"updates_per_epoch": 1, "batch_size": batch},
        "evaluation": {"num_images": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return str(path)
