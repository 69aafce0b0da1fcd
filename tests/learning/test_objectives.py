"""The clipped surrogate against its definition and its gradient; the KL against torch.distributions."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from etude.errors import EtudeError
from etude.learning.metrics import COMMON, Records, compute_all
from etude.learning.objectives import Loss
from etude.learning.objectives.policy_gradient import gaussian_kl
from etude.learning.objectives.ppo import PPO, ppo_loss
from etude.learning.objectives.reinforce import reinforce_loss


def test_ppo_is_its_definition_pair_by_pair() -> None:
    pairs = list(product([0.5, 0.95, 1.0, 1.05, 2.0], [-2.0, -0.5, 0.0, 0.5, 9.0]))
    ratio = torch.tensor([r for r, _ in pairs], dtype=torch.float64)
    advantages = torch.tensor([a for _, a in pairs], dtype=torch.float64)
    result = ppo_loss(ratio.log(), torch.zeros_like(ratio), advantages, clip_range=0.1, adv_clip_max=5.0)
    terms = [max(-min(a, 5) * r, -min(a, 5) * min(max(r, 0.9), 1.1)) for r, a in pairs]
    assert float(result.value) == pytest.approx(sum(terms) / len(terms), rel=1e-14)
    torch.testing.assert_close(result.records["ratio"], ratio)
    assert result.records["clipped"].tolist() == [abs(r - 1) > 0.1 for r, _ in pairs]
    assert float(result.records["approx_kl"]) == pytest.approx(
        sum(0.5 * math.log(r) ** 2 for r, _ in pairs) / len(pairs)
    )


def test_the_gradient_is_cut_only_where_the_ratio_has_moved_too_far_the_right_way() -> None:
    log_prob = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    ppo_loss(log_prob, torch.zeros(4, dtype=torch.float64), advantages, 0.1, 5.0).value.backward()
    e, f = math.exp(0.5), math.exp(-0.5)
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == pytest.approx([0.0, -f / 4, e / 4, 0.0])


def test_on_policy_the_ppo_gradient_is_the_score_function_estimator() -> None:
    generator = torch.Generator().manual_seed(0)
    start, advantages = torch.randn(9, generator=generator), torch.randn(9, generator=generator) * 4
    gradients = []
    for loss in (
        lambda log_prob: ppo_loss(log_prob, start, advantages, 1e-4, 5.0),
        lambda log_prob: reinforce_loss(log_prob, advantages, 5.0),
    ):
        log_prob = start.clone().requires_grad_()
        result = loss(log_prob)
        result.value.backward()
        gradients.append(log_prob.grad)
        assert result.records["ratio"].tolist() == [1.0] * 9
        assert not result.records["clipped"].any()
        assert float(result.records["approx_kl"]) == 0
    assert torch.equal(*gradients)


def test_advantages_are_clipped_on_both_sides() -> None:
    log_prob = torch.tensor([1.0, 1.0])
    assert float(reinforce_loss(log_prob[:1], torch.tensor([100.0]), 5.0).value) == -5
    assert float(reinforce_loss(log_prob[:1], torch.tensor([-100.0]), 5.0).value) == 5
    assert float(ppo_loss(log_prob, log_prob, torch.tensor([100.0, -2.0]), 0.1, 5.0).value) == -1.5


def test_diagnostics_and_old_values_carry_no_gradient() -> None:
    log_prob, old, advantages = (torch.zeros(3, requires_grad=True) for _ in range(3))
    result = ppo_loss(log_prob, old, advantages, 0.1, 5.0)
    result.value.backward()
    assert log_prob.grad is not None
    assert old.grad is None
    assert advantages.grad is None
    assert not result.records["ratio"].requires_grad
    assert not result.records["approx_kl"].requires_grad
    assert result.records["clipped"].dtype == torch.bool


def test_a_float64_advantage_does_not_change_the_dtype_of_the_loss() -> None:
    loss = ppo_loss(torch.zeros(2), torch.zeros(2), torch.ones(2, dtype=torch.float64), 0.1, 5.0).value
    assert loss.dtype == torch.float32


def test_a_missing_dimension_is_an_error_and_not_a_broadcast() -> None:
    with pytest.raises(EtudeError, match=r"advantages \[1\]"):
        ppo_loss(torch.zeros(3), torch.zeros(3), torch.zeros(1), 0.1, 5.0)
    with pytest.raises(EtudeError, match=r"log_prob \[3\], advantages \[2\]"):
        reinforce_loss(torch.zeros(3), torch.zeros(2), 5.0)
    with pytest.raises(EtudeError, match="reference_mean"):
        gaussian_kl(torch.zeros(3, 2), torch.zeros(1, 2), torch.ones(()))


def test_gaussian_kl_is_that_of_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(1)
    mean, reference = (torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    std = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
    shaped = std.reshape(3, 1, 1, 1)
    expected = kl_divergence(Normal(mean, shaped), Normal(reference, shaped)).flatten(1)
    for form in (std, shaped):
        torch.testing.assert_close(gaussian_kl(mean, reference, form, "sum"), expected.sum(1))
        torch.testing.assert_close(gaussian_kl(mean, reference, form), expected.mean(1))
    assert gaussian_kl(mean, mean, shaped).tolist() == [0, 0, 0]


def test_a_deterministic_step_has_no_kl() -> None:
    with pytest.raises(EtudeError, match="deterministic step has no KL"):
        gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([1.0, 0.0]))


def row(records: Records) -> dict[str, float]:
    return compute_all((*PPO.metrics, *COMMON), records)


def recorded(results: list[Loss]) -> Records:
    return {name: [result.records[name] for result in results] for name in ("ratio", "clipped", "approx_kl")}


def test_the_row_of_an_iteration_is_the_mean_over_its_pairs_and_steps() -> None:
    old, log_probs = torch.zeros(3), [torch.tensor([0.0, 0.1, -0.2]), torch.tensor([0.0]), torch.tensor([0.3, 0.0])]
    records = recorded([ppo_loss(p, old[: len(p)], torch.ones(len(p)), 0.15, 5.0) for p in log_probs])
    records |= {
        "loss": [torch.tensor(1.0), torch.tensor(2.0)],
        "grad_norm": [torch.tensor(0.5), torch.tensor(1.5)],
    }
    numbers, ratio = row(records), torch.cat(log_probs).exp()
    assert "reference_kl" not in numbers
    assert numbers["ratio_mean"] == pytest.approx(float(ratio.mean()))
    assert numbers["ratio_max_deviation"] == pytest.approx(float((ratio - 1).abs().max()))
    assert numbers["clipfrac"] == pytest.approx(2 / 6)
    assert numbers["approx_kl"] == pytest.approx(float(torch.cat(log_probs).square().mean()) / 2)
    assert (numbers["loss"], numbers["grad_norm"]) == (1.5, 1.0)
    assert row({**records, "reference_kl": [torch.tensor([0.25, 0.75])]})["reference_kl"] == 0.5


def test_a_gradient_norm_that_is_not_finite_is_seen_in_the_row() -> None:
    for bad in (math.inf, math.nan):
        assert not math.isfinite(row({"grad_norm": [torch.tensor(1.0), torch.tensor(bad)]})["grad_norm"])
