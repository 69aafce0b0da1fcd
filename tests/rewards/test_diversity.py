"""Diversity by its formula: equal images have none, orthogonal ones all, and the Vendi score counts the different."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
