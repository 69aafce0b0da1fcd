"""Davidson's model, clustered intervals and the always-valid interval against closed forms and simulation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from etude.errors import EtudeError
from etude.preferences import always_valid, davidson
from etude.preferences.agreement import measure
from etude.preferences.clustering import Clusters
from etude.preferences.davidson import LEFT, RIGHT, TIE
from etude.preferences.pool import Ballots
from etude.preferences.shares import estimate_share


def votes(wins: int, ties: int, losses: int) -> np.ndarray:
    return np.repeat(np.array([LEFT, TIE, RIGHT], np.int8), [wins, ties, losses])


@pytest.mark.parametrize(("wins", "ties", "losses"), [(30, 0, 10), (12, 0, 25), (30, 15, 10), (5, 40, 9)])
def test_two_items_have_the_closed_form_with_and_without_ties(wins: int, ties: int, losses: int) -> None:
    """theta = log(wins / losses) and nu = ties / sqrt(wins losses); each vote a cluster gives the binomial variance."""
    y = votes(wins, ties, losses)
    fitted = davidson.fit(np.ones((len(y), 1)), y, Clusters.of(np.arange(len(y))))
    assert fitted.theta[0] == pytest.approx(np.log(wins / losses), abs=1e-9)
    assert np.exp(fitted.eta) == pytest.approx(ties / np.sqrt(wins * losses), abs=1e-9)
    n = len(y)
    assert fitted.covariance[0, 0] == pytest.approx((1 / wins + 1 / losses) * n / (n - 1), rel=1e-9)


def test_probabilities_are_davidsons_and_sum_to_one() -> None:
    strength = np.array([2.0, 0.5])
    nu = 0.7
    p = davidson.probabilities([np.log(strength[0] / strength[1])], np.log(nu))[0]
    total = strength.sum() + nu * np.sqrt(strength.prod())
    np.testing.assert_allclose(p, [2.0 / total, nu * 1.0 / total, 0.5 / total], rtol=1e-12)


def test_derivatives_and_information_are_those_of_the_likelihood() -> None:
    d, eta, h = np.array([0.3, -1.2, 2.0]), 0.4, 1e-6
    for outcome in (LEFT, TIE, RIGHT):
        y = np.full(3, outcome, np.int8)
        _, by_d, by_eta = davidson.log_likelihood(d, eta, y)
        numeric_d = (davidson.log_likelihood(d + h, eta, y)[0] - davidson.log_likelihood(d - h, eta, y)[0]) / (2 * h)
        numeric_eta = (davidson.log_likelihood(d, eta + h, y)[0] - davidson.log_likelihood(d, eta - h, y)[0]) / (2 * h)
        np.testing.assert_allclose(by_d, numeric_d, atol=1e-8)
        np.testing.assert_allclose(by_eta, numeric_eta, atol=1e-8)
    p = davidson.probabilities(d, eta)
    outer = np.zeros((3, 2, 2))
    for column, outcome in enumerate((LEFT, TIE, RIGHT)):
        _, by_d, by_eta = davidson.log_likelihood(d, eta, np.full(3, outcome, np.int8))
        score = np.stack([by_d, by_eta], axis=-1)
        outer += p[:, column, None, None] * score[:, :, None] * score[:, None, :]
    np.testing.assert_allclose(davidson.information(d, eta), outer, atol=1e-12)


def test_an_item_that_wins_every_vote_is_refused_and_not_given_a_number() -> None:
    with pytest.raises(EtudeError, match="won or lost every vote"):
        davidson.fit(np.ones((20, 1)), votes(20, 0, 0), Clusters.of(np.arange(20)))


@pytest.mark.parametrize("raters", [1, 12])
def test_clustered_intervals_cover_in_95_percent_of_simulations(raters: int) -> None:
    """60 prompts, 6 votes each, luck of prompts and raters, ties and a side bias.

    The win rate in 1,200 simulations (standard error of the coverage 0.6 %), the strength in 500 (1 %).
    """
    rng, prompts, each = np.random.default_rng(3), 60, 6
    prompt = np.repeat(np.arange(prompts), each)
    strengths, rates = [], []
    for i in range(1200):
        rater = rng.integers(raters, size=len(prompt))
        luck = rng.normal(size=prompts)[prompt] * 0.7 + (rng.normal(size=raters)[rater] * 0.4 if raters > 1 else 0)
        side = rng.choice([-1.0, 1.0], size=len(prompt))
        y = davidson.simulate(side * (0.6 + luck) + 0.3, np.log(0.5), rng)
        clusters = Clusters.of(prompt, rater)
        share = estimate_share((side * y + 1) / 2, clusters)
        rates.append((share.mean, share.low, share.high))
        if i < 500:
            fitted = davidson.fit(np.column_stack([side, np.ones_like(side)]), y, clusters)
            strengths.append(fitted.interval([1.0, 0.0]))
    for estimates in (strengths, rates):
        value, low, high = np.array(estimates).T
        truth = value.mean()  # of the marginal model, which is not the one that was drawn from
        assert 0.93 <= ((low <= truth) & (truth <= high)).mean() <= 0.97


def test_votes_of_one_prompt_that_agree_count_as_one() -> None:
    """Copies of a vote add nothing: the interval is that of the prompts alone."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, 50).astype(float)
    once = estimate_share(values, Clusters.of(np.arange(50)))
    copied = estimate_share(np.repeat(values, 8), Clusters.of(np.repeat(np.arange(50), 8)))
    assert copied.mean == once.mean
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=1e-12)


def test_a_share_of_equal_votes_has_an_interval_of_some_width() -> None:
    all_won = estimate_share(np.ones(40), Clusters.of(np.arange(40)))
    assert all_won.high == 1.0
    assert 0.85 < all_won.low < 0.95


@pytest.mark.parametrize(("spread", "nu"), [(0.0, 0.0), (0.0, 2.0), (1.0, 0.0), (1.0, 2.0)])
def test_the_best_predictor_meets_the_ceiling_where_pairs_are_alike_and_stays_below_it_elsewhere(
    spread: float, nu: float
) -> None:
    """40,000 pairs, each voted on twice with sides swapped: the standard error of the ceiling is below 0.5 %."""
    rng, n = np.random.default_rng(4), 40_000
    d = 1.2 + spread * rng.normal(size=n)
    eta = np.log(nu) if nu else -np.inf
    first, again = davidson.simulate(d, eta, rng), davidson.simulate(-d, eta, rng)
    pair, image, nobody = np.arange(1, n + 1), np.arange(n), np.zeros(n, np.int64)
    ballots = Ballots(
        pair=np.concatenate([pair, pair + n]),
        left=np.concatenate([image, image + n]),
        right=np.concatenate([image + n, image]),
        outcome=np.concatenate([first, again]),
        rater=np.full(2 * n, "ann"),
        repeats=np.concatenate([nobody, pair]),
        seconds=np.zeros(2 * n),
    )
    ceiling = measure(ballots, {int(each): str(each % n) for each in range(2 * n)}).ceiling
    p = davidson.probabilities(d, eta)
    best = float(np.maximum(p[:, 0], p[:, 2]).sum() / (p[:, 0] + p[:, 2]).sum())
    if spread:
        assert best + 0.005 < ceiling.low
    else:
        assert ceiling.low <= best <= ceiling.high
        assert ceiling.high - ceiling.low < 0.02


def _counts(votes: np.ndarray) -> list[np.ndarray]:
    """Wins, ties and losses after each vote of `[runs, votes]`."""
    return [np.cumsum(votes == value, axis=1) for value in (1.0, 0.5, 0.0)]


@pytest.mark.parametrize(("ties", "runs", "looks"), [(0.0, 3000, 300), (0.3, 1000, 120)])
def test_continuous_looking_rejects_a_true_half_in_at_most_5_percent(ties: float, runs: int, looks: int) -> None:
    rng = np.random.default_rng(1)
    votes = rng.choice([1.0, 0.5, 0.0], size=(runs, looks), p=[(1 - ties) / 2, ties, (1 - ties) / 2])
    wins, tied, losses = _counts(votes)
    if ties:
        held = always_valid.log_fortune(wins, tied, losses)
    else:  # the same numbers, from a table of all counts
        every = np.arange(looks + 1)
        held = always_valid.log_fortune(every[:, None], 0, every[None, :])[wins, losses]
    assert (held >= np.log(1 / always_valid.ALPHA)).any(axis=1).mean() <= 0.05
    usual = np.abs(np.cumsum(votes - 0.5, axis=1)) > 1.96 * np.sqrt((1 - ties) * np.arange(1, looks + 1)) / 2
    assert usual[:, 9:].any(axis=1).mean() > 0.2  # what looking at the usual 95 % interval does


def test_the_gamblers_fortune_is_a_martingale_exactly() -> None:
    """The mean of K after 6 votes with ties is 1 whatever the win rate that it is held against."""
    for wins, ties, losses in [(0.5, 0.0, 0.5), (0.3, 0.0, 0.7), (0.2, 0.5, 0.3)]:
        mean = 0.0
        for outcome in product(range(3), repeat=6):
            counts = [outcome.count(k) for k in range(3)]
            chance = np.prod([(wins, ties, losses)[k] for k in outcome])
            mean += chance * np.exp(always_valid.log_fortune(*counts, wins + ties / 2))
        assert mean == pytest.approx(1.0, abs=1e-12)


def test_the_always_valid_interval_covers_at_all_times_together() -> None:
    votes = (np.random.default_rng(2).random((500, 150)) < 0.7).astype(float)
    missed = (always_valid.log_fortune(*_counts(votes), 0.7) >= np.log(20)).any(axis=1).mean()
    assert missed <= 0.05


def test_a_clear_preference_ends_the_voting_and_a_fair_coin_ends_it_as_equal() -> None:
    assert always_valid.running(4, 0, 1).decision() is None
    assert always_valid.running(80, 0, 20).decision() == "A"
    assert always_valid.running(20, 0, 80).decision() == "B"
    assert always_valid.running(1000, 0, 1000).decision(0.1) == "equal"
    assert always_valid.running(0, 0, 0) == always_valid.Running(0, 0.5, 0.0, 1.0, 1.0)
    assert always_valid.running(0, 30_000, 0).low <= 0.5 <= always_valid.running(0, 30_000, 0).high


def test_swapping_the_sides_mirrors_the_interval() -> None:
    one, other = always_valid.running(40, 7, 20), always_valid.running(20, 7, 40)
    assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low), abs=1e-9)
