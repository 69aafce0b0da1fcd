"""Peak memory of training against the number of steps: it should grow by the trained latents and by nothing else."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.processes import BUILD, Side
from benchmarks.results import Headline, Ratio, Result

TARGET = 1.15
FLOAT_BYTES = 4
CHANNELS = [4, 8, 8]
BATCH_SIZE = 4
"""Small, as are the channels: the network's own memory should not hide that of the latents."""


def run(steps: list[int], images: int, latent_size: int, iterations: int, threads: int | None, seed: int = 0) -> Result:
    """One process for each number of steps; the slope of its peak resident memory, by least squares.

    Args:
        steps: numbers of steps, at least two.
        images: per iteration.
        latent_size: height and width of the 4-channel latents: large, so that they show beside torch's own memory.
        iterations: taken by each process before its peak is read.
    """
    if len(set(steps)) < 2:
        raise ValueError(f"a slope needs two different numbers of steps at least, not {steps}.")
    settings = {"steps": steps, "images": images, "latent_size": latent_size, "iterations": iterations, "seed": seed}
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="memory-") as folder:
        recipe = _recipe(Path(folder), images, latent_size, seed)
        peaks, trained, info = [], [], {}
        for num_steps in steps:
            overrides = [f"sampling.num_steps={num_steps}"]
            with Side(
                sys.executable,
                "benchmarks.etude_side",
                {"recipe": recipe, "overrides": overrides, "work": folder},
                threads,
            ) as side:
                info = side.info
                trained.append(info["trained_steps"])
                for _ in range(iterations):
                    side.ask("iterate")
                peaks.append(side.ask("memory")["peak_bytes"])
    latents = images * info["dimensions"] * FLOAT_BYTES
    expected = latents + images * FLOAT_BYTES
    growth = slope([float(n) for n in trained], [float(p) for p in peaks])
    return Result(
        "memory",
        Headline(
            "growth of peak memory / bytes of the trained latents", Ratio.of([growth], [expected]), TARGET, at_most=True
        ),
        ["steps", "trained steps", "peak memory, MB", "latents and log-probabilities, MB"],
        [
            *(
                [str(s), str(t), f"{p / 1e6:.1f}", f"{t * expected / 1e6:.1f}"]
                for s, t, p in zip(steps, trained, peaks, strict=True)
            ),
            ["growth per trained step", "", f"{growth / 1e6:.3f}", f"{expected / 1e6:.3f}"],
        ],
        settings=settings,
        measurements={
            "peak_bytes": peaks,
            "trained_steps": trained,
            "bytes_per_step": growth,
            "latent_bytes_per_step": latents,
        },
        versions={"etude": info["versions"]},
    )


def slope(x: list[float], y: list[float]) -> float:
    """Least squares: sum (x - mean x)(y - mean y) / sum (x - mean x)^2."""
    centre_x, centre_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - centre_x) * (b - centre_y) for a, b in zip(x, y, strict=True)) / sum((a - centre_x) ** 2 for a in x)


def _recipe(folder: Path, images: int, latent_size: int, seed: int) -> str:
    """Saves a pipeline and a recipe; batches stay the same whatever the number of steps."""
    pipeline = folder / "pipeline"
    build = {"directory": str(pipeline), "channels": CHANNELS, "latent_size": latent_size, "seed": seed}
    with Side(sys.executable, "benchmarks.pipeline_side", build):
        pass
    tree = {
        "model": str(pipeline),
        "seed": seed,
        "rewards": {"benchmarks.workload:brightness": 1.0},
        "prompts": {"train": "animals", "evaluation": "animals"},
        "sampling": {"kernel": "gddim", "eta": 1.2, "guidance_scale": 5.0},
        "rollout": {"images_per_iteration": images, "images_per_prompt": 1, "batch_size": min(BATCH_SIZE, images)},
        "objective": {"updates_per_epoch": 1, "batch_size": min(BATCH_SIZE, images)},
        "evaluation": {"num_images": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return str(path)
