from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import EtudeError
from etude.sampling.noise import keyed_generator, keyed_noise, to_device

PINNED = [2.7116458415985107, 1.0111843347549438, 0.653740406036377]


@settings(max_examples=25, deadline=None)
@given(samples=st.lists(st.integers(0, 10_000), min_size=1, max_size=6), split=st.integers(0, 6))
def test_a_row_does_not_depend_on_its_batch(samples, split):
    whole = keyed_noise(3, "step", 7, samples, 2, (4, 2, 2))
    parts = [keyed_noise(3, "step", 7, part, 2, (4, 2, 2)) for part in (samples[:split], samples[split:])]
    assert torch.equal(whole, torch.cat(parts))


def test_every_part_of_the_key_changes_the_noise():
    keys = [(0, "step", 0, 0), (1, "step", 0, 0), (0, "initial", 0, 0), (0, "step", 1, 0), (0, "step", 0, 1)]
    rows = [keyed_noise(seed, stream, it, [5, 6], step, (16,)) for seed, stream, it, step in keys]
    stacked = torch.cat(rows)
    assert len(torch.unique(stacked, dim=0)) == len(stacked)


def test_keys_that_read_alike_side_by_side_differ():
    assert not torch.equal(keyed_noise(1, "a", 12, [3], 0, (8,)), keyed_noise(1, "a", 1, [23], 0, (8,)))
    assert not torch.equal(keyed_noise(0, "a', 1", 1, [1], 1, (8,)), keyed_noise(0, "a", 1, [1], 1, (8,)))


def test_the_seed_keeps_more_than_32_bits():
    assert not torch.equal(keyed_noise(1, "step", 0, [0], 0, (8,)), keyed_noise(1 + 2**32, "step", 0, [0], 0, (8,)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3,), (4, 5, 7)])
def test_a_row_is_what_the_generator_of_its_key_draws(shape):
    rows = keyed_noise(7, "training/step", 3, [0, 9, 2**40], 2, shape)
    for row, sample in zip(rows, [0, 9, 2**40], strict=True):
        drawn = keyed_generator(7, "training/step", 3, sample, 2).standard_normal(shape, dtype=np.float32)
        assert torch.equal(row, torch.from_numpy(drawn))


def test_the_noise_is_pinned():
    noise = keyed_noise(0, "initial", 0, [0], 0, (3,))
    assert noise.dtype == torch.float32
    assert torch.equal(noise, keyed_noise(np.int64(0), "initial", 0, torch.tensor([0]), 0, torch.Size([3])))
    torch.testing.assert_close(noise, torch.tensor([PINNED]), atol=1e-6, rtol=0)


def test_the_noise_is_standard_normal_and_rows_are_uncorrelated():
    noise = keyed_noise(0, "step", 0, range(200), 0, (1000,)).double()
    n = noise.numel()
    assert abs(noise.mean()) < 5 / n**0.5
    assert abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / n) ** 0.5
    correlation = (noise[:-1] * noise[1:]).mean(1)
    assert correlation.abs().max() < 5 / 1000**0.5


def test_64_rows_of_latents_take_milliseconds():
    keyed_noise(0, "step", 0, range(64), 0, (8, 8, 8))
    times = []
    for step in range(10):
        start = time.process_time()
        keyed_noise(0, "step", 0, range(64), step, (8, 8, 8))
        times.append(time.process_time() - start)
    assert min(times) < 0.005


def test_generators_are_functions_of_their_key():
    assert (
        keyed_generator(1, "prompts", 4).permutation(50).tolist()
        == keyed_generator(1, "prompts", 4).permutation(50).tolist()
    )
    assert (
        keyed_generator(1, "prompts", 4).permutation(50).tolist()
        != keyed_generator(1, "prompts", 5).permutation(50).tolist()
    )


def test_no_samples_give_no_rows_and_a_negative_size_is_an_error():
    assert keyed_noise(0, "step", 0, [], 0, (4, 8, 8)).shape == (0, 4, 8, 8)
    with pytest.raises(EtudeError, match="cannot be drawn"):
        keyed_noise(0, "step", 0, [1], 0, (4, -8))


def test_noise_goes_to_cuda_from_pinned_memory_without_waiting_and_elsewhere_as_it_is():
    asked = []
    pinned = SimpleNamespace(to=lambda device, non_blocking: asked.append((device, non_blocking)) or "there")
    assert to_device(SimpleNamespace(pin_memory=lambda: pinned), torch.device("cuda", 1)) == "there"
    assert asked == [(torch.device("cuda", 1), True)]
    noise = torch.randn(2, 3)
    assert torch.equal(to_device(noise, torch.device("cpu")), noise)
