"""The training of the embedded models sees what the pipelines will compute."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline, StableDiffusionPipeline
from torch.utils.data import DataLoader

from etude import zoo
from tools.zoo.autoencoder import build_autoencoder
from tools.zoo.card import write_card
from tools.zoo.emoji_data import EmojiSet
from tools.zoo.flux import FluxNetworks, FluxRecipe, pack, train_flux
from tools.zoo.pretrain import pretrain, with_history
from tools.zoo.text import MAX_TOKENS_T5, CaptionSampler
from tools.zoo.training import Batches, TrainingRecipe, sampling_weights
from tools.zoo.unet import UNetNetworks, train_unet

NAMES = ["red heart", "tiger face", "man walking", "flag: chad", "soccer ball", "pizza"]


@pytest.fixture(scope="module")
def data() -> EmojiSet:
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 64, 64), dtype=np.uint8)
    flags = np.array([name.startswith("flag") for name in NAMES])
    emoji = np.arange(12) // 2
    return EmojiSet(images, emoji, ["noto", "twemoji"] * 6, NAMES, [["thing", "sign"]] * 6, flags)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return build_autoencoder().eval()


def jiggle(network: torch.nn.Module) -> None:
    """Away from the zeros that a block of a fresh FLUX transformer starts from."""
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)


def test_the_velocity_that_is_trained_is_the_one_that_flux_pipeline_follows(data, vae):
    torch.manual_seed(0)
    networks = FluxNetworks.build(data).eval()
    jiggle(networks)
    x = torch.randn(2, 16, 32)
    seen = {}

    def keep(pipeline, step, timestep, tensors):
        seen[step] = tensors["latents"]
        return tensors

    pipeline = networks.pipeline(vae)
    pipeline.transformer.float()  # what loading does; the copy in the pipeline is in half precision
    pipeline.transformer.load_state_dict(networks.transformer.state_dict())
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        NAMES[:2],
        latents=x,
        num_inference_steps=3,
        guidance_scale=2.5,
        max_sequence_length=MAX_TOKENS_T5,
        height=64,
        width=64,
        output_type="latent",
        callback_on_step_end=keep,
    )
    sigmas = pipeline.scheduler.sigmas
    with torch.no_grad():
        velocity = networks(x, sigmas[:1].expand(2), *networks.tokens(NAMES[:2]), torch.full((2,), 2.5))
    torch.testing.assert_close(seen[0], x + (sigmas[1] - sigmas[0]) * velocity, rtol=0, atol=1e-5)


def test_the_noise_that_is_trained_is_the_one_that_stable_diffusion_pipeline_predicts(data, vae):
    torch.manual_seed(0)
    networks = UNetNetworks.build(data).eval()
    pipeline: StableDiffusionPipeline = networks.pipeline(vae)
    embeddings, _ = pipeline.encode_prompt(NAMES[:2], "cpu", 1, do_classifier_free_guidance=False)
    x, t = torch.randn(2, 8, 8, 8), torch.tensor([10, 900])
    with torch.no_grad():
        expected = networks.unet(x, t, embeddings).sample
        assert torch.equal(networks(x, t, *networks.tokens(NAMES[:2])), expected)


def test_packing_is_undone_by_the_pipelines_unpacking():
    latents = torch.randn(2, 8, 8, 8)
    assert torch.equal(FluxPipeline._unpack_latents(pack(latents), 64, 64, 8), latents)


def test_a_distilled_student_starts_at_its_teacher(data):
    torch.manual_seed(0)
    networks = FluxNetworks.build(data)
    jiggle(networks)
    latents, once = torch.randn(12, 8, 8, 8), TrainingRecipe(steps=1, batch_size=4)
    none = TrainingRecipe(steps=0)
    _, unguided = train_flux(latents, data, networks, lambda n: None, FluxRecipe(none, once, largest_guidance=1.0))
    assert unguided["final_loss"] < 1e-10
    _, guided = train_flux(latents, data, networks, lambda n: None, FluxRecipe(none, once, largest_guidance=5.0))
    assert guided["final_loss"] > 1e-4
    assert guided["stages"].keys() == {"guidance distillation"}


def test_flow_matching_and_noise_prediction_learn(data):
    torch.manual_seed(0)
    latents, recipe = torch.randn(12, 8, 8, 8), TrainingRecipe(steps=25, batch_size=8, learning_rate=3e-3)
    flux = FluxRecipe(recipe, TrainingRecipe(steps=0))
    _, figures = train_flux(latents, data, FluxNetworks.build(data), lambda averaged: None, flux)
    assert figures["final_loss"] < 1.99  # the zero velocity that it starts from scores E |eps - x0|^2 = 2
    _, figures = train_unet(latents, data, UNetNetworks.build(data), lambda averaged: None, recipe)
    assert np.isfinite(figures["final_loss"])


def test_flags_are_never_drawn_and_people_less_often(data):
    weights = sampling_weights(data)
    assert weights.sum() == pytest.approx(1)
    assert np.all(weights[data.is_flag[data.emoji]] == 0)
    assert weights[4] == pytest.approx(0.35 * weights[0])


def test_a_batch_is_a_function_of_seed_and_step_alone(data):
    def batches(seed):
        recipe = TrainingRecipe(steps=3, batch_size=4, seed=seed)
        return Batches(torch.arange(12.0)[:, None], data, recipe, UNetNetworks.build(data).tokens)

    first, again, other = batches(0), list(DataLoader(batches(0), batch_size=None)), batches(1)
    assert len(again) == 3
    assert all(torch.equal(a, b) for step in (2, 0) for a, b in zip(first[step], again[step], strict=True))
    assert not torch.equal(first[0][1], first[1][1])
    assert not torch.equal(first[0][1], other[0][1])


def test_captions_are_dropped_at_the_stated_rate(data):
    captions = CaptionSampler(data)(np.zeros(4000, dtype=np.int64), np.random.default_rng(0))
    assert captions.count("") / 4000 == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 4000) ** 0.5)
    assert all(caption.startswith("red heart") for caption in captions if caption)


def test_legs_add_up_to_the_steps_and_seconds_of_the_whole(tmp_path):
    (tmp_path / "figures").mkdir()
    first = {"steps": 10, "seconds": 5, "final_loss": 0.3}
    (tmp_path / "figures" / "denoiser.json").write_text(json.dumps(first))
    second = {"steps": 7, "seconds": 2, "final_loss": 0.2}
    assert with_history(second, tmp_path) == {**second, "steps": 17, "seconds": 7, "legs": [first, second]}
    assert with_history(second, None) == second


@pytest.mark.parametrize("name", ["emoji-sd", "emoji-flux"])
def test_pretraining_writes_a_pipeline_without_traces_of_where_it_was_made(name, data, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.zoo.pretrain.load_emoji", lambda cache: data)
    recipe = TrainingRecipe(steps=1, batch_size=2)

    def train(latents, data, networks, save):
        if name == "emoji-sd":
            return train_unet(latents, data, networks, save, recipe)
        return train_flux(latents, data, networks, save, FluxRecipe(recipe, recipe))

    out, networks = tmp_path / name, UNetNetworks if name == "emoji-sd" else FluxNetworks
    pretrain(networks, train, out, tmp_path, zoo.path("emoji-sd"))
    pretrain(networks, train, tmp_path / "more", tmp_path, out, initial=out)
    texts = [path.read_text() for path in (tmp_path / "more").rglob("*.json")]
    assert not any(str(tmp_path) in text for text in texts)
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "more"), StableDiffusionPipeline | FluxPipeline)
    estimate = {"mean": 1.0, "low": 0.5, "high": 1.5}
    quality = {"generated": estimate, "real": estimate, "chance": estimate, "share_of_real_above_chance": 0.5}
    card = write_card(tmp_path / "more", {**quality, "prompts": 2, "images_per_prompt": 4})
    assert card["denoiser"]["steps"] == (2 if name == "emoji-sd" else 4)
    assert card["parameters"]["vae"] > 1e6
