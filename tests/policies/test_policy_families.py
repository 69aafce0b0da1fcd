"""What holds of every adapter: its policy computes what the plain pipeline computes, and trains what the plain pipeline loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from etude.config import LoraConfig
from etude.errors import EtudeError
from etude.policies import load_policy
from etude.policies.flux import FluxPolicy
from etude.policies.pipeline import PipelinePolicy
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.policies.stable_diffusion_3 import StableDiffusion3Policy
from etude.policies.stable_diffusion_xl import StableDiffusionXLPolicy
from etude.sampling.kernels import GDDIM
from etude.sampling.noise import NoiseSource
from etude.sampling.plans import SamplingPlan
from etude.sampling.replay import replay
from etude.sampling.rollout import rollout
from support.tiny import flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl

PROMPTS = ["red heart", "pizza", "a tiger that is far too long to be read to its end"]
STEPS = 4


@dataclass(frozen=True)
class Family:
    policy: type[PipelinePolicy]
    pipeline: Callable[..., Any]
    guidance_scale: float

    def __call__(self, **options: Any) -> PipelinePolicy:
        return self.policy(self.pipeline(), **options)


FAMILIES = {
    "stable-diffusion": Family(StableDiffusionPolicy, stable_diffusion, 3.0),
    "stable-diffusion-xl": Family(StableDiffusionXLPolicy, stable_diffusion_xl, 3.0),
    "stable-diffusion-xl-without-zeros": Family(
        StableDiffusionXLPolicy, lambda: stable_diffusion_xl(force_zeros_for_empty_prompt=False), 3.0
    ),
    "stable-diffusion-3": Family(StableDiffusion3Policy, stable_diffusion_3, 3.0),
    "stable-diffusion-3-without-t5": Family(
        StableDiffusion3Policy, lambda **o: stable_diffusion_3(with_t5=False, **o), 3.0
    ),
    "flux": Family(FluxPolicy, flux, 3.5),
    "flux-schnell": Family(FluxPolicy, lambda **o: flux(guidance_embeds=False, **o), 1.0),
}
FLOW = [name for name in FAMILIES if name.startswith(("flux", "stable-diffusion-3"))]


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(params=FLOW)
def flow_family(request):
    return FAMILIES[request.param]


def plain_images(pipeline: Any, policy: PipelinePolicy, guidance_scale: float, output_type: str = "pt") -> torch.Tensor:
    """What the plain pipeline makes from the noise of image 0, 1, 2."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        latents=NoiseSource(0, "evaluation").initial([0, 1, 2], policy.latent_shape),
        output_type=output_type,
        **policy.call_arguments(guidance_scale),
    ).images


def latents(policy: PipelinePolicy, guidance_scale: float) -> torch.Tensor:
    table = SamplingPlan.ode(STEPS).tabulate(policy.grid(STEPS))
    noise = NoiseSource(0, "evaluation")
    return rollout(policy, table, policy.encode(PROMPTS), noise, [0, 1, 2], guidance_scale, batch_size=2).latents


def images(policy: PipelinePolicy, guidance_scale: float) -> torch.Tensor:
    return policy.decode(latents(policy, guidance_scale))


def grey_levels(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.mul(255).round().to(torch.int64)


def moved(policy: PipelinePolicy, by: float = 0.1) -> PipelinePolicy:
    """The policy with every trained weight moved."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return policy


def probe(policy: PipelinePolicy) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, *policy.latent_shape), policy.grid(STEPS).timesteps[:3]


@pytest.mark.parametrize("guided", [False, True])
def test_the_ode_plan_makes_the_pipelines_own_latents_and_images(family, guided):
    scale = family.guidance_scale if guided else 1.0
    policy = family()
    found = latents(policy, scale)
    assert torch.allclose(found, plain_images(policy.pipeline, policy, scale, "latent"), atol=1e-5)
    pictures = plain_images(policy.pipeline, policy, scale)
    assert (policy.decoded(found) - pictures).abs().max() <= 1e-5
    assert (policy.decode(found).long() - grey_levels(pictures)).abs().max() <= 1  # where 1e-5 rounds the other way


def test_an_sdxl_whose_autoencoder_has_latent_statistics_makes_its_pipelines_images():
    pipeline = stable_diffusion_xl()
    pipeline.vae.register_to_config(latents_mean=[0.5, -0.3, 0.1, 1.0], latents_std=[1.5, 0.7, 2.0, 1.0])
    policy = StableDiffusionXLPolicy(pipeline)
    assert (policy.decoded(latents(policy, 5.0)) - plain_images(pipeline, policy, 5.0)).abs().max() <= 1e-5


@pytest.mark.parametrize("resolution", [12, 16])
@pytest.mark.parametrize(
    "scheduler",
    [{"use_dynamic_shifting": True}, {"use_dynamic_shifting": False, "shift": 3.0}, {"time_shift_type": "linear"}],
)
def test_at_any_resolution_and_shift_the_latents_are_the_pipelines_own(flow_family, resolution, scheduler):
    scale = flow_family.guidance_scale
    policy = flow_family.policy(flow_family.pipeline(**scheduler), resolution=resolution)
    assert policy.image_size == (resolution, resolution)
    expected = plain_images(policy.pipeline, policy, scale, "latent")
    assert torch.allclose(latents(policy, scale), expected, atol=1e-5)
    assert tuple(images(policy, scale).shape) == (3, 3, resolution, resolution)


def test_a_prompts_conditioning_does_not_depend_on_what_was_encoded_beside_it(family):
    alone, beside = family().encode(["pizza"]), family().encode([*PROMPTS, "a", "pizza"])
    for name, rows in alone.prompt.items():
        assert torch.equal(rows[0], beside.prompt[name][1])
        assert torch.equal(rows[0], beside.prompt[name][4])


def test_flux_is_told_what_its_pipeline_encodes():
    policy = FluxPolicy(flux())
    embeddings, pooled, _ = policy.pipeline.encode_prompt(PROMPTS, max_sequence_length=12)
    told = policy.encode(PROMPTS)
    assert torch.allclose(told.prompt["encoder_hidden_states"], embeddings, atol=1e-5)
    assert torch.allclose(told.prompt["pooled_projections"], pooled, atol=1e-5)
    assert told.unconditional == {}


@pytest.mark.parametrize("zeros", [True, False])
def test_stable_diffusion_xl_is_told_what_its_pipeline_encodes(zeros):
    policy = StableDiffusionXLPolicy(stable_diffusion_xl(force_zeros_for_empty_prompt=zeros))
    embeddings, empty, pooled, empty_pooled = policy.pipeline.encode_prompt([*PROMPTS, ""])
    told = policy.encode([*PROMPTS, ""])
    assert torch.allclose(told.prompt["encoder_hidden_states"], embeddings, atol=1e-5)
    assert torch.allclose(told.prompt["text_embeds"], pooled, atol=1e-5)
    assert torch.allclose(told.unconditional["encoder_hidden_states"], empty[:1], atol=1e-5)
    assert torch.allclose(told.unconditional["text_embeds"], empty_pooled[:1], atol=1e-5)
    # Where guidance starts from zeros, a prompt that is empty is still a prompt.
    assert (told.unconditional["text_embeds"] == 0).all() == zeros
    assert not (told.prompt["text_embeds"][-1] == 0).all()


@pytest.mark.parametrize("resolution", [None, 16, 24])
def test_stable_diffusion_xl_is_told_the_size_that_its_pipeline_is_called_with(resolution):
    policy = StableDiffusionXLPolicy(stable_diffusion_xl(), resolution=resolution)
    side = resolution or 8
    assert policy._time_ids.tolist() == [[side, side, 0, 0, side, side]]
    expected = plain_images(policy.pipeline, policy, 3.0, "latent")
    assert torch.allclose(latents(policy, 3.0), expected, atol=1e-5)
    other = torch.tensor([[16.0, 16.0, 0.0, 0.0, 8.0, 8.0]])
    assert not torch.allclose(latents(with_size(policy, other), 3.0), expected, atol=1e-3)


def with_size(policy: StableDiffusionXLPolicy, told: torch.Tensor) -> StableDiffusionXLPolicy:
    policy._time_ids = told
    return policy


def test_the_autoencoder_of_an_sdxl_that_asks_for_it_stays_in_float32_beside_half_precision():
    policy = StableDiffusionXLPolicy(stable_diffusion_xl(), dtype=torch.float16)
    assert (policy.pipeline.vae.dtype, policy.pipeline.unet.dtype) == (torch.float32, torch.float16)
    assert policy.decode(torch.randn(2, *policy.latent_shape)).shape == (2, 3, 8, 8)


def test_an_sdxl_network_that_does_not_fit_its_encoder_is_refused():
    pipeline = stable_diffusion_xl()
    pipeline.text_encoder_2.config.projection_dim = 16
    with pytest.raises(EtudeError, match="contradicts itself"):
        StableDiffusionXLPolicy(pipeline)


@pytest.mark.parametrize(("with_t5", "length"), [(True, 12), (False, 256)])
def test_stable_diffusion_3_is_told_what_its_pipeline_encodes(with_t5, length):
    policy = StableDiffusion3Policy(stable_diffusion_3(with_t5=with_t5))
    embeddings, empty, pooled, empty_pooled = policy.pipeline.encode_prompt(
        PROMPTS, None, None, max_sequence_length=length
    )
    told = policy.encode(PROMPTS)
    assert torch.allclose(told.prompt["encoder_hidden_states"], embeddings, atol=1e-5)
    assert torch.allclose(told.prompt["pooled_projections"], pooled, atol=1e-5)
    assert torch.allclose(told.unconditional["encoder_hidden_states"], empty[:1], atol=1e-5)
    assert torch.allclose(told.unconditional["pooled_projections"], empty_pooled[:1], atol=1e-5)


@pytest.mark.parametrize(("allowed", "flux_reads", "sd3_reads"), [(12, 12, 12), (300, 300, 256), (10**30, 512, 256)])
def test_t5_reads_what_its_tokenizer_and_the_pipeline_allow(allowed, flux_reads, sd3_reads):
    ours, theirs = FluxPolicy(flux()), StableDiffusion3Policy(stable_diffusion_3())
    ours.pipeline.tokenizer_2.model_max_length = theirs.pipeline.tokenizer_3.model_max_length = allowed
    assert (ours.max_sequence_length, theirs.max_sequence_length) == (flux_reads, sd3_reads)


def test_gradients_reach_exactly_the_adapter(family):
    policy = family()
    policy.add_lora(LoraConfig(rank=2, alpha=2.0), seed=0)
    x, t = probe(policy)
    policy.predict(x, t, policy.encode(PROMPTS), family.guidance_scale).square().mean().backward()
    trained = policy.trainable()
    assert trained
    assert all("lora" in name and p.grad is not None for name, p in trained.items())
    for component in policy.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            assert all(p.grad is None for name, p in component.named_parameters() if "lora" not in name)


@pytest.mark.parametrize("full", [False, True])
def test_the_reference_is_the_model_before_training(family, full):
    policy, scale = family(), family.guidance_scale
    (x, t), conditioning = probe(policy), policy.encode(PROMPTS)
    before = policy.predict(x, t, conditioning, scale).detach()
    policy.train_everything() if full else policy.add_lora(LoraConfig(), seed=0)
    moved(policy)
    after = policy.predict(x, t, conditioning, scale).detach()
    with policy.reference():
        assert torch.equal(policy.predict(x, t, conditioning, scale), before)
    assert not torch.equal(after, before)
    assert torch.equal(policy.predict(x, t, conditioning, scale), after)
    assert policy.trainable()
    assert all(p.requires_grad for p in policy.trainable().values())


def test_an_exported_adapter_makes_the_same_images_in_the_plain_pipeline(tmp_path, family):
    scale, plain = family.guidance_scale, family.pipeline()
    policy = family()
    before = grey_levels(plain_images(plain, policy, scale))
    policy.add_lora(LoraConfig(rank=2, alpha=6.0), seed=0)
    moved(policy).export(tmp_path)
    plain.load_lora_weights(tmp_path)
    after = grey_levels(plain_images(plain, policy, scale))
    assert (images(policy, scale).long() - after).abs().max() <= 1
    with policy.reference():
        assert (images(policy, scale).long() - before).abs().max() <= 1
    assert (after - before).abs().float().mean() > 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fully_tuned_export_loads_as_a_pipeline_and_as_a_policy(tmp_path, name):
    family = FAMILIES[name]
    policy, scale = family(), family.guidance_scale
    policy.train_everything(keep_reference=False)
    assert policy.export_name == "model"
    moved(policy, 0.02).export(tmp_path)
    ours = images(policy, scale)
    assert torch.equal(images(load_policy(tmp_path, device="cpu"), scale), ours)
    plain = type(policy.pipeline).from_pretrained(tmp_path, **policy.loading_arguments())
    assert (grey_levels(plain_images(plain, policy, scale)) - ours).abs().max() <= 1
    assert not list(tmp_path.rglob("*.bin"))


def test_without_a_kept_reference_there_is_no_second_network_and_no_reference():
    policy = FluxPolicy(flux())
    policy.train_everything(keep_reference=False)
    with pytest.raises(EtudeError, match="keep_reference"), policy.reference():
        pass


def test_replayed_steps_have_a_ratio_of_exactly_one(family):
    policy = family()
    policy.add_lora(LoraConfig(rank=2, alpha=2.0), seed=0)
    moved(policy, 0.02)
    table, conditioning = SamplingPlan.sde(STEPS, GDDIM(1.2)).tabulate(policy.grid(STEPS)), policy.encode(PROMPTS)
    scale = family.guidance_scale
    trajectory = rollout(policy, table, conditioning, NoiseSource(0, "training"), [0, 1, 2], scale, batch_size=3)
    rows = torch.arange(3)
    for column in range(len(trajectory.steps)):
        columns = torch.full((3,), column)
        transition, target = replay(policy, table, trajectory, rows, columns, conditioning, scale)
        assert torch.equal(transition.log_prob(target), trajectory.log_prob[:, column])


def test_half_precision_weights_keep_latents_predictions_and_adapters_in_float32(family):
    policy = family(dtype=torch.bfloat16)
    policy.add_lora(LoraConfig(), seed=0)
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    found = latents(policy, family.guidance_scale)
    assert found.dtype == torch.float32
    exact = latents(family(), family.guidance_scale)
    assert (found - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_the_guidance_embedding_is_told_the_scale_and_a_model_without_one_refuses_guidance():
    with_embedding, without = FluxPolicy(flux()), FluxPolicy(flux(guidance_embeds=False))
    x, t = probe(with_embedding)
    conditioning = with_embedding.encode(PROMPTS)
    outputs = [with_embedding.predict(x, t, conditioning, scale) for scale in (0.0, 1.0, 3.5)]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    conditioning = without.encode(PROMPTS)
    assert torch.equal(without.predict(x, t, conditioning, 0.0), without.predict(x, t, conditioning, 1.0))
    with pytest.raises(EtudeError, match=r"guidance_scale = 3\.5: .* no guidance embedding"):
        without.predict(x, t, conditioning, 3.5)


@pytest.mark.parametrize(
    ("policy", "pipeline", "resolution", "says"),
    [
        (StableDiffusionPolicy, stable_diffusion, 12, "multiple of 8 pixels"),
        (StableDiffusion3Policy, stable_diffusion_3, 9, "multiple of 2 pixels"),
        (StableDiffusion3Policy, stable_diffusion_3, 32, "end at 16 pixels"),
        (FluxPolicy, flux, 10, "multiple of 4 pixels"),
        (FluxPolicy, flux, 0, "multiple of 4 pixels"),
    ],
)
def test_a_resolution_that_the_model_cannot_make_is_refused(policy, pipeline, resolution, says):
    with pytest.raises(EtudeError, match=says):
        policy(pipeline(), resolution=resolution)


@pytest.mark.parametrize("sample_size", [[4, 8], (4, 8)])
def test_a_unet_may_give_its_sample_size_as_height_and_width(sample_size):
    pipeline = stable_diffusion()
    pipeline.unet.register_to_config(sample_size=sample_size)
    policy = StableDiffusionPolicy(pipeline)
    assert policy.latent_shape == (4, 4, 8)
    assert policy.image_size == (8, 16)


def test_a_flow_model_with_the_scheduler_of_another_family_is_refused():
    pipeline = flux()
    pipeline.scheduler = stable_diffusion().scheduler
    with pytest.raises(EtudeError, match="not a rectified-flow scheduler"):
        FluxPolicy(pipeline)


@pytest.mark.parametrize("steps", [0, -1])
def test_a_number_of_steps_that_cannot_be_taken_is_refused(flow_family, steps):
    with pytest.raises(EtudeError, match="cannot be taken"):
        flow_family().grid(steps)
