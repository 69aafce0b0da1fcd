"""The training loop: it learns, it repeats itself, and it says what went wrong."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from etude.config import continuation, load_config, parse_config
from etude.errors import EtudeError
from etude.learning.objectives.ppo import PPO
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.rewards import register
from etude.runs.checkpoint import save_checkpoint
from etude.training.progress import SilentDisplay
from etude.training.trainer import Trainer
from support.small_runs import metrics, redness, same, weights
from support.tiny import save_stable_diffusion


@pytest.fixture(autouse=True)
def _redness():
    register("redness")(redness)


def calls(reward_at):
    """A reward that misbehaves at its k-th call: the evaluation of iteration 0 makes the first two."""
    count = 0

    def reward(images, prompts, **metadata):
        nonlocal count
        count += 1
        return reward_at(count, redness(images, prompts))

    return reward


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    prompts = root / "prompts.txt"
    prompts.write_text("red heart\npizza\ntiger\nsun\n")
    return {
        "model": str(save_stable_diffusion(root / "sd")),
        "iterations": 2,
        "rewards": {"redness": 1.0},
        "prompts": {"train": str(prompts), "evaluation": str(prompts)},
        "sampling": {"eta": 1.2, "num_steps": 4, "guidance_scale": 2.0},
        "rollout": {"images_per_iteration": 8, "images_per_prompt": 4, "batch_size": 8},
        "objective": {"clip_range": None, "clip_nats": 1.6, "batch_size": 8},
        "optimizer": {"learning_rate": 3e-3},
        "advantage": {"kind": "group"},
        "evaluation": {"every": 1, "num_images": 8, "grid_images": 4},
    }


def train(settings, out, resume=False, **sections):
    tree = {**settings}
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) and name != "rewards" else value
    trainer = Trainer(parse_config(tree), out, resume=resume)
    return trainer, trainer.train()


def test_a_run_that_fails_before_its_first_row_leaves_nothing_and_one_that_fails_later_is_resumed(settings, tmp_path):
    @register("fails_at")
    class FailsAt:
        at, count = 1, 0

        def __call__(self, images, prompts, **metadata):
            FailsAt.count += 1
            if FailsAt.count == FailsAt.at:
                raise RuntimeError("the scorer is gone")
            return redness(images, prompts)

    for FailsAt.at, left in ((1, False), (2, False), (3, True)):  # two calls in the evaluation of the base model
        FailsAt.count = 0
        with pytest.raises(EtudeError, match="the scorer is gone"):
            train(settings, tmp_path / "run", rewards={"fails_at": 1.0})
        assert (tmp_path / "run").exists() is left
    FailsAt.at = 0
    assert train(settings, tmp_path / "run", resume=True, rewards={"fails_at": 1.0})[1]["iterations"] == 2


def test_a_run_leaves_everything_its_user_came_for(settings, tmp_path):
    _, summary = train(settings, tmp_path / "run")
    expected = {
        "config.yaml", "metrics.jsonl", "summary.json", "report.html", "lora/pytorch_lora_weights.safetensors",
        "lora/README.md", "samples/before_ode.png", "samples/after_ode.png", "samples/before_sde.png", "samples/after_sde.png",
        "checkpoints",
    }  # fmt: skip
    assert all((tmp_path / "run" / name).exists() for name in expected)
    assert [row["iteration"] for row in metrics(tmp_path / "run")] == [0, 1, 2]
    assert summary["final"] == metrics(tmp_path / "run")[-1]["evaluation"]
    assert not [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


def test_the_resolved_configuration_reproduces_the_run(settings, tmp_path):
    first, _ = train(settings, tmp_path / "first")
    again = Trainer(load_config(str(tmp_path / "first" / "config.yaml")), tmp_path / "again")
    again.train()
    assert same(weights(first), weights(again))
    assert metrics(tmp_path / "first") == metrics(tmp_path / "again")


def test_another_seed_is_another_run(settings, tmp_path):
    first, _ = train(settings, tmp_path / "first", iterations=1)
    other, _ = train(settings, tmp_path / "other", iterations=1, seed=1)
    assert not same(weights(first), weights(other))


@pytest.mark.parametrize(
    "sections",
    [
        {"advantage": {"kind": "per_prompt", "min_count": 4}, "ema": {"decay": 0.5}},
        {"objective": {"kl_coef": 0.1, "num_inner_epochs": 2, "timestep_fraction": 0.5}},
        {"objective": {"kind": "reinforce", "updates_per_epoch": 1}, "lora": {"rank": 0}},
    ],
    ids=["per-prompt-ema", "kl-inner-epochs", "reinforce-full"],
)
def test_a_resumed_run_ends_with_the_bits_of_one_never_stopped(settings, tmp_path, sections):
    whole, _ = train(settings, tmp_path / "whole", iterations=3, **sections)

    class StopError(Exception):
        pass

    def stop(count, scores):
        if count == 8:  # evaluations call it twice, rollouts once: in the rollout of iteration 3
            raise StopError
        return scores

    broken = calls(stop)
    register("redness")(broken)
    try:
        with pytest.raises(EtudeError, match="redness"):
            train(settings, tmp_path / "resumed", iterations=3, **sections)
    finally:
        register("redness")(redness)
    resumed, _ = train(settings, tmp_path / "resumed", resume=True, iterations=3, **sections)
    assert same(weights(whole), weights(resumed))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "resumed")


def test_the_first_update_of_every_iteration_starts_at_ratio_one(settings, tmp_path):
    train(settings, tmp_path / "run", objective={"updates_per_epoch": 1}, sampling={"num_steps": 1})
    assert all(row["ratio_max_deviation"] == 0 for row in metrics(tmp_path / "run")[1:])


@pytest.mark.slow
def test_training_raises_the_reward_under_the_ode(settings, tmp_path):
    _, summary = train(
        settings,
        tmp_path / "run",
        iterations=12,
        rollout={"images_per_iteration": 32, "images_per_prompt": 8, "batch_size": 32},
        objective={"batch_size": 32},
        lora={"rank": 0},
        evaluation={"every": 12, "num_images": 32},
    )
    assert summary["final"]["improvement"]["redness"]["low"] > 0


@pytest.mark.parametrize(
    ("reward_at", "says"),
    [
        (lambda count, scores: 1 / 0, "division by zero"),
        (lambda count, scores: scores[:3], r"shape \[3\]"),
        (lambda count, scores: scores.log() * float("nan"), "sample 0"),
    ],
    ids=["raises", "wrong-shape", "nan"],
)
def test_a_broken_reward_ends_the_run_in_one_sentence_and_loses_nothing(settings, tmp_path, reward_at, says):
    register("broken")(calls(lambda count, scores: reward_at(count, scores) if count > 3 else scores))
    with pytest.raises(EtudeError, match=says) as caught:
        train(settings, tmp_path / "run", rewards={"broken": 1.0})
    assert "'broken'" in str(caught.value)
    assert [row["iteration"] for row in metrics(tmp_path / "run")] == [0]
    register("broken")(redness)
    train(settings, tmp_path / "run", resume=True, rewards={"broken": 1.0})
    assert [row["iteration"] for row in metrics(tmp_path / "run")] == [0, 1, 2]


def test_a_directory_in_use_is_left_alone(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(EtudeError, match="--resume"):
        train(settings, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_diverging_weights_stop_the_run_and_name_the_last_good_checkpoint(settings, tmp_path):
    with pytest.raises(EtudeError, match=r"diverged in iteration \d: .*intact checkpoint: iteration \d in ") as caught:
        train(settings, tmp_path / "run", iterations=3, optimizer={"learning_rate": 1e30})
    diverged, intact = (int(text) for text in re.findall(r"iteration (\d)", str(caught.value)))
    assert intact == diverged - 1
    assert (tmp_path / "run" / "checkpoints" / f"iteration-{intact:06d}").is_dir()


def test_a_policy_that_no_longer_resembles_the_last_one_has_diverged_too(settings, tmp_path, monkeypatch):
    strict = tuple(replace(m, limit=1e-15) if m.name == "approx_kl" else m for m in PPO.metrics)
    monkeypatch.setattr(PPO, "metrics", strict)
    with pytest.raises(EtudeError, match=r"diverged in iteration 1: the approx kl is \d"):
        train(settings, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["iteration-000000"]


def test_weights_that_overflow_in_the_last_step_are_not_saved(settings, tmp_path):
    trainer = Trainer(
        parse_config({**settings, "objective": {**settings["objective"], "updates_per_epoch": 1}}), tmp_path / "run"
    )
    step, weight = trainer.learner.optimizer.step, next(iter(trainer.parameters.values()))

    def overflow():
        step()
        with torch.no_grad():
            weight[0, 0] = float("inf")

    trainer.learner.optimizer.step = overflow
    with pytest.raises(EtudeError, match=r"iteration 1: the largest weight is inf.*intact checkpoint: iteration 0 in "):
        trainer.train()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["iteration-000000"]


def test_a_failed_rollout_saves_the_iterations_before_it(settings, tmp_path):
    broken = calls(lambda count, scores: scores if count < 5 else scores[:3])  # in the rollout of iteration 3
    register("redness")(broken)
    with pytest.raises(EtudeError, match="intact checkpoint: iteration 2 in "):
        train(settings, tmp_path / "run", iterations=4, checkpoint={"every": 4}, evaluation={"every": 4})
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["iteration-000000", "iteration-000002"]


def test_a_failed_evaluation_loses_no_iteration_and_is_made_up_for(settings, tmp_path):
    sections = {"iterations": 3, "checkpoint": {"every": 3}, "evaluation": {"every": 2}, "ema": {"decay": 0.9}}
    whole, _ = train(settings, tmp_path / "whole", **sections)
    # The base model's evaluation makes two calls, two iterations one each: the sixth is the SDE side of the next evaluation.
    register("redness")(calls(lambda count, scores: scores if count < 6 else 1 / 0))
    for resume in (False, True):
        with pytest.raises(EtudeError, match="intact checkpoint: iteration 2 in "):
            train(settings, tmp_path / "run", resume=resume, **sections)
        assert [row["iteration"] for row in metrics(tmp_path / "run")] == [0, 1]
    register("redness")(redness)
    resumed, _ = train(settings, tmp_path / "run", resume=True, **sections)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert same(weights(resumed), weights(whole))


def test_a_run_that_fails_before_its_first_checkpoint_says_so(settings, tmp_path):
    register("redness")(calls(lambda count, scores: scores[:3]))
    with pytest.raises(EtudeError, match="no checkpoint was written yet"):
        train(settings, tmp_path / "run")


def test_a_kill_while_the_configuration_is_written_does_not_block_the_run(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.writing").write_text("model:")
    train(settings, tmp_path / "run", iterations=1)
    assert not [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


def test_several_rewards_are_logged_apart_and_held_out_ones_are_not_trained(settings, tmp_path):
    _, summary = train(
        settings,
        tmp_path / "run",
        rewards={"redness": 1.0, "colorfulness": 0.5},
        evaluation={"held_out_rewards": ["jpeg_compressibility"]},
    )
    row = metrics(tmp_path / "run")[1]
    assert set(row["reward"]) == {"redness", "colorfulness"}
    assert {"redness", "colorfulness", "jpeg_compressibility", "weighted_sum"} == set(summary["final"]["gap"])


def test_a_checkpoint_continues_only_the_run_that_wrote_it(settings, tmp_path):
    train(settings, tmp_path / "run", iterations=1)
    with pytest.raises(EtudeError, match="seed = 0, but 5 was given"):
        train(settings, tmp_path / "run", iterations=1, resume=True, seed=5)
    assert "seed: 0" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("missing", ["base_scores", "last_evaluation", "advantage"])
class Watching(SilentDisplay):
    """Notes which of the files exist whenever an iteration is finished."""

    def __init__(self, *files):
        self.files, self.seen = files, []

    def iteration(self, row):
        self.seen.append([file.exists() for file in self.files])


def test_a_finished_run_that_trains_on_is_the_run_of_that_many_iterations(settings, tmp_path):
    whole, _ = train(settings, tmp_path / "whole", iterations=3)
    train(settings, tmp_path / "run", iterations=2)
    watching = Watching(tmp_path / "run" / "summary.json")
    longer = parse_config({**settings, "iterations": 3})
    further = Trainer(longer, tmp_path / "run", resume=True, display=watching)
    assert further.train()["iterations"] == 3
    assert watching.seen == [[False]]  # a run that goes on is not a finished one
    assert same(weights(further), weights(whole))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert load_config(str(tmp_path / "run" / "config.yaml")).iterations == 3


def test_a_run_trains_on_only_where_every_iteration_stays_what_it_was(settings):
    run, moving = parse_config(settings), {"end": 0.5, "over": "iterations"}
    schedules = [None, moving, {**moving, "over": "steps"}, {**moving, "kind": "constant"}]
    expected = [None, ("iterations", 2, 3), None, None]
    for schedule, change in zip(schedules, expected, strict=True):
        sampling = {**settings["sampling"], "eta_schedule": schedule}
        two, three = (parse_config({**settings, "sampling": sampling, "iterations": n}) for n in (2, 3))
        assert continuation(two, three) == change
        assert continuation(three, two) == ("iterations", 3, 2)
    assert continuation(run, run.model_copy(update={"iterations": 9, "seed": 1})) == ("seed", 0, 1)


@pytest.mark.parametrize("rank", [4, 0])
def test_a_policy_that_was_trained_is_no_base_model_for_a_second_run(settings, tmp_path, rank):
    config = parse_config({**settings, "lora": {"rank": rank}})
    policy = load_source(ModelSource.of(config))
    Trainer(config, tmp_path / "first", policy=policy)
    with pytest.raises(EtudeError, match=r"has been made trainable before.*load another policy"):
        Trainer(config, tmp_path / "second", policy=policy)
    assert list(tmp_path.iterdir()) == []


def test_neither_is_one_that_was_made_trainable_by_hand(settings, tmp_path):
    config = parse_config({**settings, "lora": {"rank": 0}})
    policy = load_source(ModelSource.of(config))
    policy.add_lora(config.lora.model_copy(update={"rank": 2}), seed=0)
    with pytest.raises(EtudeError, match="has been made trainable before"):
        Trainer(config, tmp_path / "run", policy=policy)


@pytest.mark.parametrize("missing", ["base_scores", "last_evaluation", "advantage"])
def test_a_checkpoint_without_its_state_is_one_clear_error(settings, tmp_path, missing):
    trainer = Trainer(parse_config({**settings, "advantage": {"kind": "per_prompt"}}), tmp_path / "run", resume=True)
    trainer.durability.save(0)
    found = trainer.durability.checkpoints.load()
    state = {name: value for name, value in found.state.items() if name != missing}
    save_checkpoint(found.path.parent, 0, found.tensors, state)
    with pytest.raises(EtudeError, match=f"does not hold the state that this version .*KeyError: '{missing}'"):
        trainer.durability.restore(resume=True)


def test_averaged_weights_are_restored_in_place(settings, tmp_path):
    train(settings, tmp_path / "run", iterations=1, ema={"decay": 0.5})
    trainer = Trainer(parse_config({**settings, "iterations": 1, "ema": {"decay": 0.5}}), tmp_path / "run", resume=True)
    before = dict(trainer.ema)
    trainer.durability.restore(resume=True)
    assert all(trainer.ema[name] is tensor for name, tensor in before.items())  # they stay on the model's device


def test_a_launchers_environment_does_not_scale_the_loss(settings, tmp_path, monkeypatch):
    plain, _ = train(settings, tmp_path / "plain", iterations=1)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    launched, _ = train(settings, tmp_path / "launched", iterations=1)
    assert same(weights(plain), weights(launched))


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_gradients_of_half_precision_weights_point_where_those_of_float32_do(settings, tmp_path, dtype):
    moved = []
    for precision in ("float32", dtype):
        trainer, _ = train(settings, tmp_path / precision, iterations=1, dtype=precision)
        moved.append(torch.cat([p.flatten() for n, p in weights(trainer).items() if "lora_B" in n]))
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.8
