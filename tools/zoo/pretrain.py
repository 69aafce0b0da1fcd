"""Trains an embedded model from nothing: `python -m tools.zoo.pretrain emoji-sd --out
build/emoji-sd`.

The stages: fetch the data, train the autoencoder (or take it over from another model), cache the
latents, train the denoiser, assemble the pipeline. A stage is skipped if its result is already in
the output directory.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from torch import Tensor

from etude import zoo
from tools.zoo.autoencoder import AutoencoderRecipe, encode, train_autoencoder
from tools.zoo.emoji_data import EmojiSet, load_emoji
from tools.zoo.flux import DISTILLATION, MATCHING, FluxNetworks, FluxRecipe, train_flux
from tools.zoo.training import OnCheckpoint, TrainingRecipe
from tools.zoo.unet import UNetNetworks, train_unet

Train = Callable[[Tensor, EmojiSet, Any, OnCheckpoint], tuple[Any, dict[str, Any]]]


def pretrain(
    networks_class: type[UNetNetworks] | type[FluxNetworks],
    train: Train,
    out: Path,
    cache: Path,
    autoencoder: AutoencoderRecipe | Path,
    initial: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Writes a pipeline directory into `out`, and the figures of each stage into `out/figures`.

    Args:
        networks_class: class of the networks to train.
        train: trains the networks on scaled latents; returns the averaged networks and the figures.
        out: directory of the pipeline.
        cache: directory of the emoji packages.
        autoencoder: settings of the autoencoder's training, or the directory of a model whose
            autoencoder is taken over.
        initial: an earlier result whose networks and tokenizers the training starts from. Default:
            random weights.
        seed: seed of the random weights.
        device: device of the training, cpu or cuda.
    """
    data = load_emoji(cache)
    vae = _autoencoder(out, data, autoencoder, device)
    latents = (encode(vae.to(device), data.images) - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    vae.cpu()
    torch.manual_seed(seed)
    start: Any = networks_class.build(data) if initial is None else networks_class.load(initial)

    def save(networks: Any) -> None:
        copy.deepcopy(networks).cpu().pipeline(vae).save_pretrained(out)
        for config in out.glob("*/config.json"):
            _forget_origin(config)

    networks, figures = train(latents, data, start.to(device), save)
    save(networks)
    _write(out / "figures" / "denoiser.json", with_history(figures, initial))


def with_history(figures: dict[str, Any], initial: Path | None) -> dict[str, Any]:
    """The figures of a denoiser, with those of the earlier result that it started from.

    Steps and seconds are the sums over all legs; `legs` has the figures of each.
    """
    if initial is None:
        return figures
    earlier = json.loads((initial / "figures" / "denoiser.json").read_text(encoding="utf-8"))
    legs = [*earlier.get("legs", [earlier]), figures]
    totals = {key: sum(leg[key] for leg in legs) for key in ("steps", "seconds")}
    return {**figures, **totals, "legs": legs}


def _autoencoder(out: Path, data: EmojiSet, source: AutoencoderRecipe | Path, device: str) -> AutoencoderKL:
    done = out / "figures" / "autoencoder.json"
    if not done.exists():
        if isinstance(source, Path):
            vae = AutoencoderKL.from_pretrained(source / "vae", use_safetensors=True).eval()
            vae.register_to_config(shift_factor=float(encode(vae, data.images).mean()))
            figures = json.loads((source / "figures" / "autoencoder.json").read_text(encoding="utf-8"))
        else:
            vae, figures = train_autoencoder(data.images, data.held_out(source.held_out, source.seed), source, device)
        vae.save_pretrained(out / "vae")
        _write(done, figures)
    return AutoencoderKL.from_pretrained(out / "vae", use_safetensors=True).eval()


def _forget_origin(config: Path) -> None:
    """Removes the directory that a network was loaded from from its config."""
    values = json.loads(config.read_text(encoding="utf-8"))
    if values.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write(path: Path, figures: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")


Out = Annotated[Path, typer.Option(help="Directory of the pipeline; a stage that is finished there is not repeated.")]
Cache = Annotated[Path, typer.Option(help="Directory of the emoji packages (155 MB).")]
Threads = Annotated[int, typer.Option(help="CPU threads.", min=1)]
Steps = Annotated[int, typer.Option(help="Optimiser steps of the denoiser.", min=0)]
Rate = Annotated[float, typer.Option(help="Peak learning rate of the denoiser.")]
Initial = Annotated[Path | None, typer.Option(help="Earlier result whose denoiser the training starts from.")]
BatchSize = Annotated[int, typer.Option(help="Pictures per optimiser step of the denoiser.", min=1)]
Device = Annotated[str, typer.Option(help="Device of the training: cpu, cuda.")]
Seed = Annotated[int, typer.Option(help="Seed of the denoiser's training.", min=0)]
CACHE = Path("build/emoji-data")

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU that has it; no effect on a CPU
    np.seterr(all="raise", under="ignore")


@app.command("emoji-sd")
def emoji_sd(
    out: Out,
    cache: Cache = CACHE,
    threads: Threads = 2,
    steps: Steps = TrainingRecipe.steps,
    learning_rate: Rate = TrainingRecipe.learning_rate,
    batch_size: BatchSize = TrainingRecipe.batch_size,
    autoencoder_steps: Annotated[
        int, typer.Option(help="Optimiser steps of the autoencoder.", min=1)
    ] = AutoencoderRecipe.steps,
    initial: Initial = None,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Train a StableDiffusionPipeline: its autoencoder, text encoder and UNet."""
    _prepare(threads)
    recipe = TrainingRecipe(steps, batch_size, learning_rate, seed=seed)
    pretrain(
        UNetNetworks,
        partial(train_unet, recipe=recipe),
        out,
        cache,
        AutoencoderRecipe(steps=autoencoder_steps),
        initial,
        seed,
        device,
    )


@app.command("emoji-flux")
def emoji_flux(
    out: Out,
    autoencoder: Annotated[
        Path | None,
        typer.Option(help="Directory of a model whose autoencoder is taken over. Default: the embedded `emoji-sd`."),
    ] = None,
    cache: Cache = CACHE,
    threads: Threads = 2,
    steps: Steps = MATCHING.steps,
    learning_rate: Rate = MATCHING.learning_rate,
    batch_size: BatchSize = MATCHING.batch_size,
    distillation_steps: Annotated[
        int, typer.Option(help="Optimiser steps of the guidance distillation.", min=0)
    ] = DISTILLATION.steps,
    initial: Initial = None,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Train a FluxPipeline: both text encoders and the transformer; then distil the guidance."""
    _prepare(threads)
    recipe = FluxRecipe(
        replace(MATCHING, steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed),
        replace(DISTILLATION, steps=distillation_steps, batch_size=batch_size, seed=seed),
    )
    pretrain(
        FluxNetworks,
        partial(train_flux, recipe=recipe),
        out,
        cache,
        autoencoder or zoo.path("emoji-sd"),
        initial,
        seed,
        device,
    )


if __name__ == "__main__":
    app()
