"""A held-out reward that falls stops the run, and the best weights are kept: under a resume too, and with the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from etude.config import TrainConfig, load_config, parse_config, parse_rewards
from etude.errors import EtudeError
from etude.measuring.statistics import estimate_mean
from etude.rewards import register
from etude.training.guards import BestWeights, confirmation, explain_stop, fallen
from etude.training.trainer import Trainer
from support.small_runs import redness, train_until
from support.tiny import save_stable_diffusion


def measured(**changes: float) -> dict[str, Any]:
    """An evaluation in which each reward changed by that much, give or take a little."""
    around = torch.tensor([-0.1, 0.1] * 8)
    values = {
        name: estimate_mean((change + around).numpy(), list(range(16))).to_dict() for name, change in changes.items()
    }
    return {"ode": values, "improvement": values}


def test_a_reward_has_fallen_when_its_whole_interval_lies_below_the_limit() -> None:
    assert fallen(measured(a=-0.4), {"a": 0.2}) == "a"
    assert fallen(measured(a=-0.21), {"a": 0.2}) is None
    assert fallen(measured(a=0.4), {"a": 0.0}) is None
    assert fallen(measured(a=0.4, b=-9.0, c=-9.0), {"a": 0.0, "c": 1.0, "b": 1.0}) == "c"
    assert fallen(measured(a=-9.0), {}) is None
    assert fallen({}, {"a": 0.0}) is None


def test_the_reason_names_the_reward_its_change_the_limit_and_the_iteration() -> None:
    reason = explain_stop(measured(a=-0.4), {"a": 0.2}, 7, 100)
    assert reason is not None
    for part in ("iteration 7 of 100", ": a under", "-0.400 [", "beyond the 0.2", "evaluation.stop_on_fall"):
        assert part in reason
    assert explain_stop(measured(a=0.4), {"a": 0.2}, 7, 100) is None


def test_the_best_is_the_first_of_the_highest_and_never_the_base_model() -> None:
    best, parameter = BestWeights("a"), torch.zeros(2)
    for iteration, mean in enumerate([9.0, 1.0, 3.0, 2.0, 3.0]):
        best.offer(iteration, measured(a=mean), {"w": parameter.fill_(iteration)})
    assert (best.iteration, best.weights["w"].tolist()) == (2, [2.0, 2.0])
    copy = BestWeights("a")
    copy.load_state(best.weights, json.loads(json.dumps(best.state())))
    copy.offer(5, measured(a=3.0), {"w": parameter})
    assert (copy.iteration, copy.evaluation) == (best.iteration, best.evaluation)
    nothing = BestWeights(None)
    nothing.offer(1, measured(a=1.0), {"w": parameter})
    assert nothing.weights == {}


@pytest.mark.parametrize("key", ["checkpoint.best=pickscore", "evaluation.stop_on_fall.pickscore=0.1"])
def test_a_guard_must_name_a_reward_that_is_measured(key: str) -> None:
    with pytest.raises(EtudeError, match=r"'pickscore', which is not measured.*one of colorfulness, alignment\.$"):
        load_config("emoji-ddpo", [key])
    assert load_config("emoji-ddpo", [key, "evaluation.held_out_rewards=[pickscore]"])
    assert load_config("emoji-ddpo", [key, "rewards.pickscore=1"])
    with pytest.raises(EtudeError, match="weighted_sum"):
        load_config("emoji-ddpo", ["checkpoint.best=weighted_sum"])
    assert load_config("emoji-ddpo", ["checkpoint.best=weighted_sum", "rewards.pickscore=1"])


def test_a_fall_is_allowed_by_no_less_than_nothing() -> None:
    with pytest.raises(EtudeError, match="greater than or equal to 0"):
        load_config("emoji-ddpo", ["evaluation.stop_on_fall.alignment=-0.1"])
    config = load_config("emoji-ddpo", ["evaluation.stop_on_fall.my.module:fn=0", "rewards.my.module:fn=1"])
    assert config.evaluation.stop_on_fall == {"my.module:fn": 0.0}


def test_rewards_given_apart_take_the_place_of_the_recipes_and_are_not_held_out() -> None:
    config = load_config("emoji-ddpo", rewards={"alignment": 2.0, "hpsv2": 0.5})
    assert config.rewards == {"alignment": 2.0, "hpsv2": 0.5}
    assert config.evaluation.held_out_rewards == []
    assert load_config("emoji-ddpo", rewards={}) == load_config("emoji-ddpo")


@pytest.mark.parametrize(
    ("item", "name", "weight"),
    [
        ("pickscore", "pickscore", 1.0),
        ("pickscore=0.5", "pickscore", 0.5),
        ("my.module:score=2", "my.module:score", 2.0),
        ("http://127.0.0.1:8000/score?model=a", "http://127.0.0.1:8000/score?model=a", 1.0),
        ("clip_score:prefix=a photo of", "clip_score:prefix=a photo of", 1.0),
        ("pickscore:/models/p,batch_size=4=1", "pickscore:/models/p,batch_size=4", 1.0),
    ],
)
def test_a_weight_is_the_number_after_the_last_equals_sign(item: str, name: str, weight: float) -> None:
    assert parse_rewards([item]) == {name: weight}


class Scripted:
    """A reward whose value is scripted by call: evaluations call a held-out reward twice, for the ODE and then for the SDE."""

    def __init__(self, *levels: float) -> None:
        self.levels, self.calls = levels, 0

    def __call__(self, images, prompts, **metadata):
        level = self.levels[min(self.calls // 2, len(self.levels) - 1)]
        self.calls += 1
        return torch.full((len(prompts),), level)


@pytest.fixture(autouse=True)
def _redness() -> None:
    register("redness")(redness)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("model")
    (root / "prompts.txt").write_text("red heart\npizza\ntiger\nsun\n")
    return {
        "model": str(save_stable_diffusion(root / "sd")),
        "iterations": 4,
        "rewards": {"redness": 1.0},
        "prompts": {"train": str(root / "prompts.txt"), "evaluation": str(root / "prompts.txt")},
        "sampling": {"eta": 1.2, "num_steps": 3, "guidance_scale": 1.0},
        "rollout": {"images_per_iteration": 8, "images_per_prompt": 4, "batch_size": 8},
        "objective": {"clip_range": None, "clip_nats": 1.6, "batch_size": 8},
        "optimizer": {"learning_rate": 3e-3},
        "advantage": {"kind": "group"},
        "ema": {"decay": 0.5},
        "evaluation": {"every": 1, "num_images": 4, "grid_images": 2, "held_out_rewards": ["watched"]},
    }


def config(settings: dict[str, Any], **sections: Any) -> TrainConfig:
    tree = {**settings}
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    return parse_config(tree)


def rows(out: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "pytorch_lora_weights.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_held_out_reward_that_falls_stops_the_run_which_is_then_complete(settings, tmp_path):
    watching = config(settings, evaluation={"stop_on_fall": {"watched": 0.5}}, checkpoint={"every": 3})
    register("watched")(Scripted(1.0, 0.6, 0.4, 9.0))
    summary = Trainer(watching, tmp_path / "run").train()
    assert rows(tmp_path / "run") == [0, 1, 2]
    assert summary["iterations"] == 2
    assert "Stopped after iteration 2 of 4: watched" in summary["stopped"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped"] == summary["stopped"]
    assert "Stopped after iteration 2 of 4: watched" in (tmp_path / "run" / "report.html").read_text()
    assert "2 iterations of" in (tmp_path / "run" / "lora" / "README.md").read_text()
    assert (tmp_path / "run" / "checkpoints" / "iteration-000002").is_dir()
    assert (tmp_path / "run" / "samples" / "after_ode.png").is_file()
    again = Trainer(watching, tmp_path / "run", resume=True).train()
    assert rows(tmp_path / "run") == [0, 1, 2]
    assert again["stopped"] == summary["stopped"]


def test_a_run_whose_rewards_hold_says_nothing_of_stopping(settings, tmp_path):
    register("watched")(Scripted(1.0, 0.6))
    allowed = config(settings, iterations=1, evaluation={"stop_on_fall": {"watched": 0.5}})
    summary = Trainer(allowed, tmp_path / "run").train()
    assert (summary["stopped"], summary["best"], summary["iterations"]) == (None, None, 1)
    assert not (tmp_path / "run" / "lora-best").exists()


def test_the_best_weights_are_those_of_a_run_that_ends_there(settings, tmp_path):
    register("watched")(Scripted(1.0, 2.0, 3.0, 2.5))
    summary = Trainer(config(settings, iterations=3, checkpoint={"best": "watched"}), tmp_path / "run").train()
    assert (summary["best"]["iteration"], summary["best"]["reward"]) == (2, "watched")
    register("watched")(Scripted(1.0, 2.0, 3.0))
    Trainer(config(settings, iterations=2), tmp_path / "short").train()
    assert same(adapter(tmp_path / "run" / "lora-best"), adapter(tmp_path / "short" / "lora"))
    assert not same(adapter(tmp_path / "run" / "lora-best"), adapter(tmp_path / "run" / "lora"))
    card = (tmp_path / "run" / "lora-best" / "README.md").read_text()
    assert "watched" in card
    assert "2 iterations of" in card
    assert "iteration 2, with the highest held-out watched under the ODE, 3.000 [3.000, 3.000]" in card
    fresh = summary["best"]["confirmation"]
    assert (fresh["ode"]["watched"]["mean"], fresh["over_last"]["watched"]["mean"]) == (2.5, 0)
    assert fresh["ode"]["redness"]["mean"] != summary["best"]["evaluation"]["ode"]["redness"]["mean"]  # other noise
    assert (tmp_path / "run" / summary["best"]["directory"]).is_dir()
    assert "iteration 2, by watched" in (tmp_path / "run" / "report.html").read_text()


def test_fresh_noise_takes_from_the_best_of_many_what_luck_gave_it() -> None:
    generator, clusters = np.random.default_rng(0), list(range(16))
    seen = generator.normal(size=(200, 16))  # 200 evaluations of weights that are all worth 0
    chosen = int(seen.mean(1).argmax())
    assert estimate_mean(seen[chosen], clusters).low > 0  # the figure that the choice rests on excludes the truth
    fresh = generator.normal(size=(2, 16))
    found = confirmation({"best": {"a": fresh[0]}, "last": {"a": fresh[1]}}, clusters)
    assert found["ode"]["a"]["low"] < 0 < found["ode"]["a"]["high"]
    assert found["over_last"]["a"] == estimate_mean(fresh[0] - fresh[1], clusters).to_dict()
    assert "improvement" not in found


def test_a_resumed_run_keeps_the_best_weights_of_before_bit_for_bit(settings, tmp_path):
    best = config(settings, checkpoint={"best": "watched", "every": 2})
    levels = (1.0, 5.0, 3.0, 2.0, 2.0)
    register("watched")(Scripted(*levels))
    whole = Trainer(best, tmp_path / "whole").train()
    register("watched")(Scripted(*levels))
    halted = Trainer(best, tmp_path / "halted")
    train_until(halted, 4)
    register("watched")(Scripted(*levels[3:]))
    resumed = Trainer(best, tmp_path / "halted", resume=True).train()
    assert whole["best"] == resumed["best"]
    assert whole["best"]["iteration"] == 1
    for name in ("lora", "lora-best"):
        assert same(adapter(tmp_path / "whole" / name), adapter(tmp_path / "halted" / name))


def test_a_reward_that_cannot_be_made_ready_is_an_error_before_anything_is_written(settings, tmp_path):
    class Absent:
        def load(self) -> None:
            raise OSError("no such file")

        def __call__(self, images, prompts, **metadata):
            raise AssertionError

    register("watched")(Absent)
    trainer = Trainer(config(settings), tmp_path / "run")
    with pytest.raises(EtudeError, match="reward 'watched' cannot be used: no such file"):
        trainer.train()
    assert not (tmp_path / "run").exists()
