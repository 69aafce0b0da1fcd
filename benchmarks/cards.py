"""What the dry run tells each full-size recipe to take of a GPU, by the settings that save memory: `python -m benchmarks.cards [RECIPE ...]`.

The smallest sizes of a call (2 images sampled, 1 trained, 1 decoded at a time), two images an iteration, a reward
without a network. An outline of the model is enough: nothing is downloaded, and nothing runs on a GPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.full_size import save_outline
from benchmarks.gpu import with_settings
from benchmarks.recipe_side import short_tree
from benchmarks.recipes import FAMILIES
from etude.config import parse_config
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.training.blueprint import Blueprint
from etude.training.memory_estimate import memory_estimate

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
        model = save_outline(FAMILIES[tree["model"]], Path(folder) / "model")
        blueprint = Blueprint(parse_config({**tree, "model": str(model)}), Path(folder) / "run")
        outline = load_source(ModelSource.of(blueprint.config), outline=True)
        schedule = blueprint.schedule(outline)
        blueprint.make_trainable(outline)
        return list(memory_estimate(blueprint, outline, schedule).values())[-1]


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
