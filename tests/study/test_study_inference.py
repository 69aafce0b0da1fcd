"""Intervals over seeds and prompts cover the truth, and Holm's correction is the textbook's."""

from __future__ import annotations

import numpy as np
import pytest

from etude.errors import EtudeError
from etude.measuring.statistics import estimate_mean
from etude.study.inference import effect, holm


def coverage(seed_sd, prompt_sd, rest_sd, seeds=3, prompts=32, images=2, trials=400):
    """How often the interval holds the true mean 0, on data with those standard deviations."""
    rng, clusters, hits = np.random.default_rng(7), np.tile(np.arange(prompts), images), 0
    for _ in range(trials):
        a, b = seed_sd * rng.standard_normal((seeds, 1)), prompt_sd * rng.standard_normal(prompts)
        values = a + b[clusters] + rest_sd * rng.standard_normal((seeds, len(clusters)))
        found = effect(list(values), clusters, resamples=200)
        hits += found.low <= 0 <= found.high
    return hits / trials


# 400 trials: three standard errors of a share of 95 % are 3.3 %.
@pytest.mark.parametrize(
    ("deviations", "least", "most"),
    [
        ((1.0, 1.0, 1.0), 0.9, 0.98),  # Satterthwaite is a little too bold where seeds matter most: 93 to 94 %
        ((0.3, 1.0, 1.0), 0.917, 0.98),
        ((0.0, 1.0, 1.0), 0.917, 0.995),
        ((0.0, 0.0, 1.0), 0.917, 1.0),  # the floor makes it wider than it need be
    ],
)
def test_intervals_over_three_seeds_cover_the_truth(deviations, least, most):
    assert least <= coverage(*deviations) <= most


def test_a_percentile_bootstrap_of_three_seeds_would_not():
    rng, hits = np.random.default_rng(7), 0
    for _ in range(400):
        values = rng.standard_normal(3)
        means = values[rng.integers(3, size=(200, 3))].mean(axis=1)
        hits += np.quantile(means, 0.025) <= 0 <= np.quantile(means, 0.975)
    assert hits / 400 < 0.85


def test_one_seed_gives_the_standard_error_clustered_by_prompt():
    rng = np.random.default_rng(3)
    clusters = np.tile(np.arange(20), 4)
    values = rng.standard_normal(80) + np.arange(20)[clusters] / 5
    found, known = effect([values], clusters), estimate_mean(values, clusters)
    assert found.mean == pytest.approx(known.mean)
    assert found.standard_error == pytest.approx(known.standard_error, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=0.25 * known.standard_error)


def test_the_standard_error_is_that_of_the_two_way_table():
    rng = np.random.default_rng(0)
    means = rng.standard_normal((4, 6)) + np.arange(4)[:, None] + 2 * np.arange(6)
    found = effect(list(means), range(6))
    rows, columns = means.mean(1), means.mean(0)
    residual = means - rows[:, None] - columns + means.mean()
    expected = (6 * rows.var(ddof=1) + 4 * columns.var(ddof=1) - (residual**2).sum() / 15) / 24
    assert found.standard_error == pytest.approx(np.sqrt(expected), rel=1e-12)
    assert (found.seeds, found.clusters, found.n) == (4, 6, 24)


def test_prompts_with_other_numbers_of_images_weigh_the_same():
    found = effect([[0.0, 2.0, 10.0], [0.0, 2.0, 10.0]], ["a", "a", "b"])
    assert found.mean == pytest.approx(5.5)


def test_equal_values_have_no_width_and_no_p_value():
    found = effect([[3.0] * 4, [3.0] * 4], [0, 0, 1, 1])
    assert (found.mean, found.low, found.high, found.p) == (3.0, 3.0, 3.0, None)


def test_results_are_a_pure_function_of_the_values():
    values, clusters = [np.arange(8.0), np.arange(8.0)[::-1]], np.arange(8) % 4
    assert effect(values, clusters) == effect(values, clusters)


def test_holm_is_the_textbook_example():
    # Holm (1979) as taught: 0.01, 0.04, 0.03, 0.005 become 0.03, 0.06, 0.06, 0.02.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_holm_never_rejects_what_bonferroni_keeps_less():
    rng = np.random.default_rng(1)
    p = rng.random(12)
    adjusted = np.array(holm(list(p)), dtype=float)
    assert (adjusted <= np.minimum(1, 12 * p) + 1e-15).all()
    assert (adjusted >= p).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


@pytest.mark.parametrize(
    ("values", "clusters", "words"),
    [
        ([[1.0, 2.0], [1.0]], [0, 1], "one value per image"),
        ([[1.0, 2.0]], [0, 0], "at least 2 prompts or 2 seeds"),
        ([[1.0, float("nan")]], [0, 1], "finite"),
        ([], [0, 1], "no seed"),
    ],
)
def test_values_that_allow_no_interval_are_refused(values, clusters, words):
    with pytest.raises(EtudeError, match=words):
        effect(values, clusters)
