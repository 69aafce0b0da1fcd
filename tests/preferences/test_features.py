"""The frozen features: their products sum to the cosine of the model that they come from, and a row depends on its image alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from etude.errors import EtudeError
from etude.preferences.features import _file_name, load_backbone, pool_features
from etude.rewards import get, score_one
from support.preferences import fill, pictures, quick
from support.tiny import tokenizer

PROMPTS = ["red heart", "pizza", "red heart", "tiger", "sun"]
IMAGES = torch.from_numpy(pictures(5, 32))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP in the layout of its hub repositories."""
    words, directory = tokenizer(), tmp_path_factory.mktemp("clip")
    tower = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "hidden_size": 16, "vocab_size": len(words), "pad_token_id": words.pad_token_id}
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "max_position_embeddings": 16}
    vision = {**tower, "hidden_size": 16, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config={**text, **ends}, vision_config=vision, projection_dim=12)).save_pretrained(
        directory
    )
    words.save_pretrained(directory)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(directory)
    return directory


def test_the_products_of_a_clip_sum_to_the_cosine_of_its_score(clip: Path) -> None:
    image, products = load_backbone(f"clip:{clip}").describe(IMAGES, PROMPTS)
    assert image.shape == products.shape == (5, 12)
    pickscore = get(f"pickscore:{clip}")
    scores = score_one("pickscore", pickscore, IMAGES, PROMPTS)
    torch.testing.assert_close(products.sum(dim=1) * pickscore.network.logit_scale.exp(), scores, rtol=1e-4, atol=1e-5)


def test_the_products_of_the_embedded_features_sum_to_the_alignment() -> None:
    features, products, statistics = load_backbone("embedded").describe(IMAGES, PROMPTS)
    assert (features.shape[1], products.shape[1], statistics.shape[1]) == (1280, 128, 11)
    torch.testing.assert_close(100 * products.sum(dim=1), score_one("alignment", get("alignment"), IMAGES, PROMPTS))


def test_features_of_a_pool_are_those_of_its_images_whatever_their_sizes(clip: Path, tmp_path: Path) -> None:
    pool = fill(fill(quick(tmp_path / "pool"), 2, 2, size=24), 2, 2, "larger", seed=1, size=40)
    values = pool_features(pool, f"clip:{clip}")
    backbone = load_backbone(f"clip:{clip}")
    for row, image in zip(values.values, pool.images(), strict=True):
        alone = torch.cat(backbone.describe(torch.from_numpy(pool.pixels(image.digest))[None], [image.prompt]), dim=1)
        np.testing.assert_allclose(row, alone[0].numpy(), atol=1e-5)
    assert values.blocks == (12, 12)
    fill(pool, 2, 1, "later", seed=2, size=24)
    more = pool_features(pool, f"clip:{clip}")
    assert len(more.images) == 10
    np.testing.assert_array_equal(more.values[:8], values.values)


@pytest.mark.parametrize(
    ("name", "words"), [("clipp", "did you mean 'clip'"), ("clip", "needs a model"), ("embedded:x", "unknown backbone")]
)
def test_an_unknown_backbone_is_refused(name: str, words: str) -> None:
    with pytest.raises(EtudeError, match=words):
        load_backbone(name)


def test_no_two_backbones_share_a_cache() -> None:
    names = ["embedded", "clip:a/b", "clip:a-b", "clip-a-b", "clip:a b", "clip:" + "x" * 300]
    files = [_file_name(name) for name in names]
    assert files[0] == "embedded"
    assert len(set(files)) == len(names)
    assert max(map(len, files)) < 200
