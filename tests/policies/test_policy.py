"""Stable Diffusion's parametrisations, adapters and weights as they come and go, and what can be loaded."""

from __future__ import annotations

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler

from etude.config import LoraConfig
from etude.errors import EtudeError
from etude.policies import load_policy
from etude.policies.deployment import deployment_snippet
from etude.policies.flux import FluxPolicy
from etude.policies.prompt_cache import PromptCache
from etude.policies.source import ModelSource
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.policies.stable_diffusion_3 import StableDiffusion3Policy
from etude.policies.stable_diffusion_xl import StableDiffusionXLPolicy
from etude.policies.trainable import assign, swapped
from etude.registry import POLICIES
from etude.sampling.noise import NoiseSource
from etude.sampling.plans import SamplingPlan
from etude.sampling.rollout import rollout
from support.tiny import flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl, text_encoder

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
    table = SamplingPlan.ode(6).tabulate(policy.grid(6))
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
    assert (policy.decoded(ours) - policy.decoded(theirs)).abs().max() <= 1e-5


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


@pytest.mark.parametrize("layers", [1, 2])
def test_stable_diffusion_is_told_what_its_pipeline_encodes(layers):
    pipeline = stable_diffusion()
    pipeline.text_encoder = text_encoder(pipeline.tokenizer, layers=layers)
    policy = StableDiffusionPolicy(pipeline)
    long = "a tiger that is far too long to be read to its end"
    embeddings, empty = pipeline.encode_prompt([*PROMPTS, long], "cpu", 1, do_classifier_free_guidance=True)
    told = policy.encode([*PROMPTS, long])
    assert torch.allclose(told.prompt["encoder_hidden_states"], embeddings, atol=1e-5)
    assert torch.allclose(told.unconditional["encoder_hidden_states"], empty[:1], atol=1e-5)


def test_a_full_cache_forgets_what_was_not_used_for_longest_and_changes_no_prompt(policy):
    exact = StableDiffusionPolicy(stable_diffusion()).encode(PROMPTS)
    one = sum(rows.nbytes for rows in policy._encode_key("a").values())
    policy._encoded = PromptCache(3 * one)
    policy.encode_ahead(["red heart", "pizza", "tiger", "sun"])  # guidance's own takes one of the three places
    assert len(policy._encoded) == 3
    assert "tiger" not in policy._encoded
    told = policy.encode(PROMPTS)
    assert all(torch.equal(told.prompt[name], rows) for name, rows in exact.prompt.items())
    assert len(policy._encoded) == 3
    assert policy._encoded.size == 3 * one
    policy.encode(["pizza", "sun"])
    kept = [prompt for prompt in (None, *PROMPTS, "sun") if prompt in policy._encoded]
    assert kept == [None, "pizza", "sun"]
    told = policy.encode(PROMPTS)
    assert all(torch.equal(told.prompt[name], rows) for name, rows in exact.prompt.items())


def test_without_room_every_prompt_is_encoded_whenever_it_is_drawn(policy):
    exact = StableDiffusionPolicy(stable_diffusion()).encode(PROMPTS)
    policy._encoded = PromptCache(0)
    for _ in range(2):
        told = policy.encode(PROMPTS)
        assert all(torch.equal(told.prompt[name], rows) for name, rows in exact.prompt.items())
    assert len(policy._encoded) == 0


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


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("emoji-ds", "did you mean"),
        ("./nowhere/at/all", "there is no such directory"),
        ("nowhere/at/all", "neither an embedded model, a directory nor a hub id"),
        ("someone/some-model", "cannot be loaded.* `hf download` while connected, or give a directory"),
    ],
)
def test_a_model_that_does_not_exist_is_one_clear_error(model, says):
    with pytest.raises(EtudeError, match=says):
        load_policy(model)


def test_a_directory_that_is_no_pipeline_and_a_class_without_adapter_are_named(tmp_path):
    with pytest.raises(EtudeError, match=r"model_index\.json"):
        load_policy(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(EtudeError, match="is a KandinskyPipeline; the supported pipelines are") as error:
        load_policy(tmp_path)
    assert all(family in str(error.value) for family in POLICIES.builtin)


@pytest.mark.parametrize(
    ("pipeline", "adapter"),
    [
        (stable_diffusion, StableDiffusionPolicy),
        (stable_diffusion_xl, StableDiffusionXLPolicy),
        (stable_diffusion_3, StableDiffusion3Policy),
        (lambda: stable_diffusion_3(with_t5=False), StableDiffusion3Policy),
        (flux, FluxPolicy),
        (lambda: flux(guidance_embeds=False), FluxPolicy),
    ],
)
def test_the_pipelines_class_chooses_the_adapter_and_a_resolution_its_latents(tmp_path, pipeline, adapter):
    pipeline().save_pretrained(tmp_path)
    policy = load_policy(tmp_path, device="cpu", resolution=16)
    assert type(policy) is adapter
    assert policy.image_size == (16, 16)
    with pytest.raises(EtudeError, match=r"resolution = 7: .* multiple of"):
        load_policy(tmp_path, device="cpu", resolution=7)


def test_pickled_weights_are_refused(tmp_path):
    flux().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(EtudeError, match="safetensors"):
        load_policy(tmp_path, device="cpu")


COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the repository `owner/tiny`, whose `main` has fp16 variants alone and whose `v1` is a model of another seed."""
    repository = tmp_path / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    for seed, (revision, commit) in enumerate(COMMITS.items()):
        (repository / "refs" / revision).write_text(commit)
        variant = "fp16" if revision == "main" else None
        stable_diffusion(seed).save_pretrained(repository / "snapshots" / commit, variant=variant)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return repository / "snapshots"


@pytest.mark.parametrize("outline", [True, False])
def test_a_hub_id_names_its_revision_and_the_commit_is_known(hub, outline):
    policy = load_policy("owner/tiny@v1", device="cpu", outline=outline)
    assert policy.revision == COMMITS["v1"]
    if not outline:
        expected = load_policy(hub / COMMITS["v1"], device="cpu")
        assert expected.revision is None
        assert torch.equal(policy.network.conv_in.weight, expected.network.conv_in.weight)


def test_a_variant_of_the_weights_is_read_where_it_is_asked_for(hub):
    policy = load_policy("owner/tiny", device="cpu", variant="fp16")
    assert policy.revision == COMMITS["main"]
    assert torch.equal(policy.network.conv_in.weight, stable_diffusion(0).unet.conv_in.weight)
    with pytest.raises(EtudeError, match=r"text_encoder without a suffix.*give variant = fp16"):
        load_policy(hub / COMMITS["main"], device="cpu")


def test_what_is_neither_on_disk_nor_a_revision_of_the_hub_is_one_clear_error(hub):
    with pytest.raises(EtudeError, match="no such directory, so a hub id with its revision"):
        load_policy("owner/tiny@v2", device="cpu")
    with pytest.raises(EtudeError, match="there is no such directory"):
        load_policy("./owner/tiny@v1", device="cpu")
    for name in ("tiny@v1", "owner/tiny@"):
        with pytest.raises(EtudeError, match="unknown model"):
            load_policy(name, device="cpu")


def test_the_snippet_of_an_adapter_loads_that_revision_and_variant(policy):
    policy.add_lora(LoraConfig(rank=2), seed=0)
    snippet = deployment_snippet(policy, ModelSource("owner/tiny@v1", variant="fp16"), 4, 5.0)
    assert "from_pretrained('owner/tiny', revision='v1', variant='fp16')" in snippet


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("tried to allocate 24 GiB"), MemoryError()])
def test_a_model_too_large_for_the_memory_is_no_broken_one(tmp_path, monkeypatch, error):
    stable_diffusion().save_pretrained(tmp_path)

    def full(*_, **__):
        raise error

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.from_pretrained", full)
    with pytest.raises(EtudeError, match="does not fit into memory"):
        load_policy(tmp_path, device="cpu")


def test_a_network_that_diffusers_gives_no_adapters_is_refused_for_a_lora(policy, monkeypatch):
    monkeypatch.delattr("diffusers.loaders.peft.PeftAdapterMixin.add_adapter")
    with pytest.raises(EtudeError, match=r"UNet2DConditionModel no adapters: set lora\.rank to 0"):
        policy.add_lora(LoraConfig(), seed=0)


def test_lora_targets_that_match_no_layer_are_named(policy):
    with pytest.raises(EtudeError, match="to_qq"):
        policy.add_lora(LoraConfig(targets=["to_q", "to_qq"]), seed=0)
