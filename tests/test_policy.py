"""The Stable Diffusion adapter: what the pipeline computes is what the policy computes."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from etude.config import LoraConfig
from etude.errors import EtudeError
from etude.plans import SamplingPlan
from etude.policies import load_policy
from etude.policies.base import assign, swapped
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.rollout import NoiseSource, rollout
from etude.sampling import make_plan
from tiny import save_stable_diffusion, stable_diffusion

PROMPTS = ["red heart", "pizza", "tiger"]


@pytest.fixture
def policy():
    return StableDiffusionPolicy(stable_diffusion())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_ode_plan_makes_the_pipelines_own_latents(prediction_type, guidance_scale):
    pipeline = stable_diffusion(prediction_type=prediction_type)
    policy = StableDiffusionPolicy(pipeline)
    noise = NoiseSource(0, "evaluation")
    table = SamplingPlan.ode(6).tabulate(policy.path.grid(6))
    ours = rollout(policy, table, policy.encode(PROMPTS), noise, [0, 1, 2], guidance_scale, batch_size=2).latents
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS,
        num_inference_steps=6,
        guidance_scale=guidance_scale,
        latents=noise.initial([0, 1, 2], policy.latent_shape),
        output_type="latent",
    ).images
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_decoded_images_are_the_pipelines_pictures(policy):
    latents = torch.randn(5, *policy.latent_shape)
    pictures = policy.pipeline.vae.decode(latents / policy.pipeline.vae.config.scaling_factor).sample
    expected = policy.pipeline.image_processor.postprocess(pictures.detach(), output_type="pt").mul(255).round()
    assert torch.equal(policy.decode(latents), expected.to(torch.uint8))


def test_each_distinct_prompt_is_encoded_once(policy, monkeypatch):
    encoded = []
    original = policy.pipeline.encode_prompt
    monkeypatch.setattr(
        policy.pipeline, "encode_prompt", lambda batch, *a, **k: encoded.extend(batch) or original(batch, *a, **k)
    )
    policy.encode(["pizza", "tiger", "pizza"])
    policy.encode(["tiger", "heart"])
    assert sorted(encoded) == ["", "heart", "pizza", "tiger"]


def test_gradients_reach_exactly_the_adapter(policy):
    policy.add_lora(LoraConfig(rank=2, alpha=2.0), seed=0)
    x, t = torch.randn(3, *policy.latent_shape), torch.tensor([1, 500, 900])
    policy.predict(x, t, policy.encode(PROMPTS), 5.0).square().mean().backward()
    trained = policy.trainable()
    assert trained
    assert all("lora" in name and p.grad is not None for name, p in trained.items())
    for module in (policy.pipeline.unet, policy.pipeline.vae, policy.pipeline.text_encoder):
        assert all(p.grad is None for name, p in module.named_parameters() if "lora" not in name)


def test_a_fresh_adapter_changes_nothing_and_its_draw_depends_on_the_seed_alone():
    drawn = []
    for seed, global_seed in ((0, 1), (0, 2), (3, 1)):
        policy = StableDiffusionPolicy(stable_diffusion())
        x, t = torch.ones(1, *policy.latent_shape), torch.tensor([500])
        before = policy.predict(x, t, policy.encode(["pizza"]), 5.0)
        torch.manual_seed(global_seed)
        policy.add_lora(LoraConfig(), seed)
        assert torch.equal(policy.predict(x, t, policy.encode(["pizza"]), 5.0), before)
        drawn.append(next(p for name, p in policy.trainable().items() if "lora_A" in name))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("full", [False, True])
def test_the_reference_is_the_model_before_training(policy, full):
    x, t = torch.ones(1, *policy.latent_shape), torch.tensor([500])
    conditioning = policy.encode(["pizza"])
    before = policy.predict(x, t, conditioning, 5.0).detach()
    policy.train_everything() if full else policy.add_lora(LoraConfig(), seed=0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.05)
    after = policy.predict(x, t, conditioning, 5.0).detach()
    with policy.reference():
        assert torch.equal(policy.predict(x, t, conditioning, 5.0), before)
    assert not torch.equal(after, before)
    assert torch.equal(policy.predict(x, t, conditioning, 5.0), after)
    assert all(p.requires_grad for p in policy.trainable().values())
    assert policy.trainable()


def test_swapped_weights_come_back_bit_for_bit(policy):
    policy.add_lora(LoraConfig(), seed=0)
    parameters = policy.trainable()
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    average = {name: p.detach() * 3 + 1 for name, p in parameters.items()}

    def fail_inside():
        with swapped(parameters, average):
            assert all(torch.equal(p, average[name]) for name, p in parameters.items())
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert all(torch.equal(p, kept[name]) for name, p in parameters.items())
    assign(parameters, average)
    assert all(torch.equal(p, average[name]) for name, p in parameters.items())


@pytest.mark.parametrize("full", [False, True])
def test_an_export_loads_in_the_plain_pipeline(tmp_path, full):
    base = save_stable_diffusion(tmp_path / "base")
    policy = load_policy(base, device="cpu")
    policy.train_everything() if full else policy.add_lora(LoraConfig(rank=2, alpha=6.0), seed=0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.03 * torch.randn_like(parameter))
    policy.export(tmp_path / "export")
    plain = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    if full:
        plain.unet = type(plain.unet).from_pretrained(tmp_path / "export" / "unet")
    else:
        plain.load_lora_weights(tmp_path / "export")
    x, t = torch.ones(1, *policy.latent_shape), torch.tensor([500])
    conditioning = policy.encode(["pizza"])
    theirs = plain.unet(x, t, encoder_hidden_states=conditioning.prompt["encoder_hidden_states"]).sample
    assert torch.allclose(policy.predict(x, t, conditioning, 1.0), theirs, atol=1e-6)
    with policy.reference():
        assert not torch.allclose(policy.predict(x, t, conditioning, 1.0), theirs, atol=1e-3)


def test_bfloat16_weights_keep_latents_predictions_and_adapters_in_float32():
    policy = StableDiffusionPolicy(stable_diffusion(), dtype=torch.bfloat16)
    policy.add_lora(LoraConfig(), seed=0)
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    table = make_plan("gddim", 1.2, 4).tabulate(policy.path.grid(4))
    latents = rollout(policy, table, policy.encode(PROMPTS), NoiseSource(0, "x"), [0, 1, 2], 5.0, 3).latents
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("emoji-ds", "did you mean"),
        ("./nowhere/at/all", "there is no such directory"),
        ("nowhere/at/all", "neither an embedded model, a directory nor a hub id"),
        ("someone/some-model", "cannot be loaded"),
    ],
)
def test_a_model_that_does_not_exist_is_one_clear_error(model, says):
    with pytest.raises(EtudeError, match=says):
        load_policy(model)


def test_a_directory_that_is_no_pipeline_and_a_class_without_adapter_are_named(tmp_path):
    with pytest.raises(EtudeError, match=r"model_index\.json"):
        load_policy(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(EtudeError, match="KandinskyPipeline; the supported pipelines are StableDiffusionPipeline"):
        load_policy(tmp_path)


def test_lora_targets_that_match_no_layer_are_named(policy):
    with pytest.raises(EtudeError, match="to_qq"):
        policy.add_lora(LoraConfig(targets=["to_q", "to_qq"]), seed=0)
