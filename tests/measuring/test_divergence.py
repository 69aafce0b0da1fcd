"""The divergence is in units in which both rewards began, and says since when it is sure."""

from __future__ import annotations

import numpy as np
import pytest

from etude.measuring.divergence import divergences
from etude.measuring.statistics import estimate_mean, sure_since

CLUSTERS = [i % 8 for i in range(32)]


def scores(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"trained": rng.normal(size=32), "gold": 50 + 7 * rng.normal(size=32)}


def test_rewards_that_gain_as_much_in_their_own_units_do_not_diverge():
    base = scores(0)
    moved = {name: values + 2 * values.std() for name, values in base.items()}
    found = divergences(moved, base, "trained", ["gold"], CLUSTERS)["gold"]
    assert (found.mean, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-12)


def test_the_divergence_is_the_paired_difference_of_standardised_gains_in_any_unit():
    base, now = scores(0), scores(1)
    gains = [(now[name] - base[name]) / base[name].std() for name in ("trained", "gold")]
    found = divergences(now, base, "trained", ["gold"], CLUSTERS)["gold"]
    assert found == estimate_mean(gains[0] - gains[1], CLUSTERS)
    scaled = [
        {name: 10 * values + 3 if name == "gold" else values for name, values in each.items()} for each in (now, base)
    ]
    assert divergences(*scaled, "trained", ["gold"], CLUSTERS)["gold"].mean == pytest.approx(found.mean)


def test_a_reward_without_spread_has_no_unit():
    base = {**scores(0), "flat": np.ones(32)}
    assert set(divergences(base, base, "trained", ["gold", "flat"], CLUSTERS)) == {"gold"}
    assert divergences(base, base, "flat", ["gold"], CLUSTERS) == {}


def test_it_is_sure_since_the_first_of_the_last_intervals_above_zero():
    points = [(0, {"low": 0.0}), (2, {"low": 0.1}), (4, {"low": -0.1}), (6, {"low": 0.2}), (8, {"low": 0.3})]
    assert sure_since(points) == 6
    assert sure_since(points[:3]) is None
    assert sure_since([]) is None
