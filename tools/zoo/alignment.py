"""Trains the heads of the `alignment` reward: `python -m tools.zoo.alignment --out DIR`.

It takes five minutes on two cores. The loss is the symmetric InfoNCE (van den Oord et al. 2018,
arXiv 1807.03748; the form of CLIP, arXiv 2103.00020) between pictures and captions of distinct
emoji, on features of frozen networks. A tenth of the emoji names is left out of training and
measures retrieval.
"""

from __future__ import annotations

import json
import time
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

from etude.rewards.alignment import Heads, ImageFeatures, text_features
from tools.zoo.autoencoder import encode
from tools.zoo.emoji_data import EmojiSet, load_emoji
from tools.zoo.training import warmup_cosine


@dataclass(frozen=True)
class AlignmentRecipe:
    """Settings of the heads' training; `held_out` names are left out, for the retrieval figures."""

    steps: int = 2500
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    held_out: int = 300
    seed: int = 0


def picture_views(images: Tensor, vae: AutoencoderKL | None, seed: int) -> list[Tensor]:
    """Views of each picture: as it is, mirrored, shrunk and moved, and through the autoencoder.

    The last view makes the autoencoder's blur no clue.
    """
    generator = torch.Generator().manual_seed(seed)
    small = torch.nn.functional.interpolate(images.float(), scale_factor=0.8, mode="bilinear", antialias=True)
    moved = torch.full_like(images, 255)
    size, room = small.shape[-1], images.shape[-1] - small.shape[-1]
    for i, (top, left) in enumerate(torch.randint(room + 1, (len(images), 2), generator=generator).tolist()):
        moved[i, :, top : top + size, left : left + size] = small[i].round().clamp(0, 255).to(torch.uint8)
    views = [images, images.flip(-1), moved]
    if vae is not None:
        views.append(_through(vae, images))
    return views


@torch.no_grad()
def _through(vae: AutoencoderKL, images: Tensor) -> Tensor:
    latents = encode(vae, images.numpy())
    decoded = torch.cat([vae.decode(batch).sample for batch in latents.split(64)])
    return (decoded / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)


def caption_views(data: EmojiSet, seed: int) -> list[list[str]]:
    """Captions of each emoji: its name, and its name with two keywords, twice."""
    rng = np.random.default_rng(seed)

    def with_tags(name: str, tags: list[str]) -> str:
        chosen: list[str] = rng.choice(tags, size=min(2, len(tags)), replace=False).tolist() if tags else []
        return ", ".join([name, *chosen])

    return [data.names, *([with_tags(n, t) for n, t in zip(data.names, data.tags, strict=True)] for _ in range(2))]


@torch.no_grad()
def _features(network: ImageFeatures, images: Tensor, label: str) -> Tensor:
    return torch.cat([network(batch) for batch in track(images.split(64), label)])


def train_alignment(
    pictures: Tensor, captions: Tensor, emoji: Tensor, held_out: Tensor, recipe: AlignmentRecipe
) -> tuple[Heads, dict[str, Any]]:
    """Trains the heads on features; returns them and the figures.

    Args:
        pictures: features of the pictures, `[views, n, 1280]`.
        captions: features of the captions, `[views, emoji, 384]`.
        emoji: int64 `[n]`, the emoji that each picture shows.
        held_out: bool `[emoji]`, whether an emoji is left out of training.
    """
    torch.manual_seed(recipe.seed)
    heads, scale = Heads(), torch.nn.Parameter(torch.tensor(2.6))
    optimizer = torch.optim.AdamW(
        [*heads.parameters(), scale], lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(recipe.steps))
    generator = torch.Generator().manual_seed(recipe.seed)
    by_emoji = [torch.nonzero(emoji == e).flatten() for e in range(captions.shape[1])]
    train = torch.nonzero(~held_out & torch.tensor([len(rows) > 0 for rows in by_emoji])).flatten()
    start, losses = time.monotonic(), []
    for _ in track(range(recipe.steps), "alignment"):
        chosen = train[torch.randperm(len(train), generator=generator)[: recipe.batch_size]]
        draw = torch.rand((3, len(chosen)), generator=generator)
        rows = torch.stack(
            [by_emoji[e][int(u * len(by_emoji[e]))] for e, u in zip(chosen.tolist(), draw[0].tolist(), strict=True)]
        )
        image = heads.embed_image(pictures[(draw[1] * len(pictures)).long(), rows])
        text = heads.embed_text(captions[(draw[2] * len(captions)).long(), chosen])
        logits, target = scale.exp() * image @ text.T, torch.arange(len(chosen))
        loss = (
            torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
        ) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    heads.eval().requires_grad_(False)
    return heads, {
        "steps": recipe.steps,
        "seconds": round(time.monotonic() - start),
        "final_loss": float(np.mean(losses[-200:])),
        **retrieval(heads, pictures[0], captions[0], emoji, held_out),
    }


def retrieval(heads: Heads, pictures: Tensor, captions: Tensor, emoji: Tensor, held_out: Tensor) -> dict[str, float]:
    """Retrieval figures among the held-out names.

    Recall is the share of pictures whose right name comes first, or among the first ten. Scores are
    means over matched pairs and over all pairs.
    """
    names = torch.nonzero(held_out).flatten()
    rows = torch.nonzero(held_out[emoji]).flatten()
    score = heads.embed_image(pictures[rows]) @ heads.embed_text(captions[names]).T
    right = (names[None] == emoji[rows][:, None]).float().argmax(1)
    matched = score.gather(1, right[:, None])
    rank = (score > matched).sum(1)
    return {
        "held_out_names": len(names),
        "recall_at_1": (rank < 1).float().mean().item(),
        "recall_at_10": (rank < 10).float().mean().item(),
        "score_matched": 100 * matched.mean().item(),
        "score_unrelated": 100 * score.mean().item(),
    }


def main(
    out: Annotated[Path, typer.Option(help="Directory for alignment.safetensors, names.json and card.json.")],
    cache: Annotated[Path, typer.Option(help="Directory of the emoji packages (155 MB).")] = Path("build/emoji-data"),
    autoencoder: Annotated[
        Path | None, typer.Option(help="Directory of an autoencoder, for views with its blur.")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Train the heads of the alignment reward, and measure retrieval on held-out names."""
    torch.set_num_threads(threads)
    recipe, data = AlignmentRecipe(), load_emoji(cache)
    vae = AutoencoderKL.from_pretrained(autoencoder, use_safetensors=True).eval() if autoencoder else None
    network = ImageFeatures()
    pictures = torch.stack(
        [
            _features(network, v, f"view {i + 1}")
            for i, v in enumerate(picture_views(torch.from_numpy(data.images), vae, 0))
        ]
    )
    captions = torch.stack([text_features(view) for view in caption_views(data, recipe.seed)])
    candidates = np.random.default_rng(recipe.seed).permutation(np.flatnonzero(~data.is_flag))
    held_out = torch.zeros(len(data.names), dtype=torch.bool)
    held_out[candidates[: recipe.held_out]] = True
    heads, figures = train_alignment(pictures, captions, torch.from_numpy(data.emoji), held_out, recipe)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {f"heads.{name}": value.half() for name, value in heads.state_dict().items()}
    save_file({**tensors, "names": heads.embed_text(captions[0]).half().contiguous()}, out / "alignment.safetensors")
    (out / "names.json").write_text(json.dumps(data.names, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "card.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    typer.run(main)
