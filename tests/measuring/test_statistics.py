"""Means and intervals: closed forms, exact laws, and the coverage of the interval with a stated confidence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from etude.errors import EtudeError
from etude.measuring.statistics import Estimate, estimate_mean, format_interval


def clustered(rng: np.random.Generator, clusters: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Mean 0, clusters of 1 to 5 samples that share an effect as large as the noise of a sample."""
    labels = np.repeat(np.arange(clusters), rng.integers(1, 6, size=clusters))
    return spread * rng.normal(size=clusters)[labels] + rng.normal(size=len(labels)), labels


def test_equal_samples_give_exactly_zero() -> None:
    estimate = estimate_mean(np.zeros(64), np.arange(64) % 8)
    assert (estimate.mean, estimate.standard_error, estimate.low, estimate.high) == (0, 0, 0, 0)


@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e9 + 0.1])
def test_a_constant_is_its_own_mean_and_interval(value: float) -> None:
    estimate = estimate_mean([value] * 7, [0, 0, 0, 1, 1, 2, 2])
    assert (estimate.mean, estimate.standard_error, estimate.low, estimate.high) == (value, 0, value, value)


def test_the_standard_error_of_singletons_is_s_over_root_n() -> None:
    x = np.random.default_rng(1).normal(size=50)
    estimate = estimate_mean(x, np.arange(50))
    assert estimate.mean == pytest.approx(x.mean(), abs=1e-14)
    assert estimate.standard_error == pytest.approx(x.std(ddof=1) / np.sqrt(50), rel=1e-12)


def test_the_standard_error_of_equal_clusters_is_that_of_their_means() -> None:
    x = np.random.default_rng(2).normal(size=(12, 5))
    estimate = estimate_mean(x.ravel(), np.repeat(np.arange(12), 5))
    assert estimate.standard_error == pytest.approx(x.mean(axis=1).std(ddof=1) / np.sqrt(12), rel=1e-12)


def test_copies_within_a_cluster_add_no_information() -> None:
    x = np.random.default_rng(3).normal(size=30)
    once, often = estimate_mean(x, np.arange(30)), estimate_mean(np.repeat(x, 9), np.repeat(np.arange(30), 9))
    for name in ("mean", "standard_error", "low", "high"):
        assert getattr(often, name) == pytest.approx(getattr(once, name), rel=1e-9)


def test_the_bootstrap_of_many_clusters_agrees_with_the_standard_error() -> None:
    x, labels = clustered(np.random.default_rng(4), 400)
    estimate = estimate_mean(x, labels)
    assert (estimate.high - estimate.low) / (2 * 1.96 * estimate.standard_error) == pytest.approx(1, abs=0.05)


def test_two_clusters_give_the_extremes_of_the_bootstrap_as_a_ratio_of_sums() -> None:
    """Resamples of a cluster {0} and a cluster {3, 3, 3} are 0, 9/4 and 3: unequal clusters weigh by what they hold."""
    estimate = estimate_mean([0, 3, 3, 3], ["a", "b", "b", "b"])
    assert (estimate.mean, estimate.low, estimate.high) == (2.25, 0, 3)
    assert (estimate.n, estimate.clusters, estimate.clustered) == (4, 2, True)


@pytest.mark.parametrize("clusters", [8, 40])
def test_the_interval_covers_the_truth_about_95_times_in_100(clusters: int) -> None:
    """At least 91 % at 99.9 % confidence: the count over 400 worlds is held above that binomial's 0.1 % quantile."""
    worlds, hits = 400, 0
    for world in range(worlds):
        estimate = estimate_mean(
            *clustered(np.random.default_rng([clusters, world]), clusters), seed=world, resamples=800
        )
        hits += estimate.low <= 0 <= estimate.high
    assert hits >= stats.binom.ppf(0.001, worlds, 0.91)
    assert hits <= stats.binom.ppf(0.999, worlds, 0.97)


def test_ignoring_the_clusters_would_cover_too_rarely() -> None:
    """The law above can fail: with strong clusters, treating samples as independent misses the truth far too often."""
    worlds, hits = 200, 0
    for world in range(worlds):
        x, labels = clustered(np.random.default_rng([1, world]), 20, spread=3.0)
        estimate = estimate_mean(x, np.arange(len(labels)), resamples=400)
        hits += estimate.low <= 0 <= estimate.high
    assert hits < stats.binom.ppf(0.001, worlds, 0.9)


def test_the_same_arguments_give_the_same_bits_and_another_seed_does_not() -> None:
    x, labels = clustered(np.random.default_rng(5), 10)
    assert estimate_mean(x, labels) == estimate_mean(x, labels)
    assert estimate_mean(x, labels) != estimate_mean(x, labels, seed=1)


def test_one_cluster_resamples_samples_and_says_so() -> None:
    x = np.random.default_rng(6).normal(size=20)
    one, singletons = estimate_mean(x, ["only"] * 20), estimate_mean(x, np.arange(20))
    assert (one.clusters, one.clustered, singletons.clusters, singletons.clustered) == (1, False, 20, True)
    assert (one.mean, one.standard_error, one.low, one.high) == (
        singletons.mean,
        singletons.standard_error,
        singletons.low,
        singletons.high,
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.floats(-50, 50), st.floats(0.01, 100))
def test_shifting_and_scaling_the_samples_shifts_and_scales_the_interval(x, shift, scale) -> None:
    labels = np.arange(len(x)) // 2
    plain = estimate_mean(x, labels, resamples=50)
    moved = estimate_mean(scale * np.array(x) + shift, labels, resamples=50)
    for name in ("mean", "low", "high"):
        assert getattr(moved, name) == pytest.approx(scale * getattr(plain, name) + shift, rel=1e-6, abs=1e-6)
    assert moved.standard_error == pytest.approx(scale * plain.standard_error, rel=1e-6, abs=1e-6)
    assert plain.low <= plain.mean + 1e-9
    assert plain.mean <= plain.high + 1e-9


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([1.0], [0], "at least 2"),
        ([], [], "at least 2"),
        ([1.0, 2.0], [0], "one cluster per value"),
        ([1.0, float("nan")], [0, 1], "value 1 is nan"),
    ],
)
def test_values_without_an_interval_are_refused(values: list[float], clusters: list[int], message: str) -> None:
    with pytest.raises(EtudeError, match=message):
        estimate_mean(values, clusters)


def test_an_estimate_survives_json() -> None:
    estimate = estimate_mean([1.0, 2.0, 4.0], [0, 1, 1])
    assert Estimate.from_dict(json.loads(json.dumps(estimate.to_dict()))) == estimate


@pytest.mark.parametrize(
    ("numbers", "signed", "text"),
    [
        ((1.2684, 1.0211, 1.5132), True, "+1.27 [+1.02, +1.51]"),
        ((-0.6412, -41.9, 40.2), True, "-1 [-42, +40]"),
        ((12345.6, 11000.0, 13000.0), False, "12346 [11000, 13000]"),
        ((0.00012, -0.0021, 0.0023), True, "+0.0001 [-0.0021, +0.0023]"),
        ((0.0, 0.0, 0.0), True, "0 [0, 0]"),
        ((2.25, 2.25, 2.25), False, "2.250 [2.250, 2.250]"),
        ((-0.001, -0.2, 0.2), True, "0.00 [-0.20, +0.20]"),
    ],
)
def test_digits_are_no_finer_than_the_interval(numbers: tuple[float, float, float], signed: bool, text: str) -> None:
    assert format_interval(*numbers, signed=signed) == text
