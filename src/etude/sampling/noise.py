"""Keyed noise: randomness as a pure function of its purpose.

    z[sample, step] = N(0, I) drawn from Philox(key = blake2b(seed, stream, iteration, sample, step))

Nothing else enters: not the batch size, not the number of processes, not earlier draws. With the 32
bits that `torch.manual_seed` keeps on the CPU, rows of a long run would share noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from etude.errors import EtudeError

_BYTES = 16


def _text(seed: int, stream: str, key: tuple[int, ...]) -> str:
    """A text of the key; `repr` quotes the stream, so no two keys share a text."""
    return repr((int(seed), str(stream), *(int(part) for part in key)))


def _digest(seed: int, stream: str, key: tuple[int, ...]) -> int:
    """128 bits from the text of the key."""
    return int.from_bytes(hashlib.blake2b(_text(seed, stream, key).encode(), digest_size=_BYTES).digest(), "little")


def keyed_generator(seed: int, stream: str, *key: int) -> np.random.Generator:
    """A NumPy generator that depends on (seed, stream, *key) only, for shuffles and choices."""
    return np.random.Generator(np.random.Philox(key=_digest(seed, stream, key)))


def keyed_noise(
    seed: int, stream: str, iteration: int, samples: Iterable[int], step: int, shape: Sequence[int]
) -> Tensor:
    """Standard normal noise for some samples at one step: float32 `[len(samples), *shape]` on the CPU.

    Row k is a function of (seed, stream, iteration, samples[k], step) alone, where the samples are
    global indices in any order and grouping. A negative size in `shape` is an EtudeError.
    """
    rows = [int(sample) for sample in samples]
    if any(size < 0 for size in shape):
        raise EtudeError(f"noise of shape {tuple(shape)} cannot be drawn: give sizes of at least 0.")
    noise = np.empty((len(rows), *shape), dtype=np.float32)
    # A new Philox first asks the system for entropy, which takes four times as long as a new key.
    philox = np.random.Philox(key=0)
    generator, fresh = np.random.Generator(philox), philox.state
    # The keys' texts differ in the sample alone, so the hash of what stands before it is shared.
    before = hashlib.blake2b(f"{_text(seed, stream, (iteration,))[:-1]}, ".encode(), digest_size=_BYTES)
    for row, sample in zip(noise, rows, strict=True):
        digest = before.copy()
        digest.update(f"{sample}, {int(step)})".encode())
        fresh["state"]["key"] = np.frombuffer(digest.digest(), dtype="<u8")
        philox.state = fresh
        row[...] = generator.standard_normal(row.shape, dtype=np.float32)
    return torch.from_numpy(noise)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to the device; to CUDA from pinned memory, so that the CPU does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class NoiseSource:
    """The noise of a seed and a stream ("training", "evaluation"); all evaluations use iteration 0."""

    seed: int
    stream: str
    iteration: int = 0

    def initial(self, samples: list[int], shape: tuple[int, ...]) -> Tensor:
        """x_T of each sample, N(0, I) as in diffusers: fp32 `[len(samples), *shape]`."""
        return keyed_noise(self.seed, f"{self.stream}/initial", self.iteration, samples, 0, shape)

    def step(self, samples: list[int], step: int, shape: tuple[int, ...]) -> Tensor:
        """The noise that a stochastic step injects: fp32 `[len(samples), *shape]`."""
        return keyed_noise(self.seed, f"{self.stream}/step", self.iteration, samples, step, shape)
