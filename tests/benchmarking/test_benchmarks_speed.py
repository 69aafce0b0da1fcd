"""Laws of what the benchmarks of speed, scaling, cost and memory make of their measurements; the figures come from `make bench`."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from support.benchmark_runs import tiny_trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)


def test_a_line_is_found_exactly_whatever_the_weights() -> None:
    from benchmarks.fit import line

    x = [5.0, 10.0, 20.0, 40.0]
    for weights in (None, [4.0, 1.0, 2.0, 0.5]):
        found = line(x, [7.0 + 3.0 * a for a in x], weights)
        assert (found.intercept, found.slope, found.r2) == pytest.approx((7.0, 3.0, 1.0), rel=1e-12)
        assert found(100.0) == pytest.approx(307.0)


def test_the_least_squares_line_leaves_residuals_that_neither_shift_nor_turn_it() -> None:
    from benchmarks.fit import line

    x, y, weights = [1.0, 2.0, 3.0, 5.0], [2.0, 1.0, 4.0, 3.0], [1.0, 3.0, 0.5, 2.0]
    found = line(x, y, weights)
    left = [w * (b - found(a)) for a, b, w in zip(x, y, weights, strict=True)]
    assert sum(left) == pytest.approx(0, abs=1e-12)
    assert sum(a * b for a, b in zip(left, x, strict=True)) == pytest.approx(0, abs=1e-12)
    assert 0 < found.r2 < 1


def test_a_line_through_one_place_is_refused() -> None:
    from benchmarks.fit import line

    with pytest.raises(ValueError, match="two different x"):
        line([3.0, 3.0], [1.0, 2.0])


def _times(points: list[tuple[int, int]], seconds: Any) -> list[list[float]]:
    return [[slow * seconds(images * steps) for images, steps in points] for slow in (1.0, 1.1, 0.9)]


def test_a_cost_that_is_a_line_has_no_residual_and_one_that_is_not_has_its_own() -> None:
    from benchmarks.cost import _result

    points = [(images, steps) for images in (8, 16, 32) for steps in (5, 10, 20)]
    straight = _result(points, _times(points, lambda n: 0.2 + 0.01 * n), {}, {})
    assert straight.headline.ratio.median == pytest.approx(0, abs=1e-12)
    assert straight.measurements["fit"]["seconds_per_image_step"] == pytest.approx(0.01)
    bent = _result(points, _times(points, lambda n: 0.01 * n**1.5), {}, {})
    assert bent.headline.ratio.median > 0.1
    assert not bent.met


def test_two_processes_have_done_when_the_slower_one_has() -> None:
    from benchmarks.scaling import ONE, THREADS, TWO, _result

    def reply(seconds: float) -> dict[str, Any]:
        return {"seconds": seconds, "phases": {"rollout": seconds / 2, "update": seconds / 4}}

    rounds = [{ONE: [reply(4.0 * s)], TWO: [reply(2.0 * s), reply(2.5 * s)], THREADS: [reply(3.0 * s)]} for s in (1, 2)]
    result = _result({"recipe": rounds}, {}, {})
    assert result.headline.ratio.median == pytest.approx(1.6)
    assert (result.headline.met, result.rows[1][2]) == (False, "3750.0")


def test_micro_batches_are_held_against_the_fastest_of_the_same_round() -> None:
    from benchmarks.micro_batch import _result

    def reply(seconds: float) -> dict[str, Any]:
        return {"seconds": seconds, "phases": {"rollout": seconds / 2, "update": seconds / 2}}

    rounds = [{size: reply(s * t) for size, t in (("1", 9.0), ("12", 2.0), ("24", 2.1))} for s in (1.0, 5.0)]
    result = _result({"recipe": {"rounds": rounds, "peak_bytes": {"1": 1e6, "12": 2e6, "24": 3e6}}}, 24, {}, {})
    assert (result.headline.ratio.median, result.headline.ratio.high) == (pytest.approx(1.05), pytest.approx(1.05))
    assert "fastest (12)" in result.headline.name
    assert [row[6] for row in result.rows] == ["1", "2", "3"]


def test_a_rollouts_ratio_is_held_against_the_clip_range() -> None:
    from benchmarks.precision import SIDES, _result

    def reply(seconds: float, off: float) -> dict[str, Any]:
        found = {"rollout_ratio_deviation": off, "rollout_ratio_max_deviation": 9 * off, "clipfrac": 0.25}
        return {"seconds": seconds, "phases": {"rollout": seconds / 2}, "metrics": found}

    rounds = [{name: reply(1.0 + i, 1e-3 * i) for i, name in enumerate(SIDES)}]
    settings = {"device": "cpu", "threads": 1}
    result = _result({"recipe": {"rounds": rounds, "clip_range": 4e-3}}, settings, {})
    assert [row[3].partition(" ")[0] for row in result.rows] == ["1.000", "2.000", "3.000", "4.000"]
    assert [row[8] for row in result.rows] == ["0.000", "0.250", "0.500", "0.750"]
    assert result.met  # nothing has a target here


def test_what_memory_must_grow_by_is_what_one_more_of_it_takes() -> None:
    from benchmarks.memory import Sweep, _result

    sweep = Sweep("image", [], lambda info: info["images"], lambda info: 100.0)
    infos = [{"images": n, "peak_bytes": 10_000 + 110 * n, "versions": {}} for n in (16, 32, 64)]
    result = _result([sweep], {"image": infos}, {})
    assert result.headline.ratio.median == pytest.approx(1.1)
    assert result.rows[-1] == ["growth per image, bytes", "110.0", "100.0"]


def test_the_parts_of_a_profile_add_up_to_the_iteration() -> None:
    from benchmarks.profiled import BACKWARD, DECODE, FORWARD, SAMPLING, SAVE
    from benchmarks.where import _result, parts

    timed = {SAMPLING: 3.0, DECODE: 1.0, FORWARD: 2.0, BACKWARD: 3.0, SAVE: 0.5}
    one = {
        "seconds": 12.0,
        "phases": {"rollout": 5.0, "rewards": 0.25, "update": 6.0},
        "parts": timed,
        "operations": {"matrix products": 8.0, "other operations": 2.0},
        "operations_seconds": 12.5,
    }
    assert sum(parts(one).values()) == pytest.approx(one["seconds"])
    assert min(parts(one).values()) >= 0
    result = _result({"recipe": [one]}, {}, {})
    assert result.headline.ratio.median == pytest.approx(3 / 12)
    shares = {row[0]: row[1] for row in result.rows}
    assert shares["torch, matrix products"] == "64.0 %"
    assert shares["torch, between operations: Python"] == "20.0 %"


@pytest.mark.parametrize(
    ("operation", "group"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::convolution_backward", "convolutions"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::native_group_norm_backward", "normalisation"),
        ("aten::gelu_backward", "arithmetic by element"),
        ("aten::add_", "arithmetic by element"),
        ("aten::addcdiv_", "other operations"),
        ("aten::cat", "copies"),
        ("Optimizer.step#AdamW.step", "other operations"),
    ],
)
def test_every_operation_is_in_one_group(operation: str, group: str) -> None:
    from benchmarks.profiled import group_of

    assert group_of(operation) == group


def test_a_profile_leaves_the_iteration_as_it_is_and_finds_all_of_it(tmp_path: Path) -> None:
    from benchmarks.etude_side import _iterate
    from benchmarks.profiled import profile
    from benchmarks.where import parts

    trainer = tiny_trainer(tmp_path, ["lora.rank=2", "objective.kl_coef=0.1"])
    found = profile(trainer, lambda: _iterate(trainer), time.perf_counter)
    assert {"decode"} & vars(trainer.policy.pipeline.vae).keys() == set()
    assert {"step", "save", "backward"} & (
        vars(trainer.learner.optimizer).keys() | vars(trainer.durability).keys()
    ) == set()
    each = parts(found)
    assert sum(each.values()) == pytest.approx(found["seconds"])
    assert all(value > 0 for name, value in each.items())
    assert {"rollout: network", "rollout: network without the adapter", "replay: network, backward"} <= each.keys()
    assert found["operations"]["convolutions"] > 0
    assert math.fsum(found["operations"].values()) <= found["operations_seconds"]


def test_the_summary_lists_every_number_of_the_results_that_are_there(tmp_path: Path) -> None:
    from benchmarks.results import Headline, Ratio, Result
    from benchmarks.summary import collect, write

    first = Headline("a / b", Ratio.of([3.0], [2.0]), 1.4, at_most=True)
    heads = [Headline("c / d", Ratio.of([3.0], [2.0]), 1.2, at_most=False), Headline("e", Ratio.of([1.0], [1.0]))]
    Result("two", first, [], [], {}, {}, further=heads).write(tmp_path)
    Result("one", heads[1], [], [], {}, {}).write(tmp_path)
    lines = collect(tmp_path, ["one", "none", "two"])
    assert [(line.benchmark, line.headline.name) for line in lines] == [
        ("one", "e"),
        ("two", "a / b"),
        ("two", "c / d"),
        ("two", "e"),
    ]
    assert [line.cells[3:5] for line in lines] == [
        ["", ""],
        ["at most 1.4", "missed"],
        ["at least 1.2", "met"],
        ["", ""],
    ]
    path = write(tmp_path, lines)
    assert [one["met"] for one in json.loads(path.read_text())] == [True, False, True, True]
    assert path.with_suffix(".md").read_text().startswith("**1 of 2 targets met.**")


def test_the_table_of_all_ratios_is_that_of_the_results_beside_it(tmp_path: Path) -> None:
    from benchmarks.__main__ import BENCHMARKS, RESULTS
    from benchmarks.summary import collect, write

    path = write(tmp_path, collect(RESULTS, BENCHMARKS))
    for name in ("summary.json", "summary.md"):
        assert path.with_name(name).read_text() == (RESULTS / name).read_text()


@pytest.mark.slow
def test_a_group_of_processes_takes_the_iteration_of_one(tmp_path: Path) -> None:
    """Both have the same metrics, but for what rounding makes of them."""
    from benchmarks.against_trl import Comparison, Work, _recipe
    from benchmarks.etude_side import start
    from benchmarks.processes import Group
    from benchmarks.workload import save_pipeline

    pipeline = save_pipeline(tmp_path / "pipeline", (4, 8), 4)
    recipe = _recipe(tmp_path, pipeline, Comparison(Work((4, 8), 4, images=4, num_steps=2), (2, 1), (2, 2)), 0)
    settings = {"recipe": recipe, "overrides": [], "work": str(tmp_path)}
    (tmp_path / "one").mkdir()
    _, handlers = start({**settings, "work": str(tmp_path / "one")})
    assert handlers["iterate"]()["seconds"] > 0
    alone = handlers["metrics"]()
    with Group("benchmarks.etude_side", settings, 2, 1) as two:
        assert [reply["seconds"] > 0 for reply in two.ask("iterate")] == [True, True]
        assert two.info["images"] == 2
        shared = json.loads(next(path for path in tmp_path.glob("run-*/metrics.jsonl")).read_text())
    assert shared["reward"]["benchmarks.workload:brightness"] == pytest.approx(
        alone["reward"]["benchmarks.workload:brightness"], rel=1e-4
    )
