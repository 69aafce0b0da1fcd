"""What a run exports works in a process that never heard of etude, and makes the images that etude makes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from etude.config import LoraConfig
from etude.policies import load_policy
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.rollout import NoiseSource
from etude.sampling import make_plan, sample_images
from tiny import save_stable_diffusion, stable_diffusion

PROMPTS = ["red heart", "pizza", "tiger"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]

PLAIN_DIFFUSERS = """
import sys
import numpy as np, torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

base, lora, latents, out = sys.argv[1:5]
prompts = sys.argv[5:]
pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
settings = dict(num_inference_steps=6, guidance_scale=3.0, output_type="np")
noise = torch.from_numpy(np.load(latents))
before = pipe(prompts, latents=noise, **settings).images
pipe.load_lora_weights(lora)
after = pipe(prompts, latents=noise, **settings).images
assert not [name for name in sys.modules if name.split(".")[0] == "etude"]
np.savez(out, before=before, after=after)
"""


@pytest.mark.parametrize("targets", [ATTENTION, [*ATTENTION, "proj_in", "ff.net.0.proj", "ff.net.2"]])
def test_the_adapter_changes_plain_diffusers_images_exactly_as_etudes_own(tmp_path, targets):
    base = save_stable_diffusion(tmp_path / "base")
    policy = StableDiffusionPolicy(stable_diffusion())
    policy.add_lora(LoraConfig(rank=2, alpha=4.0, targets=targets), seed=0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    policy.export(tmp_path / "lora")
    noise = NoiseSource(0, "evaluation").initial([0, 1, 2], policy.latent_shape)
    np.save(tmp_path / "noise.npy", noise.numpy())
    script, out = tmp_path / "plain.py", tmp_path / "images.npz"
    script.write_text(PLAIN_DIFFUSERS)
    arguments = [base, tmp_path / "lora", tmp_path / "noise.npy", out, *PROMPTS]
    subprocess.run([sys.executable, str(script), *map(str, arguments)], check=True, capture_output=True, timeout=120)
    with np.load(out) as images:
        before, after = (np.rint(images[k] * 255).transpose(0, 3, 1, 2) for k in ("before", "after"))
    plan = make_plan("gddim", 0.0, 6)
    tuned = load_policy(base, lora=tmp_path / "lora", device="cpu")
    ours = sample_images(tuned, PROMPTS, plan, guidance_scale=3.0).numpy()
    with tuned.reference():
        untuned = sample_images(tuned, PROMPTS, plan, guidance_scale=3.0).numpy()
    assert np.array_equal(ours, sample_images(policy, PROMPTS, plan, guidance_scale=3.0).numpy())  # nothing was lost
    assert np.abs(ours - after).max() <= 1  # one grey level: the rounding of 1e-6
    assert np.abs(untuned - before).max() <= 1
    assert np.abs(after - before).mean() > 1
