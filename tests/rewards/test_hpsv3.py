"""HPSv3 on tiny random weights: the head on the token's state, whatever the batch, the padding and the names of the tensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLImageProcessorPil, Qwen2VLModel

from etude.errors import EtudeError
from etude.rewards import get
from etude.rewards.models.hpsv3 import QUESTION, message, renamed, resized

PROMPTS = ["a cat", "two red dogs on a bench, at night", "x"]
IMAGES = torch.randint(0, 256, (3, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|endoftext|>"]


def byte_symbols() -> list[str]:
    """The 256 symbols that byte-level tokenizers write bytes with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def save_base(directory: Path) -> Qwen2VLConfig:
    """Configuration, tokenizer and image processor in the layout of Qwen2-VL."""
    symbols = [*byte_symbols(), *SPECIAL]
    words = Qwen2Tokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[])
    words.add_special_tokens({"pad_token": "<|endoftext|>", "additional_special_tokens": SPECIAL[:-1]})
    words.save_pretrained(directory)
    Qwen2VLImageProcessorPil().save_pretrained(directory)
    places = {name: symbols.index(f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad")}
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={**text, "intermediate_size": 32, "vocab_size": len(symbols), "rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
        image_token_id=places["image_pad"],
        vision_start_token_id=places["vision_start"],
        vision_end_token_id=places["vision_end"],
    )
    config.save_pretrained(directory)
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, Qwen2VLModel, nn.Sequential]:
    """A checkpoint under the published names, the base, the network and the head."""
    root = tmp_path_factory.mktemp("hpsv3")
    config = save_base(root / "base")
    config.text_config.vocab_size += 1  # the token of the reward
    torch.manual_seed(0)
    network = Qwen2VLModel(config).eval()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    head = nn.Sequential(nn.Linear(16, 1024), nn.ReLU(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
    published = {
        f"rm_head.{at}.{part}": getattr(head[i], part)
        for i, at in ((0, 0), (2, 3), (4, 5))
        for part in ("weight", "bias")
    }
    for name, tensor in network.state_dict().items():
        published[name if name.startswith("visual.") else f"model.{name.removeprefix('language_model.')}"] = tensor
    published["lm_head.weight"] = torch.zeros(len(network.language_model.embed_tokens.weight), 16)
    (root / "weights").mkdir()
    save_file({name: tensor.detach().clone() for name, tensor in published.items()}, root / "weights/HPSv3.safetensors")
    return root / "weights", root / "base", network, head


@torch.no_grad()
def direct(made, i: int) -> Tensor:
    """mu of one image, unpadded: embeddings, image features in their places, the language model alone, and the head."""
    _, base, network, head = made
    words, see = Qwen2Tokenizer.from_pretrained(base), Qwen2VLImageProcessorPil.from_pretrained(base)
    picture = Image.fromarray(IMAGES[i].permute(1, 2, 0).numpy()).resize((532, 392), Image.Resampling.BICUBIC)
    seen = see(images=picture, return_tensors="pt")
    before, _, after = message(PROMPTS[i], 19 * 14).partition("<|Reward|>")
    start, end = (torch.tensor(words(text).input_ids) for text in (before, after))
    reward = torch.tensor([len(network.language_model.embed_tokens.weight) - 1])
    ids = torch.cat([start, reward, end])
    x = network.language_model.embed_tokens(ids)
    features = network.get_image_features(seen["pixel_values"], seen["image_grid_thw"]).pooler_output
    x[ids == network.config.image_token_id] = torch.cat(list(features))
    states = network.language_model(inputs_embeds=x[None]).last_hidden_state[0]
    return head(states[len(start)])[0]


def test_it_is_the_heads_first_output_at_the_token_of_the_reward(made):
    weights, base, *_ = made
    reward = get(f"hpsv3:{weights},base={base},dtype=float32,batch_size=2")
    expected = torch.stack([direct(made, i) for i in range(3)])
    scores = reward(IMAGES, PROMPTS)
    assert expected.std() > 1e-3
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(reward(IMAGES[1:2], PROMPTS[1:2]), scores[1:2], rtol=1e-3, atol=1e-4)


def test_names_of_before_and_since_give_the_same_network(made):
    network = made[2]
    since = {f"model.{name}": tensor for name, tensor in network.state_dict().items()} | {
        "lm_head.weight": torch.ones(1)
    }
    assert set(renamed(since)) == set(network.state_dict())
    assert set(renamed({"model.layers.0.x": torch.ones(1), "visual.y": torch.ones(1)})) == {
        "language_model.layers.0.x",
        "visual.y",
    }


def test_the_question_is_the_published_one_to_the_blank():
    """The model was trained on these tokens: a blank that an editor removes gives other scores."""
    digest = hashlib.sha256(QUESTION.encode()).hexdigest()
    assert digest == "e61d58f3c7d3be656ccd024f5c0cd8c001cf9a2122305d52b59e60d94147e0f2"
    assert message("a <|Reward|> cat", 2).count("<|Reward|>") == 1


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((512, 512), (448, 448)), ((448, 448), (448, 448)), ((40, 56), (392, 532)), ((1024, 512), (616, 308))],
)
def test_every_image_is_resized_to_whole_patches_and_about_one_area(size, fitted):
    assert resized(Image.new("RGB", size)).size == fitted


def test_what_is_no_hpsv3_is_one_sentence(made, tmp_path):
    base = made[1]
    save_file({"model.layers.0.x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(EtudeError, match=r"is no HPSv3: it lacks rm_head.0.weight"):
        get(f"hpsv3:{tmp_path / 'other.safetensors'},base={base}").load()
