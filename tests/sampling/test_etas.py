"""Eta over iterations and over steps: the ends are exact, what stands still is the plain number, and a resumed run has the same bits."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.config import SamplingConfig, load_config, parse_config
from etude.errors import EtudeError
from etude.rewards import register
from etude.sampling.etas import Etas, compact, eta_text
from etude.sampling.kernels import GDDIM, make_kernel
from etude.sampling.paths import FlowPath, Grid
from etude.sampling.plans import SamplingPlan, StepTable
from etude.sampling.sampler import SDE
from etude.training.schedule import PlanSchedule, check_sampling
from etude.training.trackers import flatten
from etude.training.trainer import Trainer
from support.gaussian_policy import GaussianPolicy, read, sd_path
from support.small_runs import metrics, train_until, weights
from support.small_runs import same as same_weights

STEPS, ITERATIONS = 10, 9
GRIDS = {"vp": sd_path().grid(STEPS), "flow": FlowPath.from_config({"shift": 3.0}).grid(STEPS)}
LEVELS = st.floats(0.01, 5)


def sampling(**values: Any) -> SamplingConfig:
    return SamplingConfig.model_validate({"num_steps": STEPS, **values})


def plans(grid: Grid, **values: Any) -> PlanSchedule:
    return PlanSchedule(sampling(**values), grid, seed=0, iterations=ITERATIONS)


def same(a: StepTable, b: StepTable) -> bool:
    tensors = all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("timesteps", "a", "s", "x0", "eps", "std")
    )
    return tensors and a.trained == b.trained and a.stochastic == b.stochastic


@given(LEVELS, LEVELS, st.sampled_from(["linear", "cosine"]), st.integers(2, 300))
@settings(max_examples=60, deadline=None)
def test_a_schedule_reaches_its_ends_exactly_and_stays_between_them(
    first: float, last: float, kind: str, count: int
) -> None:
    over_iterations = Etas(first, last, kind, "iterations", count)
    values = [over_iterations.at(k, 1)[0] for k in range(1, count + 1)]
    assert (values[0], values[-1]) == (first, last)
    assert over_iterations.at(0, 1) == over_iterations.at(1, 1)
    tolerance = 1e-12 * max(first, last)
    assert all(min(first, last) - tolerance <= value <= max(first, last) + tolerance for value in values)
    assert all((b - a) * (last - first) >= -tolerance for a, b in itertools.pairwise(values))
    assert list(Etas(first, last, kind, "steps").at(5, count)) == values


def test_linear_is_even_and_cosine_is_half_way_in_the_middle_and_slow_at_the_ends() -> None:
    linear = [Etas(2.0, 1.0, "linear", "iterations", 5).at(k, 1)[0] for k in range(1, 6)]
    cosine = [Etas(2.0, 1.0, "cosine", "iterations", 5).at(k, 1)[0] for k in range(1, 6)]
    assert linear == [2.0, 1.75, 1.5, 1.25, 1.0]
    assert cosine[2] == pytest.approx(1.5, abs=1e-15)
    assert cosine[1] == pytest.approx(2 - (1 - 0.5**0.5) / 2, abs=1e-15)


@given(LEVELS, st.sampled_from(["linear", "cosine"]), st.sampled_from(["iterations", "steps"]))
@settings(max_examples=60, deadline=None)
def test_a_schedule_that_leads_nowhere_is_the_number_bit_for_bit(eta: float, kind: str, over: str) -> None:
    for etas in (Etas(eta, eta, kind, over, 7), Etas(eta, 9.0, "constant", over, 7)):
        assert {value for k in range(8) for value in etas.at(k, STEPS)} == {eta}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("window", [None, {"size": 3, "iters_per_shift": 1}])
def test_constant_etas_give_the_tables_of_the_plain_number(name: str, window: dict[str, Any] | None) -> None:
    plain = plans(GRIDS[name], eta=1.2, window=window)
    constant = {"eta": 1.2, "eta_schedule": {"kind": "constant"}}
    still = {"eta": 1.2, "eta_schedule": {"end": 1.2, "over": "steps"}}
    for values in (constant, still, {"eta": [1.2] * STEPS}):
        other = plans(GRIDS[name], window=window, **values)
        assert all(same(plain.table_at(k), other.table_at(k)) for k in range(1, ITERATIONS + 1))
        assert other.eta_at(3) == 1.2


@pytest.mark.parametrize("kernel", ["gddim", "cps", "ddim"])
@pytest.mark.parametrize("name", GRIDS)
def test_a_list_is_the_plan_of_its_etas(name: str, kernel: str) -> None:
    etas = [0.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.0]
    expected = SamplingPlan.from_etas(etas, partial(make_kernel, kernel)).tabulate(GRIDS[name])
    listed = plans(GRIDS[name], eta=etas, kernel=kernel)
    assert same(listed.table_at(1), expected)
    assert same(listed.table_at(ITERATIONS), expected)
    assert listed.eta_at(4) == etas
    assert listed.table_at(1).trained_steps == tuple(range(1, 9))


def test_the_table_of_an_iteration_is_that_of_its_eta_whatever_was_asked_before() -> None:
    moving = plans(GRIDS["vp"], eta=1.5, eta_schedule={"kind": "cosine", "end": 0.3})
    for iteration in (9, 1, 4, 4, 2):
        eta = moving.eta_at(iteration)
        assert isinstance(eta, float)
        assert same(moving.table_at(iteration), plans(GRIDS["vp"], eta=eta).table_at(1))
    assert (moving.eta_at(1), moving.eta_at(ITERATIONS)) == (1.5, 0.3)


@pytest.mark.parametrize("compression", [None, 0.4])
def test_a_window_takes_the_etas_of_the_steps_it_holds(compression: float | None) -> None:
    grid, etas = GRIDS["flow"], [0.1 * (i + 1) for i in range(STEPS)]
    window = {"size": 3, "iters_per_shift": 1, "compression": compression}
    everywhere = SamplingPlan.from_etas(etas).tabulate(grid)
    listed = plans(grid, eta=etas, window=window)
    moving = plans(grid, eta=1.5, eta_schedule={"end": 0.3}, window=window)
    for iteration in range(1, ITERATIONS + 1):
        inside = listed.table_at(iteration).trained_steps
        assert len(inside) == 3
        assert all(listed.table_at(iteration).std[i] == everywhere.std[i] for i in inside)
        assert listed.table_at(iteration).std.count_nonzero() == 3
        plain = plans(grid, eta=moving.eta_at(iteration), window=window)
        assert same(moving.table_at(iteration), plain.table_at(iteration))
        assert (moving.table_at(iteration).tail is None) == (compression is None)


def test_a_window_keeps_to_the_steps_that_a_list_makes_stochastic() -> None:
    etas = [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    listed = plans(GRIDS["vp"], eta=etas, window={"size": 2, "iters_per_shift": 1})
    assert {listed.window_at(k)["start"] for k in range(1, 20)} == {2, 3, 4}  # type: ignore[index]
    with pytest.raises(EtudeError, match="step 3 is deterministic between stochastic ones"):
        plans(GRIDS["vp"], eta=[1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], window={"size": 2})


@pytest.mark.parametrize("eta", [(0.5, 1.9), (1.9, 0.5)])
def test_an_eta_that_becomes_illegal_in_any_iteration_is_refused_before_the_first(eta: tuple[float, float]) -> None:
    with pytest.raises(EtudeError, match="largest"):
        plans(GRIDS["vp"], kernel="ddim", eta=eta[0], eta_schedule={"end": eta[1]})
    with pytest.raises(EtudeError, match="largest"):
        plans(GRIDS["vp"], kernel="ddim", eta=eta[0], eta_schedule={"end": eta[1], "over": "steps"})
    with pytest.raises(EtudeError, match="iteration 9 is so small that its noise rounds to 0"):
        plans(GRIDS["vp"], eta=1.0, eta_schedule={"end": 1e-60})


@pytest.mark.parametrize("kernel", ["gddim", "ddim", "cps"])
def test_what_is_legal_at_the_ends_of_a_schedule_is_legal_in_every_iteration(kernel: str) -> None:
    moving = plans(GRIDS["vp"], kernel=kernel, eta=1.0, eta_schedule={"kind": "cosine", "end": 0.05})
    assert {moving.table_at(k).trained_steps for k in range(1, ITERATIONS + 1)} == {tuple(range(STEPS))}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sampling.eta=[1, 0.5]"], r"eta lists 2 values for num_steps = 10; give one a step"),
        (["sampling.eta=[1, -1]", "sampling.num_steps=2"], r"sampling.eta = \[1, -1\]: input should be greater than or equal to 0"),
        (["sampling.eta=[a, 1]", "sampling.num_steps=2"], "valid number"),
        (["sampling.eta=[]"], "eta lists 0 values"),
        (["sampling.eta=[0, 0]", "sampling.num_steps=2"], "eta = 0 is the ODE"),
        (["sampling.eta=[1, 0]", "sampling.num_steps=2", "sampling.eta_schedule.end=0.5"], "which a schedule cannot move"),
        (["sampling.eta=[1, 0]", "sampling.num_steps=2", "evaluation.num_steps=3"], "needs an eta for each of its steps"),
        (["sampling.eta_schedule.end=0"], "eta_schedule.end = 0 is the ODE.*in that iteration"),
        (["sampling.eta=0", "sampling.eta_schedule.end=1"], "sampling.eta = 0 is the ODE.*in that iteration"),
        (["sampling.eta_schedule.kind=exponential"], "constant.*linear.*cosine"),
        (["sampling.eta_schedule.ende=0.2"], "did you mean 'sampling.eta_schedule.end'"),
        (["sampling.kernel=cps", "sampling.eta=0.5", "sampling.eta_schedule.end=1.5"], "CPS with eta 1.5 folds back"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_said(overrides: list[str], says: str) -> None:
    with pytest.raises(EtudeError, match=says):
        check_sampling(load_config("emoji-ddpo", overrides).sampling, trains_steps=True)


def test_over_steps_a_schedule_may_begin_or_end_with_the_ode() -> None:
    config = load_config("emoji-ddpo", ["sampling.eta_schedule.over=steps", "sampling.eta_schedule.end=0"])
    table = PlanSchedule(config.sampling, GRIDS["vp"], 0).table_at(1)
    assert table.trained_steps == tuple(range(STEPS - 1))


def test_the_configuration_says_its_etas_in_words_and_trackers_get_numbers() -> None:
    assert sampling(eta=1.2).eta_text == "1.2"
    assert (
        sampling(eta=1.2, eta_schedule={"end": 0.5, "kind": "cosine"}).eta_text == "1.2 to 0.5 over iterations (cosine)"
    )
    assert eta_text([1.5, 1.0, 0.2]) == "1.5 to 0.2 by step"
    assert compact((1.2, 1.2)) == 1.2
    assert flatten({"eta": [1.0, 0.5], "loss": 2.0}) == {"eta/0": 1.0, "eta/1": 0.5, "loss": 2.0}


def test_a_sampler_takes_a_list_as_its_plan_of_which_nothing_is_trained() -> None:
    expected = SamplingPlan.from_etas([1.0, 0.0, 0.5], trained=False)
    assert SDE([1.0, 0.0, 0.5], steps=3).plan() == expected


@pytest.fixture
def tree(tmp_path) -> dict[str, Any]:
    register("number")(lambda images, prompts, **metadata: read(images).float())
    (tmp_path / "prompts.txt").write_text("red heart\npizza\n")
    (tmp_path / "others.txt").write_text("moon\nhouse\n")
    return {
        "iterations": 3,
        "rewards": {"number": 1.0},
        "prompts": {"train": str(tmp_path / "prompts.txt"), "evaluation": str(tmp_path / "others.txt")},
        "rollout": {"images_per_iteration": 4, "images_per_prompt": 2, "batch_size": 4},
        "lora": {"rank": 0},
        "objective": {"clip_range": None, "clip_nats": 1.6, "batch_size": 16},
        "optimizer": {"learning_rate": 3e-2},
        "advantage": {"kind": "group"},
        "evaluation": {"every": 1, "num_images": 2, "grid_images": 2},
    }


def trainer(tree: dict[str, Any], out: Path, resume: bool = False, **values: Any) -> Trainer:
    config = parse_config({**tree, "sampling": {"eta": 1.2, "num_steps": STEPS, "guidance_scale": 1.0, **values}})
    policy = GaussianPolicy(0.0, 1.0, sd_path(), table=SamplingPlan.sde(STEPS, GDDIM(1.0)).tabulate(GRIDS["vp"]))
    return Trainer(config, out, resume=resume, policy=policy)


@pytest.mark.parametrize(
    "values",
    [
        {"eta_schedule": {"kind": "cosine", "end": 0.4}},
        {"eta_schedule": {"end": 0.4}, "window": {"size": 2, "iters_per_shift": 1}},
    ],
    ids=["ddpo", "mixgrpo"],
)
def test_a_resumed_run_under_a_schedule_ends_with_the_bits_of_one_never_stopped(tree, tmp_path, values) -> None:
    whole = trainer(tree, tmp_path / "whole", **values)
    whole.train()
    halted = trainer(tree, tmp_path / "halted", **values)
    train_until(halted, 2)
    resumed = trainer(tree, tmp_path / "halted", resume=True, **values)
    resumed.train()
    assert same_weights(weights(whole), weights(resumed))
    rows = metrics(tmp_path / "whole")
    assert rows == metrics(tmp_path / "halted")
    assert [row.get("eta") for row in rows] == [None, 1.2, pytest.approx(0.8), 0.4]
    assert [row["evaluation"]["eta"] for row in rows] == [1.2, 1.2, pytest.approx(0.8), 0.4]


def test_a_constant_schedule_is_the_same_run_and_a_list_says_itself_in_all_that_is_written(tree, tmp_path) -> None:
    short = {**tree, "iterations": 1}
    plain, constant = trainer(short, tmp_path / "a"), trainer(short, tmp_path / "b", eta_schedule={"kind": "constant"})
    plain.train()
    constant.train()
    assert same_weights(weights(plain), weights(constant))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    etas = [1.2] * 9 + [0.5]
    summary = trainer(short, tmp_path / "list", eta=etas).train()
    row = metrics(tmp_path / "list")[1]
    assert row["eta"] == row["evaluation"]["eta"] == summary["eta"] == etas
    for name in ("model/README.md", "report.html"):
        assert "1.2 to 0.5 by step" in (tmp_path / "list" / name).read_text()
