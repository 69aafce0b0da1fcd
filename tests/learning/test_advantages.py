"""Advantages are standardised rewards: moments, invariances, and exact zeros."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import EtudeError
from etude.learning.advantages import PromptStatistics, combine, group_advantages, zero_std_ratio


def batch(n_groups: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(n_groups * size, generator=generator) * 3 + 5
    groups = torch.arange(n_groups).repeat_interleave(size) * 7 - 3
    order = torch.randperm(len(rewards), generator=generator)
    return rewards[order], groups[order]


def test_each_group_has_mean_zero_and_population_variance_one() -> None:
    rewards, groups = batch(6, 5)
    advantages = group_advantages(rewards, groups)
    assert advantages.dtype == torch.float64
    for group in groups.unique():
        member = advantages[groups == group]
        assert float(member.mean()) == pytest.approx(0, abs=1e-14)
        assert float(member.square().mean()) == pytest.approx(1, abs=1e-13)


def test_global_std_divides_group_centred_rewards_by_the_batch_std() -> None:
    rewards, groups = batch(4, 3)
    advantages = group_advantages(rewards, groups, global_std=True)
    std = rewards.double().std(correction=0)
    for group in groups.unique():
        member = rewards[groups == group].double()
        torch.testing.assert_close(advantages[groups == group], (member - member.mean()) / std, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("global_std", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e8, 1e30, 3e-42])
def test_equal_rewards_have_advantage_exactly_zero(value: float, global_std: bool) -> None:
    rewards, groups = torch.full((7,), value), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    assert torch.equal(group_advantages(rewards, groups, global_std), torch.zeros(7, dtype=torch.float64))
    mixed = torch.cat([rewards, torch.tensor([1.0, 2.0])])
    advantages = group_advantages(mixed, torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2]), global_std)
    assert torch.equal(advantages[:7], torch.zeros(7, dtype=torch.float64))
    assert bool(advantages.isfinite().all())


def test_two_passes_keep_the_variance_of_large_near_equal_rewards() -> None:
    rewards = torch.tensor([1e8, 1e8 + 800, 1e8, 1e8 + 800])
    advantages = group_advantages(rewards, torch.zeros(4, dtype=torch.int64))
    assert advantages.tolist() == [-1, 1, -1, 1]


@pytest.mark.parametrize("global_std", [False, True])
@pytest.mark.parametrize("mean", [21.7, -0.3, 1e-20, 1e8])
def test_rewards_that_differ_by_rounding_alone_have_advantage_exactly_zero(mean: float, global_std: bool) -> None:
    """A few units in the last place, as one image scored in two batches; a thousandth of the mean is a difference."""
    one = torch.tensor(mean)
    ulp = torch.nextafter(one, torch.tensor(float("inf"))) - one
    rounded = one + ulp * torch.tensor([0.0, 1.0, -2.0, 3.0])
    groups = torch.zeros(4, dtype=torch.int64)
    assert len(rounded.unique()) == 4
    assert group_advantages(rounded, groups, global_std).tolist() == [0, 0, 0, 0]
    assert zero_std_ratio(rounded, groups) == 1
    assert PromptStatistics(8, 2).advantages(["a"] * 4, rounded).tolist() == [0, 0, 0, 0]
    apart = one * torch.tensor([1.0, 1.001, 1.0, 1.001])
    assert group_advantages(apart, groups, global_std).abs().tolist() == pytest.approx([1] * 4, rel=1e-3)
    assert zero_std_ratio(apart, groups) == 0


def test_a_group_whose_combined_advantages_cancel_counts_as_one_that_teaches_nothing() -> None:
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    first, second = torch.tensor([0.1, 0.7, 0.4, 0.1, 0.2, 0.9]), torch.tensor([5.0, -1.0, 2.0, 3.0, 9.0, 4.0])
    weights = {"x": 1.0, "y": 1.0}
    normalised = {"x": group_advantages(first, groups), "y": group_advantages(second, groups)}
    advantages = combine(normalised, weights)
    assert advantages[:3].abs().max() < 1e-7
    assert zero_std_ratio(first + second, groups) == 0
    assert zero_std_ratio(first + second, groups, advantages) == 0.5
    assert zero_std_ratio(first + second, groups, advantages.float()) == pytest.approx(0.5)


def test_a_group_of_one_has_advantage_zero() -> None:
    assert group_advantages(torch.tensor([3.0, 4.0]), torch.tensor([0, 1])).tolist() == [0, 0]


@settings(max_examples=50, deadline=None)
@given(
    rewards=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=12),
    scale=st.sampled_from([0.5, 2.0, 1024.0]),
    data=st.data(),
)
def test_scaling_rewards_by_a_power_of_two_changes_nothing(
    rewards: list[float], scale: float, data: st.DataObject
) -> None:
    groups = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(rewards), max_size=len(rewards))))
    values = torch.tensor(rewards, dtype=torch.float64)
    values = torch.where(values.abs() < 1e-30, 0.0, values)
    advantages = group_advantages(values, groups)
    assert bool(advantages.isfinite().all())
    assert torch.equal(advantages, group_advantages(values * scale, groups))


def test_zero_std_ratio_is_the_share_of_constant_groups() -> None:
    rewards = torch.tensor([1.0, 1.0, 2.0, 3.0, 0.1, 0.1, 0.1])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    assert zero_std_ratio(rewards, groups) == pytest.approx(2 / 3)
    assert zero_std_ratio(rewards, torch.zeros(7, dtype=torch.int64)) == 0


def test_rewards_that_cannot_be_compared_are_named() -> None:
    with pytest.raises(EtudeError, match="sample 1 is nan"):
        group_advantages(torch.tensor([1.0, float("nan")]), torch.tensor([0, 0]))
    with pytest.raises(EtudeError, match=r"\[3\] do not match rewards of shape \[2\]"):
        group_advantages(torch.zeros(2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(EtudeError, match="sample 0 is inf"):
        PromptStatistics(4, 2).advantages(["a"], torch.tensor([float("inf")]))
    with pytest.raises(EtudeError, match="2 prompts came with 1 rewards"):
        PromptStatistics(4, 2).advantages(["a", "b"], torch.zeros(1))


def test_below_min_count_a_prompt_is_compared_with_the_batch() -> None:
    statistics = PromptStatistics(buffer_size=16, min_count=3)
    rewards = torch.tensor([1.0, 2.0, 6.0])
    expected = (rewards.double() - 3) / torch.tensor(14 / 3, dtype=torch.float64).sqrt()
    torch.testing.assert_close(statistics.advantages(["a", "a", "b"], rewards), expected)


def test_the_batch_enters_the_buffer_before_it_is_normalised() -> None:
    statistics = PromptStatistics(buffer_size=16, min_count=3)
    statistics.advantages(["a", "a", "b"], torch.tensor([1.0, 2.0, 6.0]))
    advantages = statistics.advantages(["a", "b"], torch.tensor([6.0, 10.0]))
    buffer = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    assert float(advantages[0]) == pytest.approx(float((6 - buffer.mean()) / buffer.std(correction=0)), rel=1e-14)
    assert float(advantages[1]) == pytest.approx(1.0)  # two rewards of b: the batch [6, 10] decides


def test_a_full_buffer_forgets_the_oldest() -> None:
    statistics = PromptStatistics(buffer_size=2, min_count=2)
    statistics.advantages(["a"] * 3, torch.tensor([100.0, 1.0, 2.0]))
    assert statistics.state() == {"a": [1.0, 2.0]}
    advantages = statistics.advantages(["a"], torch.tensor([4.0]))
    assert statistics.state() == {"a": [2.0, 4.0]}
    assert advantages.tolist() == [1.0]


def test_a_buffer_of_equal_rewards_gives_exactly_zero() -> None:
    statistics = PromptStatistics(buffer_size=4, min_count=2)
    advantages = statistics.advantages(["a"] * 7 + ["b"] * 2, torch.tensor([0.1] * 7 + [1.0, 2.0]))
    assert advantages.tolist() == [0.0] * 7 + [-1.0, 1.0]


def test_a_state_through_json_continues_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = PromptStatistics(5, 3), PromptStatistics(5, 3)
    prompts = ["a", "bé", "a", "c"] * 4
    first.advantages(prompts, torch.randn(16, generator=generator))
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    later = torch.randn(16, generator=generator)
    assert torch.equal(first.advantages(prompts, later), second.advantages(prompts, later))
    assert second.state() == first.state()


def test_the_state_is_a_copy() -> None:
    statistics = PromptStatistics(5, 3)
    statistics.advantages(["a"], torch.tensor([1.0]))
    state = statistics.state()
    statistics.advantages(["a"], torch.tensor([2.0]))
    assert state == {"a": [1.0]}


def test_combine_is_the_weighted_sum() -> None:
    first, second = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0])
    assert combine({"x": first, "y": second}, {"x": 2.0, "y": -1.0}).tolist() == [1.5, -4.0]
    with pytest.raises(EtudeError, match=r"\['x'\].*\['y'\]"):
        combine({"x": first}, {"y": 1.0})
