"""`etude.train` is the run of the command line in one call, and its result answers with estimates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from etude.config import TrainConfig, load_config
from etude.errors import EtudeError
from etude.measuring.statistics import Estimate
from etude.rewards import register
from etude.training.run import Run, train
from support.tiny import save_stable_diffusion


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("model")
    (root / "train.txt").write_text("red heart\npizza\n")
    (root / "held-out.txt").write_text("tiger\nsun\n")
    return {
        "model": str(save_stable_diffusion(root / "sd")),
        "iterations": 1,
        "rewards": {"redness": 1.0},
        "prompts": {"train": str(root / "train.txt"), "evaluation": str(root / "held-out.txt")},
        "sampling.num_steps": 3,
        "rollout.images_per_iteration": 4,
        "rollout.images_per_prompt": 2,
        "evaluation.num_images": 4,
        "evaluation.held_out_rewards": ["colorfulness"],
    }


@pytest.fixture(scope="module")
def run(overrides: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    register("redness")(lambda images, prompts, **metadata: images[:, 0].float().mean((1, 2)))
    return train("emoji-ddpo", tmp_path_factory.mktemp("runs") / "first", overrides)


def test_a_run_knows_where_it_is_and_what_it_ended_with(run: Run) -> None:
    assert run.config.sampling.num_steps == 3
    assert run.summary == json.loads((run.directory / "summary.json").read_text())
    final = run["redness"]
    assert isinstance(final.gap, Estimate)
    assert final.to_dict() == {q: run.summary["final"][q]["redness"] for q in ("ode", "sde", "gap", "improvement")}


def test_a_reward_that_was_not_evaluated_is_refused_with_those_that_were(run: Run) -> None:
    with pytest.raises(EtudeError, match=r"did you mean 'redness'.*colorfulness, redness"):
        run["rednes"]


def test_a_run_prints_its_final_table_and_repeats_itself_in_one_line(run: Run) -> None:
    lines = str(run).splitlines()
    assert lines[0] == f"run: {run.directory}"
    assert [line.split()[0] for line in lines[1:4]] == ["reward", "redness", "colorfulness"]
    assert str(run["redness"].improvement) in lines[2]
    assert "(held out)" in lines[3]
    assert "\x1b" not in str(run)
    assert repr(run).startswith(f"Run('{run.directory}', iteration 1, redness improvement {run['redness'].improvement}")


def test_the_model_of_a_run_is_the_base_with_its_adapter(run: Run) -> None:
    policy = run.load()
    assert policy.adapter == run.directory / "lora"
    assert policy.has_reference
    assert str(policy.source.name) == run.config.model


def test_a_finished_run_is_taken_up_as_it_is_and_not_begun_again(run: Run, overrides: dict[str, Any]) -> None:
    again = train("emoji-ddpo", run.directory, overrides, resume=True)
    assert again.summary["final"] == run.summary["final"]
    with pytest.raises(EtudeError, match=r"is not empty"):
        train("emoji-ddpo", run.directory, overrides)


def test_overrides_are_values_by_dotted_key_on_a_recipe_or_a_configuration(tmp_path: Path) -> None:
    changed = {"sampling.eta": 1.5, "rewards": {"module.name:reward": 2}, "objective.clip_nats": 1.0}
    config = load_config("emoji-ddpo", changed)
    assert (config.sampling.eta, config.rewards, config.objective.clip_range) == (1.5, {"module.name:reward": 2}, None)
    texts = ["sampling.eta=1.5", "rewards={'module.name:reward': 2}", "objective.clip_nats=1.0"]
    assert config == load_config("emoji-ddpo", texts) == load_config(load_config("emoji-ddpo"), changed)
    assert load_config(TrainConfig()) == TrainConfig()
    with pytest.raises(EtudeError, match=r"did you mean 'sampling.eta'"):
        train("emoji-ddpo", tmp_path / "run", {"sampling.etta": 1.0})
    with pytest.raises(EtudeError, match=r"the override of seed.eta: 'seed' is a value"):
        train(TrainConfig(), tmp_path / "run", {"seed.eta": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_policy_of_ones_own_is_trained_in_place(overrides: dict[str, Any], tmp_path: Path, run: Run) -> None:
    from etude.policies import load_policy

    policy = load_policy(overrides["model"], device="cpu")
    own = train("emoji-ddpo", tmp_path / "own", overrides, policy=policy)
    trained, loaded = policy.trainable(), run.load().network.state_dict()
    assert own["redness"] == run["redness"]
    assert all(torch.equal(value, loaded[name]) for name, value in trained.items())
