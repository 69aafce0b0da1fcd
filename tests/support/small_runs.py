"""What tests of training runs share: settings, a reward that is easy to raise, a way to break off, and what two runs are compared by."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.numpy import load_file

from etude.errors import EtudeError
from support.tiny import save_stable_diffusion


def redness(images, prompts, **metadata):
    """How much redder than green and blue the pictures are on average, in [-1, 1]."""
    red, green, blue = images.float().mean((2, 3)).unbind(1)
    return (red - (green + blue) / 2) / 255


def brief_settings(root):
    """Two short iterations of DDPO on a tiny Stable Diffusion, which is written into `root`."""
    (root / "prompts.txt").write_text("red heart\npizza\ntiger\nsun\n")
    return {
        "model": str(save_stable_diffusion(root / "sd")),
        "iterations": 2,
        "rewards": {"colorfulness": 1.0},
        "prompts": {"train": str(root / "prompts.txt"), "evaluation": str(root / "prompts.txt")},
        "sampling": {"eta": 1.2, "num_steps": 3, "guidance_scale": 2.0},
        "rollout": {"images_per_iteration": 4, "images_per_prompt": 2},
        "objective": {"clip_range": None, "clip_nats": 1.6},
        "advantage": {"kind": "group"},
        "evaluation": {"every": 2, "num_images": 4, "grid_images": 2},
    }


def train_until(trainer, iteration):
    """Trains, and breaks off where that iteration begins, as Ctrl-C would."""
    iterate = trainer._iterate

    def interrupted():
        if trainer.ledger.iteration + 1 == iteration:
            raise KeyboardInterrupt
        return iterate()

    trainer._iterate = interrupted
    with pytest.raises((KeyboardInterrupt, EtudeError)):
        trainer.train()


def metrics(out):
    """The rows of metrics without what depends on the machine."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in {"seconds", "memory_mb"}} for row in rows]


def weights(trainer):
    """A copy of the trained weights, by name."""
    return {name: p.detach().clone() for name, p in trainer.parameters.items()}


def same(a, b):
    """Whether two sets of weights have the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def outcome(out):
    """The exported weights, bit for bit, and the metrics without clocks and memory."""
    exported = load_file(out / "lora" / "pytorch_lora_weights.safetensors")
    return {name: tensor.tobytes() for name, tensor in exported.items()}, metrics(out)
