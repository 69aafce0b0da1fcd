"""Measures an embedded model and writes its card: `python -m tools.zoo.card DIR --grid GRID.png`.

The card is two files in the model's directory DIR: `card.json`, which `etude models` prints, and
`README.md`, for readers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline
from torch import Tensor

from etude.measuring.statistics import estimate_mean
from etude.policies import load_policy
from etude.prompts import load_prompts
from etude.report.grids import image_grid
from etude.rewards import get
from etude.sampling.sampler import ODE
from tools.zoo.emoji_data import EmojiSet, load_emoji

NUM_STEPS, GUIDANCE_SCALE, PER_PROMPT = 20, 4.0, 4
DATA = [
    {"package": "emoji-datasource-google 16.0.0", "art": "Noto Emoji, Google", "licence": "Apache-2.0 / OFL-1.1"},
    {"package": "emoji-datasource-twitter 16.0.0", "art": "Twemoji, Twitter and contributors", "licence": "CC-BY-4.0"},
    {"package": "@lobehub/fluent-emoji-3d 1.1.0", "art": "Fluent Emoji, Microsoft", "licence": "MIT"},
    {"package": "emojibase-data 17.0.0", "art": "names and keywords", "licence": "MIT"},
]


def alignment_quality(model: Path, data: EmojiSet, prompts: list[str]) -> dict[str, Any]:
    """Alignment of generated and of real pictures with their prompts, and with other prompts
    (chance).
    """
    captions = [prompt for prompt in prompts for _ in range(PER_PROMPT)]
    generated = ODE(NUM_STEPS, GUIDANCE_SCALE).draw(load_policy(model), captions)
    rows = [np.flatnonzero(data.emoji == data.names.index(prompt)) for prompt in prompts]
    real = torch.from_numpy(data.images[np.concatenate(rows)])
    real_captions = [prompt for prompt, pictures in zip(prompts, rows, strict=True) for _ in pictures]
    scores = {
        "generated": _score(generated, captions),
        "real": _score(real, real_captions),
        "chance": _score(generated, captions[len(captions) // 2 :] + captions[: len(captions) // 2]),
    }
    means = {name: estimate["mean"] for name, estimate in scores.items()}
    share = (means["generated"] - means["chance"]) / (means["real"] - means["chance"])
    return {**scores, "share_of_real_above_chance": share, "prompts": len(prompts), "images_per_prompt": PER_PROMPT}


def _score(images: Tensor, captions: list[str]) -> dict[str, Any]:
    clusters = [captions.index(caption) for caption in captions]
    return estimate_mean(get("alignment")(images, captions).double().numpy(), clusters).to_dict()


def write_card(model: Path, quality: dict[str, Any]) -> dict[str, Any]:
    """Writes the figures of training and quality to `card.json` and `README.md`."""
    autoencoder, denoiser = (
        json.loads((model / "figures" / f"{stage}.json").read_text(encoding="utf-8"))
        for stage in ("autoencoder", "denoiser")
    )
    pipeline = DiffusionPipeline.from_pretrained(model, use_safetensors=True)
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    card = {
        "name": model.name,
        "class": type(pipeline).__name__,
        "images": "64 x 64 emoji; prompts are their English names, optionally with a style: noto, twemoji, 3d",
        "parameters": sizes,
        "licence": "Apache-2.0 for the weights; Twemoji, a part of the training art, asks for credit (CC-BY-4.0)",
        "data": DATA,
        "autoencoder": autoencoder,
        "denoiser": denoiser,
        "alignment": quality,
        "sampler": f"ODE, {NUM_STEPS} steps, guidance {GUIDANCE_SCALE:g}",
    }
    (model / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (model / "README.md").write_text(_readme(card), encoding="utf-8")
    return card


def _readme(card: dict[str, Any]) -> str:
    data = "\n".join(f"| {d['package']} | {d['art']} | {d['licence']} |" for d in card["data"])
    quality, autoencoder, denoiser = card["alignment"], card["autoencoder"], card["denoiser"]
    scores = "\n".join(
        f"| {name} | {quality[name]['mean']:.1f} [{quality[name]['low']:.1f}, {quality[name]['high']:.1f}] |"
        for name in ("generated", "real", "chance")
    )
    legs = denoiser.get("legs", [denoiser])
    distilled = sum(leg.get("stages", {}).get("guidance distillation", {}).get("steps", 0) for leg in legs)
    stages = f", {distilled} of them distilling the guidance" if distilled else ""
    batch_sizes = {stage.get("batch_size", 64) for leg in legs for stage in leg.get("stages", {"": leg}).values()}
    devices = {stage.get("device", "CPU") for leg in legs for stage in leg.get("stages", {"": leg}).values()}
    sizes = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in card["parameters"].items())
    return f"""---
license: apache-2.0
library_name: diffusers
tags: [text-to-image]
---

# {card["name"]}

A {card["class"]} that draws {card["images"]}. Small enough for a laptop, trained from nothing on real art: {sizes}.

| data | art | licence |
| --- | --- | --- |
{data}

{card["licence"]}. The art itself is not part of this checkpoint.

<!-- --8<-- [start:figures] -->
Autoencoder: {autoencoder["steps"]} steps, {autoencoder["seconds"]} s, final loss {autoencoder["final_loss"]:.4f};
{autoencoder["psnr_held_out_db"]:.2f} dB PSNR on {autoencoder["held_out_pictures"]} pictures of emoji not seen in training.
Denoiser: {denoiser["steps"]} steps of {" or ".join(map(str, sorted(batch_sizes)))} pictures{stages}, {denoiser["seconds"]} s
({" and ".join(sorted(devices))}) on {denoiser["pictures"]} pictures, final loss {denoiser["final_loss"]:.4f}.

Alignment (the embedded reward) of {quality["prompts"]} common prompts, {quality["images_per_prompt"]} images each, {card["sampler"]},
with 95 % intervals; `chance` pairs the generated images with other prompts:

| images | alignment |
| --- | --- |
{scores}

Generated images reach {100 * quality["share_of_real_above_chance"]:.0f} % of what real ones score above chance.
<!-- --8<-- [end:figures] -->

Made by `python -m tools.zoo.pretrain {card["name"]}`, measured by `python -m tools.zoo.card`.
"""


def main(
    model: Annotated[Path, typer.Argument(help="Directory that `python -m tools.zoo.pretrain` wrote.")],
    grid: Annotated[Path, typer.Option(help="File for the picture grid of 40 prompts.")],
    cache: Annotated[Path, typer.Option(help="Directory of the emoji packages.")] = Path("build/emoji-data"),
) -> None:
    """Measure a model, and write its card and picture grid."""
    prompts = load_prompts("emoji-40").texts
    quality = alignment_quality(model, load_emoji(cache), prompts)
    write_card(model, quality)
    images = ODE(NUM_STEPS, GUIDANCE_SCALE).draw(load_policy(model), prompts)
    image_grid(images, columns=8, scale=2, labels=prompts).save(grid)
    print(json.dumps(quality, indent=2))


if __name__ == "__main__":
    typer.run(main)
