"""Fits the head of the `style` reward: `python -m tools.zoo.style --out DIR`.

It takes ten minutes of one core. The head is a multinomial logistic regression on features of a
frozen network, from pictures of three emoji sets in the views of the `alignment` heads. 300 emoji
are left out and give the accuracy; 300 others choose the weight decay.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from etude.rewards.style import STYLES, StyleFeatures
from tools.zoo.alignment import picture_views
from tools.zoo.emoji_data import load_emoji

VIEWS = ("as it is", "mirrored", "moved", "through the autoencoder")


@dataclass(frozen=True)
class StyleRecipe:
    """Settings of the fit; `held_out` emoji measure it, as many others choose one of the `decays`."""

    held_out: int = 300
    decays: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    iterations: int = 300
    seed: int = 0


def fit_head(features: Tensor, styles: Tensor, decay: float, iterations: int) -> tuple[Tensor, Tensor]:
    """The minimum of mean cross entropy + decay / 2 |W|^2 over standardised features, as W `[k, d]` and b `[k]` of plain ones.

    Args:
        features: `[n, d]`.
        styles: int64 `[n]`.
    """
    x = features.double()
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x = (x - mean) / deviation
    weight = torch.zeros(len(STYLES), x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(STYLES), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(x @ weight.T + bias, styles) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    plain = weight.detach() / deviation
    return plain.float(), (bias.detach() - plain @ mean).float()


def accuracy(head: tuple[Tensor, Tensor], features: Tensor, styles: Tensor) -> dict[str, float]:
    """The share of pictures whose style is the likeliest, and the mean cross entropy in nats."""
    logits = features @ head[0].T + head[1]
    right = (logits.argmax(1) == styles).float().mean().item()
    return {"accuracy": round(right, 4), "nats": round(cross_entropy(logits, styles).item(), 4)}


def train_style(
    views: Tensor, styles: Tensor, emoji: Tensor, order: Tensor, recipe: StyleRecipe
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """The head and its figures.

    Args:
        views: features of the pictures, `[views, n, d]`.
        styles: int64 `[n]`.
        emoji: int64 `[n]`, the emoji that each picture shows.
        order: emoji in random order: the first are left out, the next choose the decay.
    """
    count = recipe.held_out
    tested, tried = (torch.isin(emoji, part) for part in (order[:count], order[count : 2 * count]))

    def fit(rows: Tensor, decay: float) -> tuple[Tensor, Tensor]:
        return fit_head(views[:, rows].flatten(0, 1), styles[rows].repeat(len(views)), decay, recipe.iterations)

    tries = {}
    for decay in track(recipe.decays, "decay"):
        tries[decay] = accuracy(fit(~(tested | tried), decay), views[0, tried], styles[tried])["nats"]
    best = min(tries, key=lambda decay: tries[decay])
    head = fit(~tested, best)
    figures: dict[str, Any] = {"pictures": int((~tested).sum()), "held_out": int(tested.sum()), "decay": best}
    figures |= {view: accuracy(head, views[k, tested], styles[tested]) for k, view in enumerate(VIEWS[: len(views)])}
    return head, figures


def main(
    out: Annotated[Path, typer.Option(help="Directory for style.safetensors and card.json.")],
    autoencoder: Annotated[Path, typer.Option(help="Directory of an autoencoder, for views with its blur.")],
    cache: Annotated[Path, typer.Option(help="Directory of the emoji packages (155 MB).")] = Path("build/emoji-data"),
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Fit the head of the style reward, and measure it on emoji that it has not seen."""
    torch.set_num_threads(threads)
    recipe, data, network = StyleRecipe(), load_emoji(cache), StyleFeatures()
    vae = AutoencoderKL.from_pretrained(autoencoder, use_safetensors=True).eval()
    views: list[Tensor] = []
    with torch.no_grad():
        for images in picture_views(torch.from_numpy(data.images), vae, recipe.seed):
            views.append(torch.cat([network(batch) for batch in track(images.split(64), VIEWS[len(views)])]))
    styles = torch.tensor([STYLES.index(style) for style in data.styles])
    order = torch.from_numpy(np.random.default_rng(recipe.seed).permutation(np.flatnonzero(~data.is_flag)))
    head, figures = train_style(torch.stack(views), styles, torch.from_numpy(data.emoji), order, recipe)
    out.mkdir(parents=True, exist_ok=True)
    save_file({"weight": head[0].contiguous(), "bias": head[1].contiguous()}, out / "style.safetensors")
    (out / "card.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    typer.run(main)
