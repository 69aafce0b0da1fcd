"""What tests of training runs share: a reward that is easy to raise, and what two runs are compared by."""

from __future__ import annotations

import json

import torch
from safetensors.numpy import load_file


def redness(images, prompts, **metadata):
    """How much redder than green and blue the pictures are on average, in [-1, 1]."""
    red, green, blue = images.float().mean((2, 3)).unbind(1)
    return (red - (green + blue) / 2) / 255


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
