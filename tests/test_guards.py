"""A held-out reward that falls stops the run, and the best weights are kept: under a resume too, and with the same bits."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from etude.config import load_config, parse_rewards
from etude.errors import EtudeError
from etude.guards import BestWeights, explain_stop, fallen
from etude.statistics import mean_summary


def measured(**changes: float) -> dict[str, Any]:
    """An evaluation in which each reward changed by that much, give or take a little."""
    around = torch.tensor([-0.1, 0.1] * 8)
    values = {
        name: mean_summary((change + around).numpy(), list(range(16))).to_dict() for name, change in changes.items()
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
