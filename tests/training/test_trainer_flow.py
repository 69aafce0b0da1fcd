"""GRPO, MixGRPO and MixGRPO-Flash on tiny flow models: what is trained, from which noise, and that a resumed run is the same run."""

from __future__ import annotations

import pytest
import torch

from etude.config import parse_config
from etude.errors import EtudeError
from etude.learning.advantages import group_advantages
from etude.learning.objectives import policy_gradient
from etude.learning.update import Learner
from etude.rewards import register
from etude.training import training_sampler
from etude.training.trainer import Trainer
from support.small_runs import metrics, redness, same, weights
from support.tiny import save_flux, save_stable_diffusion_3

WINDOW = {"strategy": "progressive", "size": 2, "iters_per_shift": 1}


@pytest.fixture(autouse=True)
def _redness():
    register("redness")(redness)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    root = tmp_path_factory.mktemp("flow")
    prompts = root / "prompts.txt"
    prompts.write_text("red heart\npizza\n")
    return {
        "model": str(save_flux(root / "flux")),
        "sd3": str(save_stable_diffusion_3(root / "sd3", with_t5=False)),
        "iterations": 1,
        "rewards": {"redness": 1.0},
        "prompts": {"train": str(prompts), "evaluation": str(prompts)},
        "sampling": {"eta": 1.5, "num_steps": 6, "guidance_scale": 2.0},
        "rollout": {"images_per_iteration": 8, "images_per_prompt": 4, "batch_size": 8, "shared_noise": True},
        "objective": {"clip_range": None, "clip_nats": 1.6, "batch_size": 8, "updates_per_epoch": 1},
        "optimizer": {"learning_rate": 3e-3},
        "advantage": {"kind": "group"},
        "evaluation": {"every": 10, "num_images": 4, "grid_images": 2},
    }


def configured(settings, **sections):
    tree = {key: value for key, value in settings.items() if key != "sd3"}
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) and name != "rewards" else value
    return parse_config(tree)


def train(settings, out, resume=False, **sections):
    trainer = Trainer(configured(settings, **sections), out, resume=resume)
    return trainer, trainer.train()


@pytest.fixture
def watched(monkeypatch):
    """The arguments of every rollout, its trajectory, and the steps of every replayed pair."""
    seen = {"rollouts": [], "steps": [], "advantages": []}
    rollout, replay, update = training_sampler.rollout, policy_gradient.replay, Learner.update

    def watch_rollout(policy, table, conditioning, noise, samples, *args, **kwargs):
        trajectory = rollout(policy, table, conditioning, noise, samples, *args, **kwargs)
        starts = noise.initial(kwargs["noise_samples"], policy.latent_shape)
        seen["rollouts"].append((table, starts, trajectory))
        return trajectory

    def watch_replay(policy, table, trajectory, rows, columns, *args, **kwargs):
        seen["steps"] += [trajectory.steps[column] for column in columns.tolist()]
        return replay(policy, table, trajectory, rows, columns, *args, **kwargs)

    def watch_update(self, samples, *args):
        seen["advantages"].append(samples.advantages)
        return update(self, samples, *args)

    monkeypatch.setattr(training_sampler, "rollout", watch_rollout)
    monkeypatch.setattr(policy_gradient, "replay", watch_replay)
    monkeypatch.setattr(Learner, "update", watch_update)
    return seen


def test_mixgrpo_trains_the_windows_steps_and_logs_where_it_was(settings, tmp_path, watched):
    _, summary = train(settings, tmp_path / "run", iterations=3, sampling={"window": WINDOW})
    rows = metrics(tmp_path / "run")[1:]
    assert [row["window"] for row in rows] == [{"start": start, "size": 2} for start in (1, 2, 3)]
    assert watched["steps"] == [step for start in (1, 2, 3) for step in [start] * 8 + [start + 1] * 8]
    assert all(row["ratio_max_deviation"] < 1e-5 for row in rows)  # the window moved, and the states with it
    assert all(row["grad_norm"] > 0 for row in rows)
    assert summary["final"]["eta"] == 1.5


def test_images_of_a_group_share_their_noise_and_their_steps_up_to_the_window(settings, tmp_path, watched):
    train(settings, tmp_path / "run", sampling={"window": {**WINDOW, "strategy": "fixed", "start": 3}})
    _, starts, trajectory = watched["rollouts"][0]
    for group in (slice(0, 4), slice(4, 8)):
        assert all(torch.equal(row, starts[group][0]) for row in starts[group])
        assert all(torch.equal(row, trajectory.states[group, 0][0]) for row in trajectory.states[group, 0])
        assert len({row.numpy().tobytes() for row in trajectory.latents[group]}) == 4
    assert not torch.equal(starts[0], starts[4])


def test_without_shared_noise_every_image_has_its_own(settings, tmp_path, watched):
    train(settings, tmp_path / "run", rollout={"shared_noise": False})
    _, starts, trajectory = watched["rollouts"][0]
    assert len({row.numpy().tobytes() for row in starts}) == 8
    assert trajectory.steps == (1, 2, 3, 4)
    assert "window" not in metrics(tmp_path / "run")[1]


def test_advantages_are_those_of_the_group(settings, tmp_path, watched):
    rewards = []

    def remembered(images, prompts, **metadata):
        rewards.append((redness(images, prompts), list(prompts)))
        return rewards[-1][0]

    register("redness")(remembered)
    train(settings, tmp_path / "run", sampling={"window": WINDOW})
    scores, prompts = rewards[2]  # after the two samplers of iteration 0
    assert prompts[:4] == prompts[:1] * 4
    assert prompts[4:] == prompts[4:5] * 4
    expected = group_advantages(scores, torch.arange(8) // 4)
    assert torch.allclose(watched["advantages"][0], expected.float())


def test_flash_takes_fewer_steps_and_ends_without_noise(settings, tmp_path, watched):
    _, summary = train(settings, tmp_path / "run", sampling={"window": {**WINDOW, "compression": 0.4}})
    table, _, trajectory = watched["rollouts"][0]
    assert table.num_evaluations < 6
    assert float(table.tail.s[-1]) == 0
    assert trajectory.latents.isfinite().all()
    assert summary["final"]["num_steps"] == 6  # the evaluation takes the whole trajectory under both samplers


@pytest.mark.parametrize(
    "sampling",
    [{"kernel": "flow_sde", "eta": 0.7}, {"kernel": "dance_sde", "eta": 0.3}, {"kernel": "cps", "eta": 0.8}],
    ids=lambda sampling: sampling["kernel"],
)
def test_the_peers_kernels_train_a_stable_diffusion_3(settings, tmp_path, sampling):
    train(settings, tmp_path / "run", model=settings["sd3"], sampling=sampling, evaluation={"num_steps": 3})
    row = metrics(tmp_path / "run")[1]
    assert row["grad_norm"] > 0
    assert row["ratio_max_deviation"] < 1e-5
    assert row["evaluation"]["num_steps"] == 3


@pytest.mark.parametrize(
    "window",
    [WINDOW, {"strategy": "random", "size": 2, "compression": 0.5}],
    ids=["progressive", "random-flash"],
)
def test_a_resumed_run_with_a_window_ends_with_the_bits_of_one_never_stopped(settings, tmp_path, window):
    changes = {
        "iterations": 4,
        "sampling": {"window": window},
        "checkpoint": {"every": 3},
        "objective": {"kl_coef": 0.1},
    }
    whole, _ = train(settings, tmp_path / "whole", **changes)
    count = 0

    def fails_once(images, prompts, **metadata):
        nonlocal count
        count += 1
        if count == 5:  # two in the evaluation of iteration 0, then one each
            raise RuntimeError("out of order")
        return redness(images, prompts)

    register("redness")(fails_once)
    with pytest.raises(EtudeError, match=r"out of order.*intact checkpoint: iteration 2 in .*--resume"):
        train(settings, tmp_path / "resumed", **changes)
    register("redness")(redness)
    resumed, _ = train(settings, tmp_path / "resumed", resume=True, **changes)
    assert same(weights(whole), weights(resumed))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "resumed")


def test_what_the_model_cannot_do_is_refused_before_anything_is_written(settings, tmp_path):
    with pytest.raises(EtudeError, match="resolution"):
        train(settings, tmp_path / "run", resolution=9)
    with pytest.raises(EtudeError, match="does not fit"):
        train(settings, tmp_path / "run", sampling={"window": {"size": 5}})
    assert not (tmp_path / "run").exists()
