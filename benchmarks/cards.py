"""Memory of each full-size recipe by the dry run, under the settings that save it: `python -m benchmarks.cards [RECIPE ...]`.

The smallest sizes of a call (2 images sampled, 1 trained, 1 decoded at a time), two images an iteration, a reward
without a network. An outline of the model is enough: nothing is downloaded, and nothing runs on a GPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu import with_settings
from benchmarks.gpu_side import told_bytes
from benchmarks.recipe_side import short_tree
from benchmarks.recipes import FAMILIES

RECIPES = (
    "sd15-ddpo",
    "sdxl-ddpo",
    "sd35-flow-grpo",
    "flux-mixgrpo",
    "flux2-klein-mixgrpo",
    "z-image-mixgrpo",
    "qwen-image-mixgrpo",
)
"""One recipe for each model."""
CHECKPOINTING, OFFLOAD = {"memory.gradient_checkpointing": True}, {"memory.offload": True}
SAVINGS: dict[str, dict[str, Any]] = {
    "as it is": {"memory.gradient_checkpointing": False, "memory.offload": False},
    "autocast: false": {"memory.gradient_checkpointing": False, "memory.offload": False, "autocast": False},
    "gradient_checkpointing": {**CHECKPOINTING, "memory.offload": False},
    "gradient_checkpointing, offload": {**CHECKPOINTING, **OFFLOAD},
}


def estimate(recipe: str, settings: dict[str, Any]) -> int:
    """Bytes in all that the dry run tells."""
    tree = with_settings(short_tree(recipe, tiny=False), settings)
    with tempfile.TemporaryDirectory(prefix="cards-") as folder:
        return told_bytes(tree, FAMILIES[tree["model"]], Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cards", description=__doc__)
    parser.add_argument("recipes", nargs="*", default=RECIPES, help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, help="JSON file of the bytes")
    options = parser.parse_args()
    found: dict[str, dict[str, int]] = {}
    print(f"| recipe | {' | '.join(SAVINGS)} |\n|{' --- |' * (1 + len(SAVINGS))}", flush=True)
    for recipe in options.recipes:
        found[recipe] = {name: estimate(recipe, settings) for name, settings in SAVINGS.items()}
        print(
            f"| `{recipe}` | {' | '.join(f'{size / 2**30:.1f} GiB' for size in found[recipe].values())} |", flush=True
        )
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
