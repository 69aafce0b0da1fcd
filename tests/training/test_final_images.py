"""Runs on final images: rollouts by any solver, resumed to the same bits, for every parametrisation and full or LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from etude.config import parse_config
from etude.errors import EtudeError
from etude.training.dry_run import ImageSteps, evaluations
from etude.training.trainer import Trainer
from support.small_runs import brief_settings, metrics, same, train_until, weights
from support.tiny import save_flux, stable_diffusion

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
OPTIONS = {"nft": {"beta": 0.5, "levels": 2}, "awm": {"levels": 2}, "elbo_pg": {"levels": 2}, "dpo": {"levels": 2}}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("models")
    tree = brief_settings(root)
    save_flux(root / "flux")
    stable_diffusion(prediction_type="v_prediction").save_pretrained(root / "v")
    return {**tree, "root": root}


def trainer(
    settings: dict[str, Any], out: Path, kind: str, model: str = "sd", resume: bool = False, **changes: Any
) -> Trainer:
    tree = {key: value for key, value in settings.items() if key != "root"}
    tree["model"] = str(settings["root"] / model)
    tree["sampling"] = {"solver": "euler" if model == "flux" else "ddim", "num_steps": 3, "guidance_scale": 2.0}
    tree["objective"] = {"kind": kind, "options": OPTIONS[kind], "updates_per_epoch": 2, "batch_size": 4}
    tree["optimizer"] = {"learning_rate": 1e-2}
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return Trainer(parse_config(tree), out, resume=resume)


@pytest.mark.parametrize("kind", ["nft", "elbo_pg", "dpo"])
def test_a_resumed_run_ends_with_the_bits_of_one_never_stopped(
    settings: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    objective = {"kl_coef": 0.1} if kind != "dpo" else {}
    options = {**OPTIONS[kind], "old_rate": 0.2}
    changes = {"iterations": 2, "objective": {"options": options, **objective}, "evaluation": {"num_images": 2}}
    whole = trainer(settings, tmp_path / "whole", kind, **changes)
    whole.train()
    part = trainer(settings, tmp_path / "part", kind, **changes)
    train_until(part, 2)
    again = trainer(settings, tmp_path / "part", kind, resume=True, **changes)
    again.train()
    assert same(weights(whole), weights(again))
    assert same(dict(whole.objective.old.weights or {}), dict(again.objective.old.weights or {}))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "part")
    moved = [row["grad_norm"] for row in metrics(tmp_path / "whole")[1:]]
    assert all(norm > 0 for norm in moved)


@pytest.mark.parametrize("model", ["v", "flux"])
@pytest.mark.parametrize("solver", ["unipc", "heun"])
def test_solvers_draw_the_images_whatever_the_network_predicts(
    settings: dict[str, Any], tmp_path: Path, model: str, solver: str
) -> None:
    run = trainer(settings, tmp_path / "run", "nft", model, iterations=1, sampling={"solver": solver}, lora={"rank": 0})
    before = weights(run)
    run.train()
    (row,) = metrics(tmp_path / "run")[1:]
    assert row["eta"] == 0
    assert row["old_distance"] > 0
    assert not same(before, weights(run))
    assert f"deterministic solver {solver}" in (tmp_path / "run" / "model" / "README.md").read_text()
    gap = row["evaluation"]["gap"]["colorfulness"]["mean"]
    assert row["evaluation"]["eta"] == 1.0
    assert gap != 0


def test_the_rollout_of_a_solver_is_the_samplers_images(settings: dict[str, Any], tmp_path: Path) -> None:
    from etude.batching import silent
    from etude.sampling.noise import NoiseSource
    from etude.sampling.rollout import Trajectory
    from etude.sampling.solvers import Solver

    run = trainer(settings, tmp_path / "run", "nft")
    prompts, solver, seen = ["red heart", "pizza", "sun"], Solver("dpmsolver++", 3, 2.0), []
    expected = solver.draw(run.policy, prompts, 5, stream="s", batch_size=2, decode=False)
    latents = solver.walk(
        run.policy,
        run.policy.encode(prompts),
        NoiseSource(5, "s"),
        [0, 1, 2],
        run.rollout_batches.of(2),
        silent,
        lambda rows, latents: seen.append((rows, latents.clone())),
    )
    found = Trajectory.of_images(latents)
    assert torch.equal(found.latents, expected)
    assert torch.equal(torch.cat([latents for _, latents in seen]), expected)
    assert found.steps == ()


def test_a_solver_short_of_memory_halves_the_micro_batches_of_the_run(settings: dict[str, Any], tmp_path: Path) -> None:
    run = trainer(settings, tmp_path / "run", "nft", iterations=1, sampling={"solver": "ddim"})
    predict, before = run.policy.predict, run.rollout_batches
    assert before.size == 8

    def cramped(x: torch.Tensor, *told: Any) -> torch.Tensor:
        if len(x) > 2 and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError(f"no room for {len(x)}")
        return predict(x, *told)

    run.policy.predict = cramped  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"rollout\.batch_size"):
        run.train()
    assert run.rollout_batches is before
    assert before.size == 2


def test_a_solver_that_the_levels_do_not_allow_ends_before_the_run(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(EtudeError, match="1000"):
        trainer(settings, tmp_path / "run", "nft", sampling={"solver": "ddim", "num_steps": 1001})
    assert not (tmp_path / "run").exists()


def test_an_iteration_keeps_no_trajectory_and_counts_its_network_calls(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    run = trainer(settings, tmp_path / "run", "nft", objective={"kl_coef": 0.1}, sampling={"solver": "heun"})
    calls, predict = [], run.policy.predict

    def counted(x: torch.Tensor, *told: Any) -> torch.Tensor:
        calls.append(len(x))
        return predict(x, *told)

    run.policy.predict = counted  # type: ignore[method-assign]
    table, batch = run.schedule.table_at(1), run._draw(1)
    run.ledger.draw()
    with run.supervisor.interruption, run.scorer:
        samples, _ = run._rewarded(1, table, batch)
        run.learner.update(samples, 1, lambda: None)
    assert samples.trajectory.states.numel() == 0
    parts = evaluations(
        run.config,
        run.objective,
        ImageSteps(table.num_evaluations, table.prefix_steps, 0),
        run.objective.columns(table),
    )
    assert parts == {"rollout": 4 * 5, "old policy": 8, "reference": 8, "replay": 8}
    # The first of two optimiser steps is on-policy, and asks the old policy nothing.
    assert sum(calls) == sum(parts.values()) - 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objective": {"kind": "ppo", "options": {}}}, "deterministic, and this objective trains"),
        ({"rollout": {"shared_noise": True}}, "equal under a deterministic sampler"),
        ({"sampling": {"solver": None, "eta": 0.0}, "rollout": {"shared_noise": True}}, "equal under a deterministic"),
        ({"objective": {"old_log_prob": "replay"}}, "objective.old_log_prob = replay is for objectives on log-prob"),
        ({"objective": {"clip_nats": 1.6, "clip_range": None}}, "objective.clip_nats = 1.6"),
        ({"objective": {"options": {"betta": 1.0}}}, "objective.options do not fit NFT: .*betta"),
        ({"objective": {"kind": "dpo", "options": {}, "kl_coef": 0.1}}, "dpo holds to the reference model by its beta"),
        (
            {
                "objective": {"kind": "dpo", "options": {}},
                "rollout": {"images_per_prompt": 1},
                "advantage": {"kind": "per_prompt"},
            },
            "compares the images of a group",
        ),
        ({"sampling": {"window": {"size": 1}}}, "so there is no window"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(EtudeError, match=says):
        trainer(settings, tmp_path / "run", "nft", **changes)
    assert not (tmp_path / "run").exists()


def test_advice_is_for_samplers_with_noise(settings: dict[str, Any], tmp_path: Path) -> None:
    from etude.advice.adviser import Adviser
    from etude.config import load_config

    with pytest.raises(EtudeError, match=r"sampling\.solver = ddim draws without noise"):
        Adviser(load_config("emoji-sd-nft"), 1.0, tmp_path / "advice")
