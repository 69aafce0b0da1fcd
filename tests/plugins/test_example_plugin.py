"""The example package: one extension of each kind, installed beside etude, named in a recipe and trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from etude.config import parse_config
from etude.errors import EtudeError
from etude.policies.loading import load_policy
from etude.registry import KERNELS, OBJECTIVES, POLICIES, REWARDS, WINDOWS
from etude.rewards import get
from etude.rewards.scoring import score_one
from etude.sampling.kernels import make_kernel
from etude.sampling.sampler import ODE
from etude.sampling.windows import make_window
from etude.training.blueprint import Blueprint
from etude.training.trainer import Trainer
from support.launching import launch
from support.small_runs import metrics, same, weights
from support.tiny import autoencoder, save_flux, save_stable_diffusion, t5_encoder, t5_tokenizer

pytest.importorskip("etude_example", reason="the example package is not installed: make test installs it")


def aura_flow() -> AuraFlowPipeline:
    """Latents 4 x 4 x 4, images 8 x 8."""
    torch.manual_seed(0)
    words = t5_tokenizer()
    transformer = AuraFlowTransformer2DModel(
        sample_size=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    for parameter in transformer.parameters():  # zero-initialised layers would hide what the prompt does
        torch.nn.init.normal_(parameter, std=0.1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return AuraFlowPipeline(words, t5_encoder(words), autoencoder(), transformer, scheduler)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    aura_flow().save_pretrained(root / "aura")
    return {
        "sd": str(save_stable_diffusion(root / "sd")),
        "flux": str(save_flux(root / "flux")),
        "aura": str(root / "aura"),
    }


def run(model: str, out: Path, resume: bool = False, **changes: Any) -> Trainer:
    out.parent.mkdir(parents=True, exist_ok=True)
    prompts = out.parent / "prompts.txt"
    prompts.write_text("red heart\npizza\n")
    tree: dict[str, Any] = {
        "model": model,
        "iterations": 2,
        "rewards": {"distinctness": 1.0},
        "prompts": {"train": str(prompts), "evaluation": str(prompts)},
        "sampling": {"eta": 0.8, "num_steps": 4, "guidance_scale": 1.0},
        "rollout": {"images_per_iteration": 6, "images_per_prompt": 3, "batch_size": 2},  # a group spans two batches
        "objective": {"clip_range": None, "clip_nats": 1.6, "updates_per_epoch": 1},
        "optimizer": {"learning_rate": 1e-3},
        "advantage": {"kind": "group"},
        "evaluation": {"every": 1, "num_images": 4, "grid_images": 2},
    }
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) and key != "rewards" else value
    trainer = Trainer(parse_config(tree), out, resume=resume)
    trainer.train()
    return trainer


def test_installed_names_are_offered_and_nothing_is_imported_for_it() -> None:
    assert "kept_noise" in KERNELS.names()
    assert "ping_pong" in WINDOWS.names()
    assert "distinctness" in REWARDS.names()
    assert "weighted_matching" in OBJECTIVES.names()
    assert "AuraFlowPipeline" in POLICIES.names()


@pytest.mark.parametrize("kernel", ["kept_noise", "etude_example.kernel:KeptNoise"])
def test_a_run_is_trained_under_the_kernel(models: dict[str, str], tmp_path: Path, kernel: str) -> None:
    trainer = run(models["sd"], tmp_path / "run", sampling={"kernel": kernel})
    assert all(row["ratio_max_deviation"] < 1e-5 for row in metrics(tmp_path / "run")[1:])
    assert type(trainer.schedule.table_at(1)).__name__ == "StepTable"
    assert f"the\n{kernel} sampler" in (tmp_path / "run" / "lora" / "README.md").read_text()
    with pytest.raises(EtudeError, match="give at most 1"):
        run(models["sd"], tmp_path / "beyond", sampling={"kernel": kernel, "eta": 1.5})
    assert not (tmp_path / "beyond").exists()


def test_the_kernel_keeps_the_noise_of_the_target_level() -> None:
    step = make_kernel("kept_noise", 0.8).coefficients((0.6, 0.8), (0.8, 0.6))
    assert float(step.eps**2 + step.std**2) == pytest.approx(0.36)
    assert float(make_kernel("kept_noise", 0.0).coefficients((0.6, 0.8), (0.8, 0.6)).std) == 0


def test_a_run_is_trained_in_the_window(models: dict[str, str], tmp_path: Path) -> None:
    window = {"strategy": "ping_pong", "size": 1, "iters_per_shift": 1}
    run(models["flux"], tmp_path / "run", iterations=4, sampling={"num_steps": 5, "window": window})
    rows = metrics(tmp_path / "run")[1:]
    assert [row["window"]["start"] for row in rows] == [1, 2, 3, 2]  # steps 1 to 3 can be stochastic, there and back
    with pytest.raises(EtudeError, match="does not fit"):
        make_window("ping_pong", {"stop": 3, "size": 4})
    with pytest.raises(
        EtudeError, match=r"key of sampling.window.options 'iters_per_shfit': did you mean 'iters_per_shift'"
    ):
        make_window("ping_pong", {"stop": 3, "size": 1}, {"iters_per_shfit": 2})


def test_the_reward_is_given_whole_groups_whatever_the_batches(models: dict[str, str], tmp_path: Path) -> None:
    in_parts, at_once = (run(models["sd"], tmp_path / str(n), rollout={"batch_size": n}) for n in (2, 6))
    rows = [metrics(trainer.out) for trainer in (in_parts, at_once)]
    assert rows[0][1]["reward"]["distinctness"]["mean"] == pytest.approx(
        rows[1][1]["reward"]["distinctness"]["mean"], rel=1e-4
    )
    assert rows[0][1]["reward"]["distinctness"]["std"] > 0


def test_the_distance_is_that_to_the_others_of_the_group() -> None:
    images = torch.tensor([0, 10, 40, 7], dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 3, 2, 2).contiguous()
    scores = score_one("distinctness", get("distinctness"), images, ["a", "a", "a", "b"], groups=[5, 5, 5, 6])
    assert scores.tolist() == pytest.approx([25.0, 20.0, 35.0, 0.0])
    assert torch.equal(
        scores, score_one("distinctness", get("distinctness"), images, ["a", "a", "a", "b"])
    )  # equal prompts


@pytest.mark.parametrize("model", ["sd", "flux"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_objective_without_log_probabilities_trains_on_final_images(
    models: dict[str, str], tmp_path: Path, model: str, eta: float
) -> None:
    objective = {"kind": "weighted_matching", "options": {"levels": 2}, "updates_per_epoch": 2}
    trainer = run(models[model], tmp_path / "run", objective=objective, sampling={"kernel": "gddim", "eta": eta})
    rows = metrics(tmp_path / "run")[1:]
    assert all(row["matching_weight"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert not {"ratio_mean", "clipfrac", "approx_kl"} & set(rows[0])
    assert trainer.schedule.table_at(1).trained_steps == ()
    card = (tmp_path / "run" / "lora" / "README.md").read_text()
    assert "weighted matching (advantage-weighted matching of noise)" in card
    assert "Mean weight of a pair" in (tmp_path / "run" / "report.html").read_text()


def test_a_resumed_run_of_the_objective_ends_with_the_bits_of_one_never_stopped(
    models: dict[str, str], tmp_path: Path
) -> None:
    objective = {"kind": "weighted_matching", "options": {"levels": 2}}
    whole = run(models["sd"], tmp_path / "whole", objective=objective)
    (tmp_path / "part").mkdir()
    part = Trainer(whole.config, tmp_path / "part" / "run")
    part._finish_iteration = _stops_after(part, 1)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        part.train()
    again = Trainer(whole.config, tmp_path / "part" / "run", resume=True)
    again.train()
    assert same(weights(whole), weights(again))


def _stops_after(trainer: Trainer, iteration: int) -> Any:
    finish = trainer._finish_iteration

    def finish_and_stop(row: dict[str, Any]) -> None:
        finish(row)
        if row["iteration"] == iteration:
            raise KeyboardInterrupt

    return finish_and_stop


def test_options_that_an_objective_does_not_take_are_one_sentence(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(EtudeError, match=r"objective\.options do not fit WeightedMatching: .*levles"):
        run(models["sd"], tmp_path / "run", objective={"kind": "weighted_matching", "options": {"levles": 2}})
    with pytest.raises(EtudeError, match=r"sampling\.window is for objectives that train the steps"):
        run(models["sd"], tmp_path / "run", objective={"kind": "weighted_matching"}, sampling={"window": {"size": 1}})
    assert not (tmp_path / "run").exists()


def test_a_family_draws_the_pictures_of_its_plain_pipeline(models: dict[str, str]) -> None:
    policy, plain = load_policy(models["aura"]), AuraFlowPipeline.from_pretrained(models["aura"])
    from etude.sampling.noise import NoiseSource

    images = ODE(4, 3.0).draw(policy, ["red heart", "a"])
    noise = NoiseSource(0, "evaluation").initial([0, 1], policy.latent_shape)
    call = {**policy.call_arguments(3.0), "height": 8, "width": 8, "num_inference_steps": 4, "output_type": "pt"}
    theirs = [plain(prompt, latents=noise[i : i + 1], **call).images[0] for i, prompt in enumerate(["red heart", "a"])]
    assert (torch.stack(theirs) - images.float() / 255).abs().max() <= 0.51 / 255


def test_a_family_is_trained_and_its_adapter_is_what_the_plain_pipeline_loads(
    models: dict[str, str], tmp_path: Path
) -> None:
    trainer = run(models["aura"], tmp_path / "run")
    assert type(trainer.policy).__name__ == "AuraFlowPolicy"
    assert metrics(tmp_path / "run")[2]["grad_norm"] > 0
    plain = AuraFlowPipeline.from_pretrained(models["aura"])
    plain.load_lora_weights(str(tmp_path / "run" / "lora"))
    assert plain.transformer.peft_config
    named = run(models["aura"], tmp_path / "named", family="etude_example.family:AuraFlowPolicy")
    assert same(weights(trainer), weights(named))


def test_a_family_that_is_not_installed_is_one_sentence(models: dict[str, str], tmp_path: Path) -> None:
    index = json.loads((Path(models["sd"]) / "model_index.json").read_text())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({**index, "_class_name": "OtherPipeline"}))
    with pytest.raises(EtudeError, match=r"is a OtherPipeline; the supported pipelines are .*family: module:Class"):
        load_policy(tmp_path / "model")
    with pytest.raises(EtudeError, match="give module:Class, a subclass of"):
        load_policy(models["sd"], family="json:dumps")


@pytest.mark.slow
def test_two_processes_train_with_whole_groups_as_one_does(models: dict[str, str], tmp_path: Path) -> None:
    run(models["sd"], tmp_path / "one" / "run")
    config = tmp_path / "one" / "run" / "config.yaml"
    code, output = launch(2, ["-m", "etude", "train", str(config), "--quiet", "--out", str(tmp_path / "two")])
    assert code == 0, output
    alone, both = metrics(tmp_path / "one" / "run"), metrics(tmp_path / "two")
    trained = [rows[1]["reward"]["distinctness"]["mean"] for rows in (alone, both)]
    assert trained[1] == pytest.approx(trained[0], rel=1e-4)
    evaluated = [rows[0]["evaluation"]["ode"]["distinctness"]["mean"] for rows in (alone, both)]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-4)  # the images of a prompt come from both processes
    assert evaluated[0] > 0


def test_groups_that_the_processes_would_cut_are_refused_for_a_reward_that_compares_them(
    models: dict[str, str], tmp_path: Path
) -> None:
    rollout = {"images_per_iteration": 6, "images_per_prompt": 2}
    groups = parse_config({"model": models["sd"], "rewards": {"distinctness": 1.0}, "rollout": rollout})
    blueprint = Blueprint(groups, tmp_path / "run")
    blueprint.check_groups(3)
    with pytest.raises(EtudeError, match="do not divide among 2 processes"):
        blueprint.check_groups(2)
