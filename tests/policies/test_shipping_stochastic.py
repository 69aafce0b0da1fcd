"""The card's lines for the stochastic sampler draw, from the same noise, what the run's own SDE draws."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, PNDMScheduler

from etude.config import LoraConfig, parse_config
from etude.learning.objectives import make_objective
from etude.measuring.statistics import estimate_mean
from etude.policies import Policy, load_policy
from etude.policies.deployment import deployment_snippet, stochastic_snippet
from etude.policies.kohya import KOHYA_WEIGHTS
from etude.policies.source import ModelSource
from etude.sampling.noise import NoiseSource
from etude.sampling.rollout import rollout
from etude.sampling.sampler import SDE
from etude.training.card import deployment_advice, model_card
from support.tiny import flux, stable_diffusion, stable_diffusion_3

PROMPTS = ["red heart", "pizza"]
STEPS = 5
NOISE = NoiseSource(0, "evaluation")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def with_scheduler(pipeline: Any, scheduler: Any) -> Any:
    pipeline.scheduler = scheduler
    return pipeline


def pndm() -> Any:
    scheduler = PNDMScheduler(**SD, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    return with_scheduler(stable_diffusion(), scheduler)


def euler() -> Any:
    return with_scheduler(stable_diffusion(prediction_type="v_prediction"), EulerDiscreteScheduler(**SD))


CASES: dict[str, tuple[Callable[[], Any], float, str, float, str, float | None]] = {
    "gddim": (pndm, 3.0, "gddim", 1.2, "ode", None),
    "gddim, linspace": (euler, 3.0, "gddim", 1.2, "ode", None),
    "ddim": (stable_diffusion, 3.0, "ddim", 0.8, "ode", None),
    "cps": (stable_diffusion, 1.0, "cps", 0.5, "ode", None),
    "flow_sde": (flux, 3.5, "flow_sde", 0.7, "ode", None),
    "flow, gddim from pure noise": (flux, 3.5, "gddim", 0.9, "sde", None),
    "flow, gddim under another shift": (flux, 3.5, "gddim", 0.9, "ode", 7.0),
    "dance_sde": (stable_diffusion_3, 3.0, "dance_sde", 0.3, "sde", None),
}


def tuned(make: Callable[[], Any], directory: Path, shift: float | None) -> Policy:
    """A policy with an adapter that does something, exported beside its base model."""
    make().save_pretrained(directory / "base")
    policy = load_policy(directory / "base", device="cpu", shift=shift)
    policy.add_lora(LoraConfig(rank=2, alpha=4.0), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    policy.export(directory / "lora")
    return policy


def told_its_noise(policy: Policy) -> Callable[[Any], None]:
    """What makes a scheduler take the noise that a rollout takes, step by step."""

    def patch(scheduler: Any) -> None:
        step, taken = scheduler.step, iter(range(STEPS))

        def noisy(*arguments: Any, **options: Any) -> Any:
            noise = NOISE.step([0, 1], next(taken), policy.latent_shape)
            return step(*arguments, **options, variance_noise=noise)

        scheduler.step = noisy

    return patch


@pytest.mark.parametrize("name", CASES)
def test_the_stochastic_lines_draw_what_the_runs_sde_draws(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, guidance, kernel, eta, first_step, shift = CASES[name]
    monkeypatch.chdir(tmp_path)
    policy = tuned(make, tmp_path, shift)
    table = SDE(eta, STEPS, kernel, first_step).plan().tabulate(policy.grid(STEPS))
    ours = policy.decode(rollout(policy, table, policy.encode(PROMPTS), NOISE, [0, 1], guidance, 2).latents)
    lines = stochastic_snippet(policy, STEPS, guidance, kernel, eta, first_step)
    assert f"eta={eta}, kernel='{kernel}', first_step='{first_step}')" in lines
    text = (
        deployment_snippet(policy, ModelSource("base"), STEPS, guidance)
        + "\n"
        + lines.replace("image =", "patch(pipe.scheduler)\nimage =")
    )
    text = text.replace('"a prompt"', f"{PROMPTS}, latents=noise, output_type='np'").replace(".images[0]", ".images")
    (tmp_path / "card.py").write_text(text)
    given = {"noise": NOISE.initial([0, 1], policy.latent_shape), "patch": told_its_noise(policy)}
    theirs = np.rint(runpy.run_path("card.py", init_globals=given)["image"] * 255).transpose(0, 3, 1, 2)
    assert np.abs(ours.numpy().astype(int) - theirs).max() <= 1


def test_the_pipeline_goes_where_the_run_was_and_a_home_directory_is_spelt_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tuned(stable_diffusion, tmp_path, None)
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    lines = deployment_snippet(policy, ModelSource("~/base"), STEPS, 3.0).splitlines()
    assert f"pipe = StableDiffusionPipeline.from_pretrained('{tmp_path}/base')" in lines
    assert lines.index('pipe.to("cuda" if torch.cuda.is_available() else "cpu")') > lines.index(
        "pipe.load_lora_weights('lora')"
    )


def test_the_card_names_the_algorithm_and_the_sde_with_its_kernel_and_first_step(tmp_path: Path) -> None:
    policy = tuned(flux, tmp_path, None)
    sampling = {"kernel": "dance_sde", "eta": 0.3, "num_steps": STEPS, "first_step": "sde"}
    config = parse_config({"model": "base", "rewards": {"colorfulness": 1.0}, "sampling": sampling})
    worse = {"colorfulness": estimate_mean(np.array([-1.2, -0.8, -1.1, -0.9]), [0, 1, 2, 3]).to_dict()}
    final = {"eta": 0.3, "num_steps": STEPS, **dict.fromkeys(("ode", "sde", "improvement", "gap"), worse)}
    summary = {
        "final": final,
        "held_out_rewards": [],
        "reward_revisions": {},
        "versions": {"etude": "1"},
        "iterations": 3,
        "deploy": deployment_advice(config, policy, final),
    }
    objective = make_objective(config.objective)
    card = model_card(summary, config, policy, objective, tmp_path / "lora")
    assert (
        "with DDPO (PPO's clipped ratio) under the\ndance_sde sampler at eta = 0.3 (first step sde): 3 iterations"
        in card
    )
    told = "FlowMatchGDDIMScheduler with eta=0.3, kernel='dance_sde', first_step='sde'"
    assert f"deploy {told}, as the model card shows" in card
    assert stochastic_snippet(policy, STEPS, 5.0, "dance_sde", 0.3, "sde") in card
    others = f"ComfyUI and kohya's tools read `{KOHYA_WEIGHTS}`"
    assert others in card
    (tmp_path / "lora" / KOHYA_WEIGHTS).unlink()  # as of a DoRA, which has no such file
    assert others not in model_card(summary, config, policy, objective, tmp_path / "lora")
