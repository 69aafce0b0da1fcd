"""Every full-size recipe at its real sizes with random weights: `python -m benchmarks.recipes OUT.json [--tiny] [RECIPE ...]`.

Two iterations of two images at the smallest sizes of a call: whether it runs, what memory it takes
beside the dry run's estimate, and whether the plain pipeline loads the export. Several at a time, as
far as their weights fit.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size import MODELS, networks
from benchmarks.processes import Side
from etude.config import load_config
from etude.config.tree import recipe_names

FAMILIES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd35",
    "black-forest-labs/FLUX.1-dev": "flux",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2-klein",
    "Tongyi-MAI/Z-Image": "z-image",
    "Qwen/Qwen-Image": "qwen-image",
}
"""The architecture in `full_size.MODELS` of each model that a recipe names."""
ACTIVATIONS = 10 * 2**30
"""Bytes counted for a process beside its weights."""
LIMIT = 150.0


class Room:
    """Memory that processes take and give back."""

    def __init__(self, size: float) -> None:
        self.size, self.left, self.changed = size, size, threading.Condition()

    def take(self, size: float) -> float:
        """Waits until so much is free, or all of it where there is not so much; returns what was taken."""
        size = min(size, self.size)
        with self.changed:
            self.changed.wait_for(lambda: self.left >= size)
            self.left -= size
        return size

    def give(self, size: float) -> None:
        with self.changed:
            self.left += size
            self.changed.notify_all()


def weight_bytes(model: str) -> int:
    """Bytes of a model's weights in half precision."""
    with torch.device("meta"):
        pipeline = MODELS[model](False)
    return 2 * sum(p.numel() for _, network in networks(pipeline) for p in network.parameters())


def run(recipes: list[str], tiny: bool, room: Room, together: int, out: Path, limit: float) -> dict[str, Any]:
    """Runs the recipes; the reports so far are in `out` after each."""
    reports: dict[str, Any] = {}
    writing = threading.Lock()

    def one(recipe: str) -> None:
        model = FAMILIES[load_config(recipe).model]
        taken = room.take(0 if tiny else weight_bytes(model) + ACTIVATIONS)
        started = time.perf_counter()
        try:
            settings = {"recipe": recipe, "model": model, "tiny": tiny}
            with Side(sys.executable, "benchmarks.recipe_side", settings, cpu=False, wait=False) as side:
                side.receive(limit)
                side.send("measure")
                report = side.receive(limit)
        except (RuntimeError, TimeoutError) as error:
            report = {"failed": str(error)}
        room.give(taken)
        with writing:
            reports[recipe] = {**report, "wall_seconds": time.perf_counter() - started}
            out.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
            print(_line(recipe, report), flush=True)

    with ThreadPoolExecutor(together) as pool:
        list(pool.map(one, recipes))
    return reports


def _line(recipe: str, report: dict[str, Any]) -> str:
    if "failed" in report:
        return f"{recipe}: failed: {report['failed'].splitlines()[-1]}"
    peak, estimate = (report[f"{name}_bytes"] / 2**30 for name in ("peak", "estimated"))
    reloaded = "loads in the plain pipeline" if report["reloaded"] else "DIFFERS in the plain pipeline"
    return f"{recipe}: peak {peak:.1f} GiB, estimate {estimate:.1f}, export {reloaded}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument("out", type=Path)
    known = [name for name in recipe_names() if load_config(name).model in FAMILIES]
    parser.add_argument("recipes", nargs="*", help=f"default: {', '.join(known)}")
    parser.add_argument("--tiny", action="store_true", help="very small models, to try it out, also on a CPU")
    parser.add_argument("--memory", type=float, default=70, help="GiB that the processes share (default: 70)")
    parser.add_argument("--together", type=int, default=4, help="processes at a time (default: 4)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of each process (default: %(default)g)")
    options = parser.parse_args()
    recipes = [name for name in options.recipes or known if FAMILIES[load_config(name).model] in MODELS]
    run(recipes, options.tiny, Room(options.memory * 2**30), options.together, options.out, options.limit)


if __name__ == "__main__":
    main()
