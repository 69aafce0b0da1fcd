"""GRPO-Guard's ratio and Flow-DPPO's trust region: closed forms for every kernel."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from etude.config import parse_config
from etude.errors import EtudeError
from etude.learning.objectives.policy_gradient import gaussian_kl
from etude.learning.objectives.ppo import PPO
from etude.learning.objectives.trust import divergence_masked, normalised_log_ratio
from etude.sampling.kernels import Kernel
from etude.training.trainer import Trainer
from support.kernels import KERNELS
from support.small_runs import brief_settings, metrics

SOURCE, TARGET, COUNT, D = (0.4, 0.6), (0.5, 0.5), 4000, 8


def step(kernel: type[Kernel], reduction: str) -> tuple[torch.Tensor, ...]:
    """Log-ratio, KL and std of COUNT states of one step, the exact mean of delta z, and the KL of torch.distributions."""
    generator = torch.Generator().manual_seed(0)
    x0, eps, change, z = torch.randn(4, COUNT, D, generator=generator, dtype=torch.float64)
    old = kernel(0.6).transition(x0[:1], eps[:1], SOURCE, TARGET)
    new = kernel(0.6).transition(x0[:1] + 0.2 * change[:1], eps[:1], SOURCE, TARGET)
    std = old.std.expand(COUNT, 1)
    x = old.mean + old.std * z
    log_ratio = new.log_prob(x, reduction) - old.log_prob(x, reduction)
    delta = (new.mean - old.mean).expand(COUNT, D)
    kl = gaussian_kl(delta, torch.zeros_like(delta), std, reduction)  # type: ignore[arg-type]
    exact = kl_divergence(Normal(old.mean, old.std), Normal(new.mean, new.std))[0]
    product = delta * z
    return (
        log_ratio,
        kl,
        std.flatten(),
        product.mean(1) if reduction == "mean" else product.sum(1),
        exact.mean() if reduction == "mean" else exact.sum(),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_normalised_ratio_is_the_product_of_drift_and_noise_whatever_the_kernel(name: str, reduction: str) -> None:
    log_ratio, kl, std, product, exact = step(KERNELS[name], reduction)
    torch.testing.assert_close(kl, exact.expand(COUNT))
    normalised = normalised_log_ratio(log_ratio, kl, std)
    torch.testing.assert_close(normalised, product, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["gddim", "flow_sde"])
def test_its_mean_is_zero_where_the_plain_ratios_is_the_kl_below(name: str) -> None:
    """Within four standard errors of COUNT states."""
    log_ratio, kl, std, _, _ = step(KERNELS[name], "sum")
    normalised, four = normalised_log_ratio(log_ratio, kl, std), 4 / math.sqrt(COUNT)
    assert abs(float(normalised.mean())) < four * float(normalised.std())
    assert abs(float(log_ratio.mean() + kl[0])) < four * float(log_ratio.std())
    assert float(kl[0]) > four * float(log_ratio.std())


def test_a_pair_is_left_out_only_where_it_leaves_the_trust_region() -> None:
    log_ratio = torch.tensor([0.3, -0.3, 0.3, -0.3, 0.3], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    kl = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.1], dtype=torch.float64)
    result = divergence_masked(log_ratio, kl, advantages, 0.5)
    result.value.backward()
    e, f = math.exp(0.3), math.exp(-0.3)
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist() == pytest.approx([0.0, -f / 5, e / 5, 0.0, -e / 5])
    assert result.records["clipped"].tolist() == [True, False, False, True, False]


@pytest.mark.parametrize(
    ("options", "old"), [({"ratio": "normalised"}, "rollout"), ({"kl_limit": 1e-4}, "replay")], ids=["guard", "dppo"]
)
def test_a_run_begins_with_ratios_of_one_and_no_kl(tmp_path: Path, options: dict[str, Any], old: str) -> None:
    tree = brief_settings(tmp_path)
    tree |= {"iterations": 1, "evaluation": {"every": 9, "num_images": 2, "grid_images": 2}}
    tree["objective"] = {"options": options, "old_log_prob": old, "clip_range": 1e-3, "batch_size": 4}
    tree["rollout"]["batch_size"] = 4
    trainer = Trainer(parse_config(tree), tmp_path / "run")
    trainer.train()
    (row,) = metrics(tmp_path / "run")[1:]
    assert row["rollout_ratio_max_deviation"] < 1e-4
    assert row["grad_norm"] > 0
    assert row["approx_kl"] > 0  # the second optimiser step has moved


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": "guard"}, "ratio = guard must be plain or normalised"),
        ({"kl_limit": 0.0}, "kl_limit = 0.0 null or above 0"),
        ({"ratio": "normalised", "kl_limit": 1.0}, "give one of them"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], says: str) -> None:
    with pytest.raises(EtudeError, match=says):
        PPO(**options)
