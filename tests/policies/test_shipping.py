"""What a run exports works in a process that runs the card's own lines, and makes the images that etude makes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
)

from etude import zoo
from etude.config import LoraConfig, parse_config
from etude.errors import EtudeError
from etude.policies import Policy, load_policy
from etude.policies.deployment import ddim_visits, deployment_snippet
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.sampling.noise import NoiseSource
from etude.sampling.paths import VPPath
from etude.sampling.plans import SamplingPlan
from etude.sampling.rollout import rollout
from support.tiny import flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl

PROMPTS = ["red heart", "pizza", "tiger"]
STEPS = 6
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

RUN_SNIPPETS = """
import os, runpy, sys
import numpy as np

for case in sys.argv[1:]:
    os.chdir(case)
    images = runpy.run_path("snippet.py")["image"]
    np.savez("images.npz", images=images, etude=[name for name in sys.modules if name.split(".")[0] == "etude"])
"""


@dataclass(frozen=True)
class Case:
    """A model, what is trained of it and how; `deploys` is the scheduler that its card puts in place, None its own."""

    pipeline: Callable[[], Any]
    scheduler: Callable[[], Any] | None = None
    guidance_scale: float = 3.0
    targets: tuple[str, ...] = tuple(ATTENTION)
    full: bool = False
    resolution: int | None = None
    deploys: str | None = "DDIMScheduler"
    shift: float | None = None

    def make(self) -> Any:
        pipeline = self.pipeline()
        if self.scheduler:
            pipeline.scheduler = self.scheduler()
        return pipeline


PLAIN = {
    "ddim": Case(stable_diffusion),
    "ddim, many layers": Case(stable_diffusion, targets=(*ATTENTION, "proj_in", "ff.net.0.proj", "ff.net.2")),
    "ddim, other size": Case(stable_diffusion, resolution=16),
    "ddim, everything": Case(stable_diffusion, full=True),
    "pndm": Case(
        stable_diffusion,
        lambda: PNDMScheduler(**SD, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
    ),
    "dpm, leading": Case(
        stable_diffusion,
        lambda: DPMSolverMultistepScheduler(**SD, timestep_spacing="leading", steps_offset=1, thresholding=True),
    ),
    "sdxl": Case(stable_diffusion_xl),
    "sdxl, other size": Case(stable_diffusion_xl, resolution=16),
    "sdxl, everything": Case(stable_diffusion_xl, full=True),
    "flux": Case(flux, guidance_scale=3.5, deploys=None),
    "flux, everything": Case(flux, guidance_scale=3.5, full=True, deploys=None),
    "flux, heun": Case(
        lambda: flux(use_dynamic_shifting=False),
        lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
        3.5,
        deploys="FlowMatchEulerDiscreteScheduler",
    ),
    "schnell": Case(
        lambda: flux(guidance_embeds=False, stochastic_sampling=True),
        guidance_scale=1.0,
        deploys="FlowMatchEulerDiscreteScheduler",
    ),
    "flux, shift": Case(flux, guidance_scale=3.5, deploys="FlowMatchEulerDiscreteScheduler", shift=7.0),
    "flux, shift, everything": Case(flux, guidance_scale=3.5, full=True, deploys=None, shift=7.0),
    "sd3, shift": Case(stable_diffusion_3, deploys="FlowMatchEulerDiscreteScheduler", shift=7.0),
    "sd3": Case(stable_diffusion_3, resolution=12, deploys=None),
    "sd3, no t5": Case(lambda: stable_diffusion_3(with_t5=False), deploys=None),
    "sd3, no t5, everything": Case(lambda: stable_diffusion_3(with_t5=False), full=True, deploys=None),
}
WITH_ETUDE = {
    "euler, linspace": Case(stable_diffusion, lambda: EulerDiscreteScheduler(**SD), deploys="GDDIMScheduler"),
    "ddim, trailing": Case(
        stable_diffusion,
        lambda: DDIMScheduler(**SD, timestep_spacing="trailing", clip_sample=False),
        deploys="GDDIMScheduler",
    ),
}
CASES = PLAIN | WITH_ETUDE


def images(policy: Policy, guidance_scale: float) -> np.ndarray:
    """uint8 `[3, 3, h, w]` by the ODE from the noise of images 0, 1, 2, as numbers that can be subtracted."""
    table = SamplingPlan.ode(STEPS).tabulate(policy.grid(STEPS))
    noise = NoiseSource(0, "evaluation")
    made = rollout(policy, table, policy.encode(PROMPTS), noise, [0, 1, 2], guidance_scale, batch_size=3)
    return policy.decode(made.latents).numpy().astype(int)


def ship(case: Case, directory: Path) -> None:
    """What a run of that model would leave, and the card's lines, drawing our prompts from our noise."""
    case.make().save_pretrained(directory / "base")
    policy = load_policy(directory / "base", device="cpu", resolution=case.resolution, shift=case.shift)
    untuned = images(policy, case.guidance_scale)
    if case.full:
        policy.train_everything(keep_reference=False)
    else:
        policy.add_lora(LoraConfig(rank=2, alpha=4.0, targets=list(case.targets)), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_((0.02 if case.full else 0.1) * torch.randn(parameter.shape, generator=generator))
    policy.export(directory / policy.export_name)
    np.savez(directory / "etude.npz", untuned=untuned, tuned=images(policy, case.guidance_scale))
    np.save(directory / "noise.npy", NoiseSource(0, "evaluation").initial([0, 1, 2], policy.latent_shape).numpy())
    snippet = deployment_snippet(policy, ModelSource("base"), STEPS, case.guidance_scale)
    assert snippet.count('pipe(prompt="a prompt", ') == snippet.count(".images[0]") == 1
    snippet = snippet.replace('"a prompt"', f"{PROMPTS}, latents=noise, output_type='np'").replace(
        ".images[0]", ".images"
    )
    noise = "import numpy, torch\nnoise = torch.from_numpy(numpy.load('noise.npy'))\n"
    (directory / "snippet.py").write_text(noise + snippet)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """Every case shipped, and every card's lines run, in one process that starts without etude."""
    root = tmp_path_factory.mktemp("shipped")
    places = {name: root / name.replace(", ", "-").replace(" ", "-") for name in CASES}
    for name, case in CASES.items():
        places[name].mkdir()
        ship(case, places[name])
    (root / "run.py").write_text(RUN_SNIPPETS)
    command = [sys.executable, str(root / "run.py"), *(str(places[name]) for name in CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return places


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_cards_lines_draw_what_etude_draws(shipped, name):
    with np.load(shipped[name] / "images.npz") as theirs, np.load(shipped[name] / "etude.npz") as ours:
        drawn = np.rint(theirs["images"] * 255).transpose(0, 3, 1, 2)
        assert np.abs(ours["tuned"] - drawn).max() <= 1  # one grey level: the rounding of 1e-6
        assert np.abs(ours["tuned"] - ours["untuned"]).mean() > 1
        assert bool(theirs["etude"].size) == (name in WITH_ETUDE)  # the plain ones ran first


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.full])
def test_an_exported_adapter_loads_again_bit_for_bit(shipped, name):
    base, case = shipped[name] / "base", CASES[name]
    again = load_policy(base, lora=shipped[name] / "lora", device="cpu", resolution=case.resolution, shift=case.shift)
    with np.load(shipped[name] / "etude.npz") as ours:
        assert np.array_equal(images(again, case.guidance_scale), ours["tuned"])
        with again.reference():
            assert np.array_equal(images(again, case.guidance_scale), ours["untuned"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_card_changes_the_scheduler_only_where_the_models_own_is_not_the_ode(shipped, name):
    snippet = (shipped[name] / "snippet.py").read_text()
    line = next((line for line in snippet.splitlines() if line.startswith("pipe.scheduler")), None)
    deploys = CASES[name].deploys
    assert (line is None) if deploys is None else line.startswith(f"pipe.scheduler = {deploys}.from_config(")


@pytest.mark.parametrize("make", [flux, stable_diffusion_3])
def test_a_shift_of_ones_own_moves_every_level_whatever_the_pipelines(make, tmp_path):
    make().save_pretrained(tmp_path)
    own = load_policy(tmp_path, device="cpu")
    shifted = load_source(
        ModelSource.of(parse_config({"model": str(tmp_path), "sampling": {"shift": 5.0, "num_steps": 4}})), "cpu"
    )
    for steps in (4, 10):
        # FLUX spaces levels evenly down to 1 / N, SD3's scheduler down to its last level, which the shift has moved.
        even = torch.linspace(1, 1 / steps if make is flux else 0.005 / 1.004, steps, dtype=torch.float64)
        torch.testing.assert_close(shifted.grid(steps).s[:-1], 5 * even / (1 + 4 * even), rtol=1e-6, atol=1e-6)
        assert not torch.allclose(own.grid(steps).s, shifted.grid(steps).s, atol=1e-2)


def test_a_model_without_levels_to_shift_refuses_a_shift(tmp_path):
    stable_diffusion().save_pretrained(tmp_path)
    with pytest.raises(EtudeError, match=r"shift = 3: .* is not a flow model"):
        load_policy(tmp_path, device="cpu", shift=3.0)


def test_a_flux_card_says_its_size_guidance_and_sequence_length():
    from etude.policies.flux import FluxPolicy

    policy = FluxPolicy(flux())
    policy.add_lora(LoraConfig(), seed=0)
    lines = deployment_snippet(policy, ModelSource("someone/flux", dtype="bfloat16"), 25, 3.5).splitlines()
    assert lines[0] == "import torch"
    assert "pipe = FluxPipeline.from_pretrained('someone/flux', torch_dtype=torch.bfloat16)" in lines
    assert lines[-1] == (
        'image = pipe(prompt="a prompt", num_inference_steps=25, guidance_scale=3.5, height=8, width=8, max_sequence_length=12).images[0]'
    )


def test_the_card_of_an_embedded_model_finds_it_in_the_package():
    policy = load_policy("emoji-sd", device="cpu")
    policy.add_lora(LoraConfig(), seed=0)
    lines = deployment_snippet(policy, ModelSource("emoji-sd"), 20, 5.0).splitlines()
    assert "from etude import zoo" in lines
    assert "pipe = StableDiffusionPipeline.from_pretrained(zoo.path('emoji-sd'))" in lines
    assert type(policy.pipeline).from_pretrained(zoo.path("emoji-sd")) is not None


@pytest.mark.parametrize("steps", [1, 6, 7, 20, 30, 50, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_is_recommended_exactly_where_it_steps_through_the_grid(spacing, steps):
    path = VPPath.from_config({**SD, "timestep_spacing": spacing})
    scheduler = DDIMScheduler(**SD, timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    alphas, grid = scheduler.alphas_cumprod.double(), path.grid(steps)
    x, same = torch.zeros(1), True
    for i, t in enumerate(scheduler.timesteps):
        # A network that says eps = 1 at x = s_t, so x0 = 0: the next state is the noise coefficient of where the step went.
        x = torch.sqrt(1 - alphas[t]).float().reshape(1)
        stepped = scheduler.step(torch.ones(1), t, x).prev_sample.double()
        same = (
            same and torch.allclose(stepped, grid.s[i + 1].reshape(1), atol=1e-6) and int(t) == int(grid.timesteps[i])
        )
    assert ddim_visits(path, steps) == same
