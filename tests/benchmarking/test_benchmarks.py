"""Laws of the benchmarks' harness, at the smallest size; the figures themselves come from `make bench`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from support.benchmark_runs import tiny_trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m benchmarks` runs from the root of the repository, and so do these."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)


def _result(numerators: list[float], denominators: list[float], target: float = 2.0, at_most: bool = False):
    from benchmarks.results import Headline, Ratio, Result

    headline = Headline("a / b", Ratio.of(numerators, denominators), target, at_most)
    return Result(
        "example", headline, ["work", "ms"], [["one", "1.0"]], {"seed": 0}, {"pairs": []}, {"etude": {"torch": "2"}}
    )


def test_a_ratio_is_the_median_over_pairs_and_not_the_ratio_of_medians() -> None:
    from benchmarks.results import Ratio

    ratio = Ratio.of([1.0, 10.0, 6.0], [1.0, 2.0, 3.0])
    assert (ratio.low, ratio.median, ratio.high, ratio.pairs) == (1.0, 2.0, 5.0, 3)


def test_a_machine_that_slows_down_during_a_run_leaves_the_ratio_alone() -> None:
    from benchmarks.results import Ratio

    slowdown = [1.0, 1.5, 2.0, 4.0]
    ratio = Ratio.of([3 * s for s in slowdown], [2 * s for s in slowdown])
    assert ratio.low == ratio.median == ratio.high == 1.5


def test_measurements_that_do_not_pair_up_are_refused() -> None:
    from benchmarks.results import Ratio

    for numerators, denominators in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError):
            Ratio.of(numerators, denominators)


@pytest.mark.parametrize(
    ("at_most", "median", "met"), [(True, 1.9, True), (True, 2.1, False), (False, 1.9, False), (False, 2.1, True)]
)
def test_a_target_is_met_on_its_own_side_only(at_most: bool, median: float, met: bool) -> None:
    assert _result([median], [1.0], 2.0, at_most).headline.met is met


def test_a_written_result_holds_what_is_needed_to_judge_it(tmp_path: Path) -> None:
    path = _result([3.0, 2.0], [1.0, 1.0]).write(tmp_path)
    found = json.loads(path.read_text())
    assert set(found) == {
        *("benchmark", "headline", "further", "columns", "rows", "settings", "measurements", "versions"),
        *("date", "machine", "etude"),
    }
    assert found["headline"] == {
        "name": "a / b",
        "ratio": {"median": 2.5, "low": 2.0, "high": 3.0, "pairs": 2},
        "target": 2.0,
        "at_most": False,
        "met": True,
    }
    assert set(found["machine"]) == {"processor", "cores", "system", "python", "load"}
    table = path.with_suffix(".md").read_text().splitlines()
    assert table[2:5] == ["| work | ms |", "| --- | --- |", "| one | 1.0 |"]


def test_the_measuring_process_loads_no_network_library() -> None:
    """It shares two cores with what it measures."""
    import subprocess

    code = "import sys; from benchmarks import __main__; print([m for m in ('torch', 'diffusers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("rank", [0, 2])
def test_the_bare_calls_are_those_of_the_iteration_and_leave_the_weights_alone(tmp_path: Path, rank: int) -> None:
    """2 batches of 3 guided steps and a decode each, and for each of 2 updates 6 pairs in micro-batches of 4."""
    from benchmarks.bare import record, run_bare
    from benchmarks.etude_side import _iterate

    trainer = tiny_trainer(tmp_path, [f"lora.rank={rank}"])
    with record(trainer.policy) as calls:
        _iterate(trainer)
    kinds = [call.kind for call in calls]
    assert kinds.count("forward") == 2 * 3
    assert kinds.count("forward_backward") == 2 * 2
    assert kinds.count("decode") == 2
    rows = [len(call.arguments[0]) for call in calls if call.kind == "forward_backward"]
    assert rows == [8, 4, 8, 4]  # conditional and unconditional together
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    timed = run_bare(calls, time.perf_counter)
    assert all(one.seconds > 0 for one in timed)
    assert sum(one.calls for one in timed) == len(calls)
    assert [one.rows for one in timed if one.kind == "forward_backward"] == rows
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.parameters.values())
    assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())


def test_recording_leaves_the_iteration_as_it_is(tmp_path: Path) -> None:
    from benchmarks.bare import record
    from benchmarks.etude_side import _iterate

    found = []
    for name, recorded in (("with", True), ("without", False)):
        (tmp_path / name).mkdir()
        trainer = tiny_trainer(tmp_path / name, [])
        if recorded:
            with record(trainer.policy):
                _iterate(trainer)
        else:
            _iterate(trainer)
        found.append(torch.cat([p.detach().flatten() for p in trainer.parameters.values()]))
        assert "decode" not in vars(trainer.policy.pipeline.vae)
    assert torch.equal(*found)


@pytest.mark.slow
def test_the_command_measures_and_writes(tmp_path: Path) -> None:
    """The whole way once: processes, their protocol, the table and the files."""
    from benchmarks import __main__ as command
    from benchmarks.against_trl import Comparison, Work, _recipe
    from benchmarks.workload import save_pipeline

    pipeline = save_pipeline(tmp_path / "pipeline", (4, 8), 4)
    recipe = _recipe(tmp_path, pipeline, Comparison(Work((4, 8), 4, images=2, num_steps=2), (2, 1), (2, 2)), 0)
    code = command.main(
        ["overhead", "--recipe", recipe, "--repeats", "1", "--threads", "1", "--out", str(tmp_path / "results")]
    )
    found = json.loads((tmp_path / "results" / "overhead.json").read_text())
    assert code == 0
    assert found["headline"]["ratio"]["median"] > 1
    assert found["settings"]["threads"] == 1
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert [line["benchmark"] for line in summary] == ["overhead"]
    assert summary[0]["ratio"] == found["headline"]["ratio"]
    assert [row[0] for row in found["rows"]][:2] == ["iteration", "bare network"]


def test_a_process_that_dies_is_reported_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.processes import Side

    monkeypatch.setattr("benchmarks.processes.BUILD", tmp_path)
    with pytest.raises(RuntimeError, match="KeyError: 'directory'"):
        Side(sys.executable, "benchmarks.pipeline_side", {"channels": [4, 8]})


def test_the_bare_calls_of_a_shared_prefix_are_those_of_its_groups(tmp_path: Path) -> None:
    """1 group of 4 images and 6 steps, a window at step 2: rows of 1 before it, of 4 from there on, and 2 steps replayed."""
    from benchmarks.bare import by_kind, record, run_bare
    from benchmarks.etude_side import _iterate
    from benchmarks.mixgrpo import MIXED, Work, _settings
    from benchmarks.workload import save_flux
    from etude.config import load_config
    from etude.training.trainer import Trainer

    work = Work(images=4, group=4, num_steps=6, window=2, updates=1, batch=4)
    recipe = _settings(tmp_path, work, str(save_flux(tmp_path / "pipeline", 1, 4)), MIXED, 0)["recipe"]
    (tmp_path / "run").mkdir()
    trainer = Trainer(load_config(recipe, ["iterations=1000", "evaluation.every=1000"]), tmp_path / "run")
    trainer.ledger.iteration = 1
    with record(trainer.policy) as calls:
        _iterate(trainer)
    rows = [(call.kind, len(call.keywords["hidden_states"])) for call in calls if call.kind != "decode"]
    assert rows == [("forward", 1)] * 2 + [("forward", 4)] * 4 + [("forward_backward", 4)] * 2
    assert all(value > 0 for value in by_kind(run_bare(calls, time.perf_counter)).values())


def test_the_table_of_mixgrpo_compares_what_was_measured_in_the_same_round() -> None:
    """A row of the network alone costs 1 ms, 1.5 ms in the shared steps and 2 ms with gradients."""
    from benchmarks.mixgrpo import FLASH, FULL, MIXED, RECORDED, UNSHARED, Work, _result, bound

    def one(slowdown: float) -> dict[str, object]:
        seconds = {FULL: 10.0, MIXED: 4.0, UNSHARED: 5.0, FLASH: 2.0}
        timed = [
            {"kind": kind, "rows": rows, "calls": 3, "seconds": 3e-3 * rows * each * slowdown}
            for kind, rows, each in (("forward", 4, 1.5), ("forward", 24, 1.0), ("forward_backward", 24, 2.0))
        ]
        calls = {
            "seconds": 4.4 * slowdown,
            "bare": {"forward": 3 * slowdown, "forward_backward": slowdown},
            "timed": timed,
        }
        return {**{name: value * slowdown for name, value in seconds.items()}, RECORDED: calls}

    side = {"trained_steps": 4, "threads": 1, "parameters": 5, "versions": {"torch": "2"}}
    rounds = [one(s) for s in (1.0, 3.0, 2.0)]
    result = _result(Work(), rounds, dict.fromkeys((FULL, MIXED, UNSHARED, FLASH, RECORDED), side), {"seed": 0})
    assert (result.headline.ratio.median, result.headline.met) == (pytest.approx(0.4), True)
    assert [row[4].partition(" ")[0] for row in result.rows] == [
        "",
        "0.400",
        "1.250",
        "0.500",
        "1.100",
        "",
        "1.500",
        "2.000",
        "",
    ]
    assert [row[5] for row in result.rows[1:5]] == ["0.400", "1.250", "0.500", "1.100"]
    assert [row[6].rpartition(" ")[2] for row in result.rows][:4] == ["", "met", "", "met"]
    assert (result.rows[5][2], result.rows[-1][5]) == ("2.0", f"{bound(Work(), 2.0):.3f}")


def test_the_target_of_flash_is_set_against_the_sum_of_a_round_and_not_the_median_of_its_places() -> None:
    from benchmarks.mixgrpo import FLASH, FULL, MIXED, RECORDED, UNSHARED, Work, _result, _whole_rounds

    sizes = [(kind, rows) for kind in ("forward", "forward_backward") for rows in (4, 24)]
    timed = [{"kind": kind, "rows": rows, "calls": 1, "seconds": 1.0} for kind, rows in sizes]
    calls = {"seconds": 1.0, "bare": {"forward": 1.0}, "timed": timed}
    seconds = [(1.0, 0.5), (1.0, 0.5), (8.0, 8.0)]
    rounds = [{FULL: 10.0, MIXED: m, UNSHARED: m, FLASH: f, RECORDED: calls} for m, f in seconds]
    side = {"trained_steps": 4, "threads": 1, "parameters": 5, "versions": {"torch": "2"}}
    flash = _result(Work(), rounds, dict.fromkeys((FULL, MIXED, UNSHARED, FLASH, RECORDED), side), {"seed": 0}).rows[3]
    assert flash[4:] == ["0.500 (0.500 to 1.000)", "0.900", "at most 0.75: missed"]
    ratio = _whole_rounds(Work(), [1.0] * 20 + [3.0] * 20, [2.0] * 40)
    assert (ratio.low, ratio.high, ratio.pairs) == (0.5, 1.5, 2)


@pytest.mark.parametrize("compression", [None, 0.4])
def test_the_benchmarks_count_of_evaluations_is_that_of_the_plans(compression: float | None) -> None:
    from benchmarks.mixgrpo import Work, bound, evaluations
    from etude.sampling.kernels import GDDIM
    from etude.sampling.paths import FlowPath
    from etude.sampling.plans import SamplingPlan
    from etude.sampling.windows import trainable_range

    work, grid = Work(), FlowPath.from_config({}).grid(25)
    possible = trainable_range(SamplingPlan.sde(25, GDDIM(1.2)).tabulate(grid))
    assert work.places == range(possible.start, possible.stop - work.window + 1)
    forwards = trained = 0
    for start in work.places:
        table = SamplingPlan.window(25, GDDIM(1.2), start, work.window, compression=compression).tabulate(grid)
        forwards += table.prefix_steps + work.group * (table.num_evaluations - table.prefix_steps)
        trained += work.group * len(table.trained_steps)
    assert (
        evaluations(work, compression) == (forwards, trained) == ((3690, 960) if compression is None else (2190, 960))
    )
    assert bound(work, 2.0) == pytest.approx((2190 + 960 * 2) / (3690 + 960 * 2))
