"""The style reward: log odds of a class, a head that is the minimum of its loss, and the head that is shipped."""

from __future__ import annotations

import json

import pytest
import torch

from etude.errors import EtudeError
from etude.rewards import get, score
from etude.rewards.style import STYLES, WEIGHTS, log_odds
from tools.zoo.style import StyleRecipe, fit_head, train_style


@pytest.fixture
def blobs() -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three overlapping classes, float32 `[600, 5]`, and the classes."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(3, (600,), generator=generator)
    centres = 1.2 * torch.eye(5)[:3] + 7
    return centres[classes] + torch.randn(600, 5, generator=generator), classes


def test_log_odds_are_those_of_the_softmax() -> None:
    logits = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    for style in range(3):
        assert torch.allclose(log_odds(logits, style).sigmoid(), logits.softmax(1)[:, style], atol=1e-12)


@pytest.mark.parametrize("decay", [1e-3, 1e-1])
def test_the_fitted_head_is_where_the_gradient_vanishes(blobs: tuple[torch.Tensor, torch.Tensor], decay: float) -> None:
    features, classes = blobs
    weight, bias = (each.double() for each in fit_head(features, classes, decay, 300))
    x, deviation = features.double(), features.double().std(0)
    error = ((x @ weight.T + bias).softmax(1) - torch.eye(3, dtype=torch.float64)[classes]) / len(x)
    standardised = (x - x.mean(0)) / deviation
    assert (error.T @ standardised + decay * weight * deviation).abs().max() < 1e-5
    assert error.sum(0).abs().max() < 1e-5


def test_the_figures_are_of_pictures_that_neither_fit_nor_decay_has_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    emoji, styles = torch.arange(120).repeat_interleave(3), torch.arange(3).repeat(120)
    views = torch.randn(2, 360, 4, generator=generator) + 3 * torch.eye(4)[styles]
    order = torch.randperm(120, generator=generator)
    recipe = StyleRecipe(held_out=20, decays=(1e-3, 1e-1), iterations=100)
    head, figures = train_style(views, styles, emoji, order, recipe)
    assert (figures["pictures"], figures["held_out"]) == (300, 60)
    assert figures["as it is"]["accuracy"] > 0.85
    spoiled = views.clone()
    spoiled[:, torch.isin(emoji, order[:20])] = 100.0
    again, _ = train_style(spoiled, styles, emoji, order, recipe)
    assert torch.equal(head[0], again[0])


def test_the_shipped_head_tells_styles_apart_that_it_has_not_seen() -> None:
    figures = json.loads((WEIGHTS.parent / "card.json").read_text())
    assert figures["as it is"]["accuracy"] > 0.95
    assert figures["through the autoencoder"]["accuracy"] > 0.85


def test_the_odds_of_an_image_are_of_one_distribution() -> None:
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scores = score([f"style:{style}" for style in STYLES], images, ["a", "b", "c"])
    assert torch.allclose(sum(each.sigmoid() for each in scores.values()), torch.ones(3), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("style", "needs the name of a style: style:noto, style:twemoji, style:3d"),
        ("style:notto", "unknown art style 'notto': did you mean 'noto'"),
    ],
)
def test_a_style_is_one_of_three(name: str, said: str) -> None:
    with pytest.raises(EtudeError, match=said):
        get(name)
