"""Which steps each iteration trains: a function of the iteration alone, on the steps that can be stochastic and on no other."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from etude.config import RolloutConfig, SamplingConfig, load_config, recipe_names
from etude.errors import EtudeError
from etude.learning.draws import draw_pairs, draw_prompts, most_starts, noise_keys
from etude.learning.exchange import share
from etude.prompts import PromptSet
from etude.rewards import names
from etude.sampling.kernels import GDDIM
from etude.sampling.noise import NoiseSource, keyed_generator
from etude.sampling.paths import FlowPath, Grid
from etude.sampling.plans import SamplingPlan
from etude.sampling.rollout import rollout
from etude.training.schedule import PlanSchedule
from support.gaussian_policy import GaussianPolicy, flow_path, sd_path
from support.tiny import flux
from support.tiny_flow import flux2_klein

STEPS = 10
PUBLISHED = {"flow_sde": "capped", "dance_sde": "sde", "cps": "sde"}


def flow_grid(num_steps: int = STEPS) -> Grid:
    return FlowPath.from_config({"num_train_timesteps": 1000, "shift": 3.0}).grid(num_steps)


def plans(grid: Grid | None = None, seed: int = 0, **sampling: Any) -> PlanSchedule:
    settings = {"num_steps": STEPS, "eta": 1.2, **sampling}
    return PlanSchedule(SamplingConfig.model_validate(settings), grid or flow_grid(), seed)


def test_without_a_window_every_step_that_can_be_stochastic_is_trained() -> None:
    flow = plans()
    assert flow.window_at(7) is None
    assert flow.table_at(7).trained_steps == tuple(range(1, STEPS - 1))  # not out of pure noise, not into clean data
    assert plans(sd_path().grid(STEPS)).table_at(1).trained_steps == tuple(range(STEPS))
    assert plans(first_step="sde").table_at(1).trained_steps == tuple(range(STEPS - 1))
    capped = plans(kernel="flow_sde", first_step="capped").table_at(1)
    assert capped.trained_steps == tuple(range(STEPS - 1))


def draws_by_a_published_flow_kernel(name: str) -> bool:
    """And trains the first step: the published windows of the newer models begin after it."""
    sampling = load_config(name).sampling
    first = sampling.window is None or not sampling.window.start
    return sampling.kernel in PUBLISHED and sampling.solver is None and first


@pytest.mark.parametrize("name", [name for name in recipe_names() if draws_by_a_published_flow_kernel(name)])
def test_a_recipe_with_a_published_flow_kernel_trains_the_step_out_of_pure_noise_as_published(name: str) -> None:
    sampling = load_config(name).sampling
    assert sampling.first_step == PUBLISHED[sampling.kernel]
    moving = PlanSchedule(sampling, flow_grid(sampling.num_steps), seed=0)
    assert 0 in {step for iteration in range(1, 30) for step in moving.table_at(iteration).trained_steps}


@pytest.mark.parametrize("strategy", ["progressive", "random", "decay", "fixed"])
@pytest.mark.parametrize("first_step", ["ode", "sde"])
def test_a_window_trains_its_own_steps_and_no_other_in_every_iteration(strategy: str, first_step: str) -> None:
    window = {"strategy": strategy, "size": 3, "iters_per_shift": 4, "decay_threshold": 2}
    moving = plans(window=window, first_step=first_step)
    visited = set()
    for iteration in range(1, 200):
        at = moving.window_at(iteration)
        assert at is not None
        steps = tuple(range(at["start"], at["start"] + 3))
        assert moving.table_at(iteration).trained_steps == steps
        assert [i for i, flag in enumerate(moving.table_at(iteration).stochastic) if flag] == list(steps)
        visited |= set(steps)
    trainable = set(plans(first_step=first_step).table_at(1).trained_steps)
    assert visited == ({min(trainable) + i for i in range(3)} if strategy == "fixed" else trainable)


def test_there_is_no_iteration_before_the_first() -> None:
    with pytest.raises(EtudeError, match="counts its iterations from 1"):
        plans(window={"strategy": "fixed", "size": 2}).table_at(0)


@pytest.mark.parametrize("strategy", ["progressive", "random", "decay"])
def test_the_plan_of_an_iteration_does_not_depend_on_what_was_asked_before(strategy: str) -> None:
    window = {"strategy": strategy, "size": 2, "iters_per_shift": 3}
    asked = list(range(1, 60))
    in_order = {i: plans(window=window).window_at(i) for i in asked}
    moving = plans(window=window)
    random.Random(0).shuffle(asked)
    for iteration in asked:
        found = in_order[iteration]
        assert found is not None
        assert moving.window_at(iteration) == found
        assert moving.table_at(iteration).trained_steps == tuple(range(found["start"], found["start"] + 2))


def test_another_seed_draws_other_windows() -> None:
    window = {"strategy": "random", "size": 2}
    first, second = plans(window=window, seed=0), plans(window=window, seed=1)
    assert [first.window_at(i) for i in range(1, 30)] != [second.window_at(i) for i in range(1, 30)]


def test_a_window_keeps_to_the_steps_it_was_given() -> None:
    moving = plans(window={"strategy": "random", "size": 2, "start": 3, "end": 7})
    starts = {moving.window_at(i)["start"] for i in range(1, 200)}  # type: ignore[index]
    assert starts == {3, 4, 5}


@pytest.mark.parametrize("compression", [0.2, 0.4, 1.0])
def test_flash_ends_without_noise_wherever_its_window_is(compression: float) -> None:
    moving = plans(window={"size": 3, "iters_per_shift": 1, "compression": compression})
    for iteration in range(1, 20):
        table = moving.table_at(iteration)
        at = moving.window_at(iteration)
        assert at is not None
        left = STEPS - at["start"] - 3
        assert table.tail is not None
        assert table.tail.num_steps == max(1, round(left * compression))
        assert (float(table.tail.a[-1]), float(table.tail.s[-1])) == (1.0, 0.0)
        assert table.num_evaluations == at["start"] + 3 + table.tail.num_steps


@pytest.mark.parametrize(
    ("grid", "sampling", "says"),
    [
        (flow_grid(), {"window": {"size": 9}}, "does not fit"),
        (flow_grid(2), {"num_steps": 2}, "no stochastic step"),
        (flow_grid(), {"kernel": "flow_sde", "first_step": "sde"}, "first_step|sigma"),
        (sd_path().grid(STEPS), {"kernel": "flow_sde"}, "flow"),
        (sd_path().grid(STEPS), {"kernel": "ddim", "eta": 1.9}, "largest|legal|limit"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_iteration(
    grid: Grid, sampling: dict[str, Any], says: str
) -> None:
    with pytest.raises(EtudeError, match=says):
        plans(grid, **sampling)


@pytest.mark.parametrize("name", [name for name in recipe_names() if "grpo" in name])
def test_the_recipes_of_flow_models_can_be_planned_on_their_grids(name: str) -> None:
    config = load_config(name)
    grid = flow_grid(config.sampling.num_steps)
    table = PlanSchedule(config.sampling, grid, config.seed).table_at(1)
    untrained = (
        2 if config.sampling.first_step == "ode" else 1
    )  # out of pure noise and into clean data, or the latter alone
    expected = config.sampling.window.size if config.sampling.window else config.sampling.num_steps - untrained
    assert len(table.trained_steps) == expected
    assert set(config.rewards) | set(config.evaluation.held_out_rewards) <= set(names())


@pytest.mark.parametrize("name", [name for name in recipe_names() if "grpo" in name and "sd35" not in name])
def test_every_layer_that_a_flux_recipe_names_exists(name: str) -> None:
    config = load_config(name)
    transformer = flux2_klein().transformer if name.startswith("flux2") else flux().transformer
    layers = [layer for layer, _ in transformer.named_modules()]
    assert [target for target in config.lora.targets if not any(layer.endswith(target) for layer in layers)] == []


def test_groups_that_share_noise_have_one_key_and_others_one_each() -> None:
    rollout = RolloutConfig(images_per_iteration=12, images_per_prompt=4, shared_noise=True)
    assert noise_keys(list(range(12)), rollout) == [0] * 4 + [4] * 4 + [8] * 4
    assert noise_keys([6, 7, 8, 9], rollout) == [4, 4, 8, 8]  # the second process of three
    assert noise_keys([6, 7, 8], rollout.model_copy(update={"shared_noise": False})) == [6, 7, 8]


@pytest.mark.parametrize("batch_size", [1, 2, 12])
@pytest.mark.parametrize(("images", "group", "processes"), [(12, 3, 4), (12, 3, 6), (12, 4, 3), (20, 4, 5), (18, 6, 4)])
def test_every_process_calls_the_network_equally_often_wherever_the_borders_cut_the_groups(
    images: int, group: int, processes: int, batch_size: int
) -> None:
    """And makes the images that one process makes. Collective calls would wait for each other for ever otherwise."""
    settings = RolloutConfig(images_per_iteration=images, images_per_prompt=group, shared_noise=True)
    starts = most_starts(images, settings, processes)
    policy = GaussianPolicy((1.5, -0.5), (0.25, 2.0), flow_path())
    table = SamplingPlan.window(6, GDDIM(1.2), 3, 2).tabulate(policy.grid(6))
    calls: list[int] = []
    predict = policy.predict

    def made(samples: list[int], starts: int | None, share_starts: bool = True) -> tuple[torch.Tensor, list[int], int]:
        calls.clear()
        steps: list[int] = []
        keys = noise_keys(samples, settings)
        trajectory = rollout(
            policy, table, policy.encode(["a"] * len(samples)), NoiseSource(0, "training"), samples, 1.0, batch_size,
            noise_samples=keys, prompts=["a"] * len(samples) if share_starts else None, starts=starts, on_step=steps.append,
        )  # fmt: skip
        return trajectory.latents, [*calls], sum(steps)

    policy.predict = lambda x, *rest: calls.append(len(x)) or predict(x, *rest)  # type: ignore[method-assign]
    own = [share(images, processes, index) for index in range(processes)]
    found = [made(samples, starts) for samples in own]
    assert len({tuple(shapes) for _, shapes, _ in found}) == 1  # as many calls, and of the same shapes
    assert {steps for *_, steps in found} == {6 * len(own[0])}
    alone = made(list(range(own[-1][-1] + 1)), None, share_starts=False)[0]
    for samples, (latents, *_) in zip(own, found, strict=True):
        torch.testing.assert_close(latents, alone[samples], atol=1e-5, rtol=1e-5)


def test_some_process_has_the_most_beginnings_and_none_has_more() -> None:
    rollout = RolloutConfig(images_per_iteration=12, images_per_prompt=3, shared_noise=True)
    assert [most_starts(12, rollout, processes) for processes in (1, 2, 3, 4, 6, 12)] == [4, 2, 2, 1, 2, 1]
    own = rollout.model_copy(update={"shared_noise": False})
    assert [most_starts(12, own, processes) for processes in (1, 2, 6)] == [12, 6, 2]  # nothing is shared


def test_every_prompt_comes_before_one_comes_twice() -> None:
    rollout = RolloutConfig(images_per_iteration=14, images_per_prompt=2)
    prompts = PromptSet(["a", "b", "c"], {"place": [0, 1, 2]})
    drawn, groups = draw_prompts(prompts, rollout, seed=0, iteration=3)
    captions = drawn.texts
    assert groups.tolist() == [i // 2 for i in range(14)]
    assert captions[0::2] == captions[1::2]
    assert set(captions[0:6]) == set(captions[6:12]) == {"a", "b", "c"}
    assert draw_prompts(prompts, rollout, 0, 3)[0] == drawn
    assert [prompts.texts[i] for i in drawn.metadata["place"]] == captions


@pytest.mark.parametrize(("fraction", "kept"), [(1.0, 5), (0.6, 3), (0.01, 1)])
def test_each_sample_trains_its_share_of_distinct_steps(fraction: float, kept: int) -> None:
    rows, columns = draw_pairs(torch.tensor([4, 2, 9]), 5, fraction, keyed_generator(0, "update", 1))
    pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) == 3 * kept
    assert sorted(rows.tolist()) == sorted([4, 2, 9] * kept)
    assert all(0 <= column < 5 for column in columns.tolist())


def counted(moving: PlanSchedule, iterations: range, group: int = 12) -> tuple[int, int, float]:
    """Evaluations of the network for one group with shared noise: without gradients, and with; and the mean of one image alone."""
    tables = [moving.table_at(iteration) for iteration in iterations]
    forwards = sum(t.prefix_steps + group * (t.num_evaluations - t.prefix_steps) for t in tables)
    steps = sum(t.num_evaluations for t in tables) / len(tables)
    return forwards, sum(group * len(t.trained_steps) for t in tables), steps


def test_the_cost_of_flash_that_its_page_gives_is_that_of_the_plans() -> None:
    page = (Path(__file__).parents[2] / "docs" / "concepts" / "mixgrpo.md").read_text()
    window = {"size": 4, "iters_per_shift": 1}
    for compression, expected in ((None, 3690), (0.4, 2190)):
        moving = plans(flow_grid(25), num_steps=25, window={**window, "compression": compression})
        assert counted(moving, range(1, 21))[:2] == (expected, 960)
    assert "(2190 + 960 c) / (3690 + 960 c)" in page
    config = load_config("flux-mixgrpo-flash")
    assert config.rollout.images_per_prompt == 12
    assert config.memory.gradient_checkpointing  # c = 3
    dwell = config.sampling.window.iters_per_shift
    visits = range(1, config.iterations + 1, dwell)
    flash = counted(PlanSchedule(config.sampling, flow_grid(25), seed=0), visits)
    mixed = counted(PlanSchedule(load_config("flux-mixgrpo").sampling, flow_grid(25), seed=0), visits)
    assert (flash[:2], mixed[:2], round(flash[2], 1)) == ((1530, 576), (2874, 576), 15.7)
    assert "$(1530 + 576 c) / (2874 + 576 c)$, which is 0.71 at their $c = 3$" in " ".join(page.split())
    assert round((1530 + 576 * 3) / (2874 + 576 * 3), 2) == 0.71
