"""Trends over training: slopes that are known come out, as often as the intervals say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from etude.errors import EtudeError
from etude.study.inference import holm
from etude.study.study_file import load_study, parse_study
from etude.study.study_page import write_results
from etude.study.trend_tables import verdict
from etude.study.trends import _best, _ratio, pooled, slopes
from support.fake_study import SMALL, write

ITERATIONS = list(range(0, 201, 10))


def curves(rng, true, spread, seeds=3):
    """Gaps of made-up runs, [S, T] for each eta: a level, a slope and a random walk of each run's own, and noise."""
    t = np.array(ITERATIONS) / 100
    out = []
    for slope, deviation in zip(true, spread, strict=True):
        own = slope + deviation * rng.standard_normal((seeds, 1))
        walk = 0.1 * np.cumsum(rng.standard_normal((seeds, len(t))), axis=1)
        out.append(2 * rng.standard_normal((seeds, 1)) + own * t + walk + rng.standard_normal((seeds, len(t))))
    return out


def trials(true, spread, seeds=3, count=400):
    """How often each interval holds its slope, and how often Holm's test rejects a slope of 0 that is one."""
    rng, covered, rejected = np.random.default_rng(5), np.zeros(len(true)), 0
    for _ in range(count):
        rows = pooled([100 * slopes(ITERATIONS, each) for each in curves(rng, true, spread, seeds)])
        covered += [row["low"] <= slope <= row["high"] for row, slope in zip(rows, true, strict=True)]
        adjusted = holm([row["p"] for row in rows])
        rejected += any(p < 0.05 for p, slope in zip(adjusted, true, strict=True) if slope == 0)
    return covered / count, rejected / count


# 400 trials: three standard errors of a share of 95 % are 3.3 %, of one of 5 % too.
@pytest.mark.parametrize("seeds", [2, 3])
def test_slopes_are_covered_and_holms_test_keeps_its_level(seeds):
    covered, rejected = trials([0.0, 0.0, 0.0, 1.0, -2.0], [0.5] * 5, seeds)
    assert covered.min() > 0.917
    assert covered.mean() < 0.99
    assert rejected < 0.083


def test_a_group_with_twice_the_spread_is_covered_a_little_less():
    covered, rejected = trials([0.0] * 5, [0.5, 0.5, 0.5, 0.5, 1.0])
    assert covered[:4].min() > 0.93
    assert 0.83 < covered[4] < 0.95
    assert rejected < 0.1


def test_a_regression_on_all_evaluations_would_be_too_sure():
    rng, hits = np.random.default_rng(5), 0
    for _ in range(400):
        (values,) = curves(rng, [0.0], [0.5])
        found = stats.linregress(np.tile(ITERATIONS, 3), values.ravel())
        hits += abs(found.slope) < stats.t.ppf(0.975, values.size - 2) * found.stderr
    assert hits / 400 < 0.93


def test_a_slope_that_is_there_is_found():
    rng = np.random.default_rng(5)
    found = [pooled([100 * slopes(ITERATIONS, c) for c in curves(rng, [2.0] * 5, [0.5] * 5)]) for _ in range(100)]
    assert np.mean([row["p"] < 0.05 for rows in found for row in rows]) > 0.95


def test_slopes_are_least_squares():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, len(ITERATIONS)))
    expected = [stats.linregress(ITERATIONS, each).slope for each in values]
    assert slopes(ITERATIONS, values) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(EtudeError, match="at least 3"):
        slopes([0, 10], values[:, :2])


def test_one_group_is_students_t():
    values = np.array([1.0, 2.5, 4.0, 4.5])
    (row,) = pooled([values])
    known = stats.ttest_1samp(values, 0.0)
    assert row["p"] == pytest.approx(known.pvalue)
    assert (row["low"], row["high"]) == pytest.approx(known.confidence_interval(0.95))
    assert pooled([values[:1], values[1:2]])[0]["low"] is None


def test_fiellers_interval_holds_the_ratio_as_often_as_it_says():
    rng, hits = np.random.default_rng(3), 0
    for _ in range(400):
        rise = 5 + rng.standard_normal(3)
        gap = -0.3 * rise + 0.2 * rng.standard_normal(3)
        found = _ratio(gap, rise)
        hits += found is None or found["low"] <= -0.3 <= found["high"]
    assert 0.917 < hits / 400 < 0.983
    assert _ratio(np.array([1.0, -1.0, 2.0]), np.array([0.1, -0.2, 0.1])) is None  # no rise: the ratio may be anything


def test_the_best_iteration_is_chosen_by_the_other_seeds():
    """Of curves without a trend the largest value is above 0 and the cross-fitted one is not."""
    rng = np.random.default_rng(1)
    chosen = [_best(ITERATIONS, rng.standard_normal((3, len(ITERATIONS))))["mean"] for _ in range(300)]
    assert abs(np.mean(chosen)) < 3 * np.std(chosen) / 300**0.5
    peak = np.tile(-np.abs(np.array(ITERATIONS) - 120.0), (3, 1))
    assert _best(ITERATIONS, peak) == {**pooled([np.zeros(3)])[0], "iterations": [120] * 3}


@pytest.mark.parametrize(
    ("slope", "p", "start", "said"),
    [
        (1.0, 0.01, -2.0, "narrows"),
        (-1.0, 0.01, -2.0, "widens"),
        (1.0, 0.2, -2.0, "not sure"),
        (-1.0, 0.01, 2.0, "narrows"),
    ],
)
def test_a_gap_narrows_against_its_sign(slope, p, start, said):
    assert verdict({"mean": slope, "p_holm": p}, start) == said


def make(root, seeds):
    """A study of made-up scores whose gap halves in training: from 20 eta^2 / steps to half of it, in 8 iterations."""
    tree = {
        "name": "made up",
        "base": "emoji-ddpo",
        "overrides": {
            "iterations": 8,
            "evaluation.every": 2,
            "evaluation.held_out_rewards": ["alignment", "colorfulness"],
        },
        "seeds": seeds,
        "grids": [
            {"keys": {"rewards": ["colorfulness"], "sampling.eta": [0.5, 1.0, 2.0]}},
            {"keys": {"rewards": ["colorfulness"], "sampling.eta": [1.0], "sampling.num_steps": [50]}},
        ],
        "measurement": {"num_images": 32, "matrix": {"etas": [1.0]}, "shown": 3},
        "trends": {"reference_eta": 1.0, "periods": [[0, 4]]},
    }
    study = parse_study(tree)
    directory = write(study, lambda eta: 10 * eta - 3 * eta**2, root)
    page = write_results(study, directory)
    return directory, page, json.loads((directory.root / "results.json").read_text())["trends"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("trends"), [0, 1, 2])


def test_a_study_has_the_slopes_that_were_made_up(made):
    rows = [row for family in made[2]["families"] for row in family["rows"]]
    assert [row["eta"] for row in rows] == [0.5, 1.0, 2.0, 1.0]
    for row in rows:
        steps = 50 if "50 steps" in row["label"] else 10
        start = 20 * row["eta"] ** 2 / steps
        whole, early = row["slopes"]
        assert row["start"] == pytest.approx(start)
        assert whole["period"] == [0, 8]
        assert early["period"] == [0, 4]
        assert whole["mean"] == pytest.approx(-100 * start / 2 / 8)
        assert row["gap"]["mean"] == pytest.approx(start / 2)
        rise = 10 * row["eta"] - 3 * row["eta"] ** 2
        assert row["relative"]["mean"] == pytest.approx(start / 2 / rise)
        assert row["best"]["iterations"] == ([8, 8, 8] if rise > 0 else [0, 0, 0])


def test_the_gap_under_one_sde_is_the_models(made):
    """The made-up scores after training have the base model's gap under eta = 1: 2 in ten steps, 0.4 in fifty."""
    found = [row["reference"] for family in made[2]["families"] for row in family["rows"]]
    assert [row["before"]["mean"] for row in found] == pytest.approx([2.0, 2.0, 2.0, 0.4], abs=0.5)
    assert all(row["change"]["p_holm"] > 0.05 for row in found)


def test_equal_compute_is_reached_earlier_by_more_steps(made):
    (budget,) = made[2]["budgets"]
    at = {row["label"]: row["iteration"] for row in budget["rows"]}
    assert sorted(at.values()) == pytest.approx([8 / 5, 8, 8, 8])
    assert min(at, key=lambda label: at[label]).endswith("50 steps")


def test_the_tables_and_the_figures_are_written(made):
    text = (made[0].root / "tables.md").read_text()
    for title in (
        "Trend of the gap: colorfulness",
        "Gap under one SDE",
        "Final and best: colorfulness",
        "At equal compute: colorfulness",
    ):
        assert title in text
    names = {path.name for path in (made[0].root / "figures").glob("trend-of-the-gap*.svg")}
    assert any("slope-of-the-gap" in name for name in names)
    assert any("gap-over-training-eta-2" in name for name in names)
    assert "Slope of the gap against training η" in made[1].read_text()


def test_the_first_seed_is_shown_without_intervals(tmp_path):
    directory, _, trends = make(tmp_path, [0])
    row = trends["families"][0]["rows"][1]
    assert row["relative"] == {"mean": pytest.approx(1 / 7), "low": None, "high": None}
    assert "| −12.5 |" in (directory.root / "tables.md").read_text()  # 2 points lose 1 in 8 iterations


def test_wrong_trends_are_named():
    with pytest.raises(EtudeError, match="does not go forward"):
        parse_study({**SMALL, "trends": {"periods": [[50, 50]]}})
    with pytest.raises(EtudeError, match=r"add it to measurement\.matrix\.etas"):
        parse_study({**SMALL, "trends": {}})


def test_the_long_study_has_its_cells():
    study = load_study(Path(__file__).parents[2] / "studies" / "long" / "study.yaml")
    by_grid = Counter(cell.grid for cell in study.cells)
    assert by_grid["DDPO, jpeg_compressibility"] == 3 * 6
    assert len(study.cells) == 99
    assert all(cell.config.iterations >= 200 for cell in study.cells)
