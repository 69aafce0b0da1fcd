"""Trains the embedded models from nothing: `python -m etude.zoo.pretrain --out build/emoji-sd`.

Stages, each skipped when its result is already in the output directory: the data is fetched, the autoencoder trained, the
latents cached, the denoiser trained, the pipeline put together. About 90 minutes on two cores.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline

from etude.zoo.autoencoder import AutoencoderRecipe, encode, train_autoencoder
from etude.zoo.denoiser import DenoiserRecipe, stable_diffusion_scheduler, train_denoiser
from etude.zoo.emoji_data import EmojiSet, load_emoji
from etude.zoo.text import train_tokenizer


def pretrain_emoji_sd(
    out: Path,
    cache: Path,
    autoencoder_recipe: AutoencoderRecipe,
    denoiser_recipe: DenoiserRecipe,
    initial: Path | None = None,
) -> None:
    """Writes a StableDiffusionPipeline directory into `out`, and the figures of each stage into `out/figures`.

    `initial` is an earlier result to go on from: its denoiser, text encoder and tokenizer.
    """
    data = load_emoji(cache)
    vae = _autoencoder(out, data, autoencoder_recipe)
    latents = encode(vae, data.images) * vae.config.scaling_factor
    tokenizer, start = train_tokenizer(data), None
    if initial is not None:
        earlier = StableDiffusionPipeline.from_pretrained(initial, safety_checker=None)
        tokenizer, start = earlier.tokenizer, (earlier.unet, earlier.text_encoder)

    def save(step: int, unet: Any, text_encoder: Any) -> None:
        """Half precision on disk, which halves the package; diffusers loads it as fp32. The text encoder stays fp32."""
        pipeline = StableDiffusionPipeline(
            vae=copy.deepcopy(vae).half(),
            unet=copy.deepcopy(unet).half(),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=stable_diffusion_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(out)

    unet, text_encoder, figures = train_denoiser(latents, data, tokenizer, denoiser_recipe, save, initial=start)
    save(figures["steps"], unet, text_encoder)
    _write(out / "figures" / "denoiser.json", with_history(figures, initial))


def with_history(figures: dict[str, Any], initial: Path | None) -> dict[str, Any]:
    """The figures of a denoiser that went on from an earlier one: steps and seconds of all legs together, and each leg."""
    if initial is None:
        return figures
    earlier = json.loads((initial / "figures" / "denoiser.json").read_text(encoding="utf-8"))
    legs = [*earlier.get("legs", [earlier]), figures]
    return {
        **figures,
        "steps": sum(leg["steps"] for leg in legs),
        "seconds": sum(leg["seconds"] for leg in legs),
        "legs": legs,
    }


def _autoencoder(out: Path, data: EmojiSet, recipe: AutoencoderRecipe) -> AutoencoderKL:
    done = out / "figures" / "autoencoder.json"
    if not done.exists():
        vae, figures = train_autoencoder(data.images, data.held_out(recipe.held_out, recipe.seed), recipe)
        vae.save_pretrained(out / "vae")
        _write(done, figures)
    return AutoencoderKL.from_pretrained(out / "vae").eval()


def _write(path: Path, figures: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")


def main(
    out: Annotated[
        Path,
        typer.Option(help="Where the pipeline directory is written; a finished stage found there is not repeated."),
    ],
    cache: Annotated[Path, typer.Option(help="Where the emoji packages are kept (155 MB).")] = Path("build/emoji-data"),
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
    denoiser_steps: Annotated[int, typer.Option(help="Optimiser steps of the denoiser.", min=1)] = DenoiserRecipe.steps,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of the denoiser.")] = DenoiserRecipe.learning_rate,
    autoencoder_steps: Annotated[
        int, typer.Option(help="Optimiser steps of the autoencoder.", min=1)
    ] = AutoencoderRecipe.steps,
    initial: Annotated[Path | None, typer.Option(help="Go on from the denoiser of this earlier result.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the denoiser's training.", min=0)] = DenoiserRecipe.seed,
) -> None:
    """Trains `emoji-sd` from scratch: fetches the emoji, trains the autoencoder, the text encoder and the denoiser."""
    torch.set_num_threads(threads)
    np.seterr(all="raise", under="ignore")
    denoiser = DenoiserRecipe(steps=denoiser_steps, learning_rate=learning_rate, seed=seed)
    pretrain_emoji_sd(out, cache, AutoencoderRecipe(steps=autoencoder_steps), denoiser, initial)


if __name__ == "__main__":
    typer.run(main)
