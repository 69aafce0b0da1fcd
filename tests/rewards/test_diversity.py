"""Diversity by its formula: equal images have none, orthogonal ones all, and the Vendi score counts the different."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from etude.errors import EtudeError
from etude.measuring.pairs import Measurement
from etude.rewards import get, score, score_one
from etude.rewards.diversity import Diversity, Vendi

PROMPTS = ["sun", "moon"] * 3


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("name", ["diversity", "diversity:pixels"])
def test_diversity_is_the_mean_distance_to_the_other_images_of_the_prompt(name, images):
    reward = get(name)
    features = reward._features(images).double()
    if name == "diversity":
        distance = 1 - features @ features.T
    else:
        distance = (features[:, None] - features[None]).square().mean(dim=-1).sqrt()
    expected = [sum(distance[i, j].item() for j in range(i % 2, 6, 2) if j != i) / 2 for i in range(6)]
    assert score_one(name, reward, images, PROMPTS).tolist() == pytest.approx(expected, rel=1e-5)


def test_equal_images_have_no_diversity_and_a_vendi_score_of_one(images):
    equal = images[:1].expand(6, -1, -1, -1)
    scores = score(["diversity:pixels", "diversity", "vendi"], equal, PROMPTS)
    assert torch.equal(scores["diversity:pixels"], torch.zeros(6))
    assert scores["diversity"].abs().max() < 1e-6
    assert scores["vendi"].numpy() == pytest.approx(np.ones(6), abs=1e-4)


def test_the_vendi_score_counts_the_different_images():
    """n orthogonal features score n; k copies of each of m orthogonal ones score m; (1, r) gives two eigenvalues."""
    vendi = Vendi.__new__(Vendi)
    assert vendi.spread(torch.eye(5).double()).tolist() == pytest.approx([5] * 5)
    assert vendi.spread(torch.eye(3).double().repeat(4, 1)).tolist() == pytest.approx([3] * 12)
    r = 0.3
    pair = torch.tensor([[1, 0], [r, (1 - r * r) ** 0.5]]).double()
    weights = np.array([(1 + r) / 2, (1 - r) / 2])
    assert vendi.spread(pair)[0].item() == pytest.approx(np.exp(-(weights * np.log(weights)).sum()))


def test_orthogonal_features_are_at_distance_one():
    diversity = Diversity.__new__(Diversity)
    diversity.kind = "embedded"
    assert diversity.spread(torch.eye(4).double()).tolist() == pytest.approx([1] * 4)


def test_the_expected_diversity_does_not_depend_on_the_number_of_images():
    """A U-statistic: its mean over all subsets of 3 of 6 images is that of the 6."""
    diversity = Diversity.__new__(Diversity)
    diversity.kind = "embedded"
    rows = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).double(), dim=-1)
    subsets = torch.combinations(torch.arange(6), 3)
    means = torch.stack([diversity.spread(rows[subset]).mean() for subset in subsets])
    assert means.mean().item() == pytest.approx(diversity.spread(rows).mean().item())


def test_one_image_of_a_prompt_is_refused(images):
    with pytest.raises(EtudeError, match=r"one image of the prompt 'stars'.*at least 2 of each"):
        score(["diversity:pixels"], images[:3], ["sun", "sun", "stars"])


def test_a_measurement_that_draws_too_few_images_of_a_prompt_is_refused_before_it_draws_any():
    Measurement.of(["diversity:pixels"], ["sun", "moon"], num_images=4)
    with pytest.raises(
        EtudeError, match=r"'diversity:pixels' .*at least 2 of each, but a prompt has 1: set images_per"
    ):
        Measurement.of(["diversity:pixels"], ["sun", "moon"], num_images=3)


@pytest.mark.parametrize(
    ("name", "wrong"), [("diversity:faces", "faces"), ("vendi:pixels", "pixels"), ("vendi:embedded:x", "x")]
)
def test_unknown_features_are_refused(name, wrong):
    with pytest.raises(EtudeError, match=f"unknown features of .*{wrong}.*choices are"):
        get(name)


def test_a_measurement_gives_it_an_interval_clustered_by_prompt(images):
    measurement = Measurement.of(["diversity:pixels"], ["sun", "moon"], num_images=6, images_per_prompt=3)
    assert measurement.scores(images)["diversity:pixels"].shape == (6,)
    assert measurement.clusters == [0, 1] * 3


def save_clip(directory: Path) -> CLIPModel:
    """A tiny CLIP of random weights, in the layout of its hub repositories."""
    words = CLIPTokenizer(vocab={"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}, merges=[], model_max_length=8)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 3, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8}, projection_dim=12)
    network = CLIPModel(config).eval()
    network.save_pretrained(directory)
    words.save_pretrained(directory)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(directory)
    return network


def save_dino(directory: Path) -> Dinov2Model:
    """A tiny DINOv2 of random weights, with the published processor's steps: resize, crop the centre, normalise."""
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    network = Dinov2Model(Dinov2Config(**tower)).eval()
    network.save_pretrained(directory)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    steps = {"size": {"shortest_edge": 18}, "crop_size": 16, "image_mean": mean, "image_std": std}
    CLIPImageProcessorPil(**steps).save_pretrained(directory)
    return network


@pytest.fixture(scope="module", params=["clip", "dino"])
def network(request, tmp_path_factory) -> tuple[str, Tensor]:
    """The name of features from a checkpoint, and the unit vectors of IMAGES by the network's own forward."""
    directory, kind = tmp_path_factory.mktemp(request.param), request.param
    torch.manual_seed(0)
    made = save_clip(directory) if kind == "clip" else save_dino(directory)
    processor = CLIPImageProcessorPil.from_pretrained(directory)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in CHECKPOINT_IMAGES]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        rows = made.get_image_features(pixel_values=pixels) if kind == "clip" else made(pixel_values=pixels)
    return f"{kind}:{directory}", torch.nn.functional.normalize(rows.pooler_output, dim=-1)


CHECKPOINT_IMAGES = torch.randint(0, 256, (5, 3, 24, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
GROUPS = [0, 1, 0, 1, 0]


def test_in_the_features_of_a_checkpoint_diversity_is_the_mean_cosine_distance(network):
    name, rows = network
    found = get(f"diversity:{name}")(CHECKPOINT_IMAGES, ["p"] * 5, groups=GROUPS)
    distances = 1 - rows @ rows.T
    expected = [sum(distances[i, j] for j in range(5) if j != i and GROUPS[j] == GROUPS[i]) for i in range(5)]
    expected = [total / (GROUPS.count(GROUPS[i]) - 1) for i, total in enumerate(expected)]
    assert found.tolist() == pytest.approx([float(each) for each in expected], abs=1e-5)
    assert found.std() > 1e-4


def test_in_the_features_of_a_checkpoint_the_vendi_score_lies_between_one_and_the_number_of_images(network):
    reward = get(f"vendi:{network[0]}")
    found = reward(CHECKPOINT_IMAGES, ["p"] * 5, groups=GROUPS)
    assert 1 < found[1] == found[3] <= 2
    assert 1 < found[0] == found[2] == found[4] <= 3
    same = CHECKPOINT_IMAGES[:1].expand(5, -1, -1, -1).contiguous()
    assert reward(same, ["p"] * 5, groups=GROUPS).tolist() == pytest.approx([1] * 5, abs=1e-4)
    assert {Path(place).parent for place in reward.files()} == {Path(network[0].partition(":")[2])}


def test_dinov2_is_pinned_to_a_commit_and_pixels_have_no_vendi_score():
    assert re.fullmatch(r"facebook/dinov2-base@[0-9a-f]{40}", get("diversity:dino").sources()[0])
    with pytest.raises(EtudeError, match="unknown features of vendi 'pixels'"):
        get("vendi:pixels")
