"""Model rewards: each equals a computation of the same tiny random weights by other means, and loads safetensors only."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from etude.errors import EtudeError
from etude.rewards import WeightedRewards, get, names, register, revisions, score_one
from etude.rewards.models.clip import PickScore
from etude.rewards.models.preprocessing import MEAN, STD, crop_to_square, pad_to_square

SIZE = 32
PROMPTS = ["a cat", "a red <car>", "the sea", "a cat", "x" * 100]
IMAGES = torch.randint(0, 256, (5, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
NAMES = ["aesthetic", "clip_iqa", "clip_score", "hpsv2", "imagereward", "pickscore"]


def clip_tokenizer() -> CLIPTokenizer:
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)


def clip_config() -> CLIPConfig:
    words = clip_tokenizer()
    tower = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
    text = {**tower, "hidden_size": 24, "vocab_size": len(words), "pad_token_id": words.pad_token_id}
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    vision = {**tower, "hidden_size": 32, "image_size": SIZE, "patch_size": 16}
    return CLIPConfig(text_config={**text, **ends}, vision_config=vision, projection_dim=20)


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough for every one of them to show in the score."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim:
                centre = 1.0 if name.endswith("weight") and p.ndim == 1 else 0.0
                p.copy_(centre + 0.3 * torch.randn(p.shape, generator=generator))
    return network.eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPModel, Path]:
    """A tiny CLIP in the layout of its hub repositories."""
    directory = tmp_path_factory.mktemp("clip")
    network = randomised(CLIPModel(clip_config()))
    network.save_pretrained(directory)
    clip_tokenizer().save_pretrained(directory)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(directory)
    return network, directory


def direct_logits(network: CLIPModel, prompts: list[str], pixels: Tensor | None = None) -> Tensor:
    """exp(logit_scale) cos of each pair, one at a time and unpadded, by the forward pass of CLIPModel."""
    words = clip_tokenizer()
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    rows = []
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([words(prompt).input_ids])
        if ids.shape[1] > 77:
            ids = torch.cat([ids[:, :76], ids[:, -1:]], dim=1)
        picture = Image.fromarray(IMAGES[i].permute(1, 2, 0).numpy())
        seen = processor(images=picture, return_tensors="pt")["pixel_values"] if pixels is None else pixels[i : i + 1]
        with torch.no_grad():
            rows.append(network(input_ids=ids, pixel_values=seen).logits_per_image[0, 0])
    return torch.stack(rows)


def assert_scores(reward: Any, expected: Tensor) -> None:
    scores = reward(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    assert scores.shape == (5,)
    assert expected.std() > 1e-3 * expected.abs().mean(), "the comparison would not see a wrong network"
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


# ---- CLIPScore and PickScore


def test_pickscore_is_the_logit_of_clip(clip: tuple[CLIPModel, Path]) -> None:
    network, directory = clip
    assert_scores(get(f"pickscore:{directory}"), direct_logits(network, PROMPTS))


def test_clip_score_is_two_and_a_half_times_the_positive_part_of_the_cosine(clip: tuple[CLIPModel, Path]) -> None:
    network, directory = clip
    cosine = direct_logits(network, [f"A photo depicts {p}" for p in PROMPTS]) / network.logit_scale.exp().detach()
    assert_scores(get(f"clip_score:{directory}"), 2.5 * cosine.clamp(min=0))
    bare = direct_logits(network, PROMPTS) / network.logit_scale.exp().detach()
    assert_scores(get(f"clip_score:{directory},prefix="), 2.5 * bare.clamp(min=0))


def test_the_processor_may_come_from_another_checkpoint_than_the_weights(
    clip: tuple[CLIPModel, Path], tmp_path: Path
) -> None:
    network, directory = clip
    network.save_pretrained(tmp_path / "weights")
    reward = get(f"pickscore:{tmp_path / 'weights'},base={directory}")
    assert_scores(reward, direct_logits(network, PROMPTS))


# ---- CLIP-IQA


def test_clip_iqa_is_the_probability_of_the_positive_of_two_opposite_descriptions(clip: tuple[CLIPModel, Path]) -> None:
    network, directory = clip
    good, bad = (direct_logits(network, [text] * 5) for text in ("Good photo.", "Bad photo."))
    assert_scores(get(f"clip_iqa:{directory}"), torch.sigmoid(good - bad))
    sharp = get(f"clip_iqa:{directory},positive=Sharp photo.,negative=Blurry photo.")
    blurry = get(f"clip_iqa:{directory},positive=Blurry photo.,negative=Sharp photo.")
    torch.testing.assert_close(sharp(IMAGES, PROMPTS) + blurry(IMAGES, PROMPTS), torch.ones(5))
    assert torch.equal(sharp(IMAGES, PROMPTS), sharp(IMAGES, ["another"] * 5))  # the prompt is not asked
    with pytest.raises(EtudeError, match="must be two descriptions"):
        get(f"clip_iqa:{directory},negative=Good photo.")


# ---- LAION aesthetic


def head_tensors(width: int, prefix: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = {"0": (width, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
    tensors = {}
    for name, (inside, outside) in sizes.items():
        tensors[f"{prefix}layers.{name}.weight"] = torch.randn(outside, inside, generator=generator) / inside**0.5
        tensors[f"{prefix}layers.{name}.bias"] = torch.randn(outside, generator=generator)
    return tensors


def direct_head(features: Tensor, tensors: dict[str, Tensor], prefix: str = "") -> Tensor:
    for name in ("0", "2", "4", "6", "7"):
        features = F.linear(features, tensors[f"{prefix}layers.{name}.weight"], tensors[f"{prefix}layers.{name}.bias"])
    return features[:, 0]


@pytest.mark.parametrize("prefix", ["", "mlp."], ids=["published", "wrapped"])
def test_aesthetic_is_the_linear_head_on_the_normalised_image_embedding(
    clip: tuple[CLIPModel, Path], tmp_path: Path, prefix: str
) -> None:
    network, directory = clip
    tensors = head_tensors(20, prefix)
    save_file({**tensors, "clip.vision_model.post_layernorm.weight": torch.ones(3)}, tmp_path / "head.safetensors")
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in IMAGES]
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    with torch.no_grad():
        embedding = network.get_image_features(**processor(images=pictures, return_tensors="pt")).pooler_output
    expected = direct_head(embedding / embedding.norm(dim=-1, keepdim=True), tensors, prefix)
    assert_scores(get(f"aesthetic:{tmp_path / 'head.safetensors'},base={directory}"), expected)


def test_aesthetic_refuses_a_head_of_another_width(clip: tuple[CLIPModel, Path], tmp_path: Path) -> None:
    save_file(head_tensors(24), tmp_path / "head.safetensors")
    reward = get(f"aesthetic:{tmp_path / 'head.safetensors'},base={clip[1]}")
    with pytest.raises(EtudeError, match=r"'layers.0.weight' must be \[1024, 20\], and there is \[1024, 24\]"):
        reward(IMAGES, PROMPTS)


# ---- HPS v2.1


def open_clip_tensors(width: int, vision_width: int, words: int, out: int = 20) -> dict[str, Tensor]:
    """A random CLIP under the names and shapes of OpenCLIP, two blocks in each tower."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    tensors = {
        "logit_scale": torch.tensor(4.6),
        "positional_embedding": draw(77, width),
        "text_projection": draw(width, out),
        "token_embedding.weight": draw(words, width),
        "visual.class_embedding": draw(vision_width),
        "visual.positional_embedding": draw(5, vision_width),
        "visual.proj": draw(vision_width, out),
        "visual.conv1.weight": draw(vision_width, 3, 16, 16),
    }
    norms = {"ln_final": width, "visual.ln_pre": vision_width, "visual.ln_post": vision_width}
    for tower, d in {"": width, "visual.": vision_width}.items():
        for i in range(2):
            block = f"{tower}transformer.resblocks.{i}"
            linear = {
                "attn.in_proj_": (3 * d, d),
                "attn.out_proj.": (d, d),
                "mlp.c_fc.": (64, d),
                "mlp.c_proj.": (d, 64),
            }
            for name, shape in linear.items():
                tensors[f"{block}.{name}weight"], tensors[f"{block}.{name}bias"] = draw(*shape), draw(shape[0])
            norms |= {f"{block}.ln_1": d, f"{block}.ln_2": d}
    for name, d in norms.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + draw(d), draw(d)
    return tensors


def open_clip_tower(t: dict[str, Tensor], tower: str, x: Tensor, causal: bool) -> Tensor:
    """The residual blocks, by torch's own multi-head attention on the undivided matrix."""
    n = x.shape[1]
    mask = torch.full((n, n), -math.inf).triu(1) if causal else None
    for i in range(2):
        b = {k.removeprefix(f"{tower}transformer.resblocks.{i}."): v for k, v in t.items()}
        h = F.layer_norm(x, x.shape[-1:], b["ln_1.weight"], b["ln_1.bias"]).transpose(0, 1)
        attended, _ = F.multi_head_attention_forward(
            h, h, h, x.shape[-1], 2, b["attn.in_proj_weight"], b["attn.in_proj_bias"], None, None, False, 0.0,
            b["attn.out_proj.weight"], b["attn.out_proj.bias"], training=False, attn_mask=mask,
        )  # fmt: skip
        x = x + attended.transpose(0, 1)
        h = F.layer_norm(x, x.shape[-1:], b["ln_2.weight"], b["ln_2.bias"])
        h = F.gelu(F.linear(h, b["mlp.c_fc.weight"], b["mlp.c_fc.bias"]))
        x = x + F.linear(h, b["mlp.c_proj.weight"], b["mlp.c_proj.bias"])
    return x


def direct_hpsv2(t: dict[str, Tensor]) -> Tensor:
    words, ids = clip_tokenizer(), torch.zeros(len(PROMPTS), 77, dtype=torch.long)  # OpenCLIP pads with zeros
    for row, prompt in zip(ids, PROMPTS, strict=True):
        tokens = words(prompt).input_ids
        tokens = tokens if len(tokens) <= 77 else [*tokens[:76], tokens[-1]]
        row[: len(tokens)] = torch.tensor(tokens)
    x = open_clip_tower(t, "", t["token_embedding.weight"][ids] + t["positional_embedding"], causal=True)
    x = F.layer_norm(x, x.shape[-1:], t["ln_final.weight"], t["ln_final.bias"])
    text = x[torch.arange(len(PROMPTS)), ids.argmax(-1)] @ t["text_projection"]

    patches = F.conv2d(padded(IMAGES), t["visual.conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    first = t["visual.class_embedding"].expand(len(patches), 1, -1)
    x = torch.cat([first, patches], dim=1) + t["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], t["visual.ln_pre.weight"], t["visual.ln_pre.bias"])
    x = open_clip_tower(t, "visual.", x, causal=False)[:, 0]
    image = F.layer_norm(x, x.shape[-1:], t["visual.ln_post.weight"], t["visual.ln_post.bias"]) @ t["visual.proj"]
    return F.cosine_similarity(image, text)


def padded(images: Tensor) -> Tensor:
    """40 x 56 to 23 x 32 (40 * 32 / 56 = 22.9), 4 black rows above and 5 below."""
    canvas = np.zeros((len(images), SIZE, SIZE, 3), dtype=np.float32)
    for row, image in zip(canvas, images, strict=True):
        row[4:27] = np.asarray(
            Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32, 23), Image.Resampling.BICUBIC)
        )
    return torch.from_numpy((canvas / 255 - np.float32(MEAN)) / np.float32(STD)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("wrapper", ["", "model."], ids=["published", "wrapped"])
def test_hpsv2_is_the_cosine_of_the_open_clip_network(
    clip: tuple[CLIPModel, Path], tmp_path: Path, wrapper: str
) -> None:
    tensors = open_clip_tensors(24, 32, len(clip_tokenizer()))
    save_file({wrapper + name: t for name, t in tensors.items()}, tmp_path / "hps.safetensors")
    assert_scores(get(f"hpsv2:{tmp_path / 'hps.safetensors'},base={clip[1]}"), direct_hpsv2(tensors))


def test_hpsv2_reads_the_layout_of_transformers_too(clip: tuple[CLIPModel, Path]) -> None:
    network, directory = clip
    expected = direct_logits(network, PROMPTS, pixels=padded(IMAGES)) / network.logit_scale.exp().detach()
    assert_scores(get(f"hpsv2:{directory}"), expected)


def test_hpsv2_says_which_tensor_is_missing(clip: tuple[CLIPModel, Path], tmp_path: Path) -> None:
    tensors = open_clip_tensors(24, 32, len(clip_tokenizer()))
    del tensors["visual.ln_post.bias"]
    save_file(tensors, tmp_path / "hps.safetensors")
    reward = get(f"hpsv2:{tmp_path / 'hps.safetensors'},base={clip[1]}")
    with pytest.raises(EtudeError, match=r"lacks 1 tensors \('vision_model.post_layernorm.bias'\)"):
        reward(IMAGES, PROMPTS)


# ---- ImageReward


def blip_tensors(words: int, width: int = 128, vision_width: int = 192, prefix: str = "blip.") -> dict[str, Tensor]:
    """A random ImageReward under its published names: two blocks of each encoder, the unused projections, a head."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return 0.15 * torch.randn(shape, generator=generator)

    linear: dict[str, tuple[int, int]] = {"vision_proj": (16, vision_width), "text_proj": (16, width)}
    norms = {"visual_encoder.norm": vision_width, "text_encoder.embeddings.LayerNorm": width}
    for i in range(2):
        block, d = f"visual_encoder.blocks.{i}", vision_width
        linear |= {f"{block}.attn.qkv": (3 * d, d), f"{block}.attn.proj": (d, d)}
        linear |= {f"{block}.mlp.fc1": (4 * d, d), f"{block}.mlp.fc2": (d, 4 * d)}
        norms |= {f"{block}.norm1": d, f"{block}.norm2": d}
        layer, d = f"text_encoder.encoder.layer.{i}", width
        for attention, source in {"attention": width, "crossattention": vision_width}.items():
            linear |= {f"{layer}.{attention}.self.{part}": (d, source) for part in ("key", "value")}
            linear |= {f"{layer}.{attention}.self.query": (d, d), f"{layer}.{attention}.output.dense": (d, d)}
            norms[f"{layer}.{attention}.output.LayerNorm"] = d
        linear |= {f"{layer}.intermediate.dense": (4 * d, d), f"{layer}.output.dense": (d, 4 * d)}
        norms[f"{layer}.output.LayerNorm"] = d
    tensors = {
        "visual_encoder.cls_token": draw(1, 1, vision_width),
        "visual_encoder.pos_embed": draw(1, 5, vision_width),
        "visual_encoder.patch_embed.proj.weight": draw(vision_width, 3, 16, 16),
        "visual_encoder.patch_embed.proj.bias": draw(vision_width),
        "text_encoder.embeddings.position_ids": torch.arange(64)[None],
        "text_encoder.embeddings.word_embeddings.weight": draw(words, width),
        "text_encoder.embeddings.position_embeddings.weight": draw(64, width),
    }
    for name, shape in linear.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = draw(*shape), draw(shape[0])
    for name, d in norms.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + draw(d), draw(d)
    return {f"{prefix}{name}": t for name, t in tensors.items()} | head_tensors(width, "mlp.")


def attend(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None = None) -> Tensor:
    """Softmax attention with heads of 64; `keep` [n, keys] says which keys count."""
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (query, key, value))
    logits = q @ k.transpose(-1, -2) / 8
    if keep is not None:
        logits = logits.masked_fill(~keep[:, None, None, :], -math.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def direct_imagereward(t: dict[str, Tensor], ids: Tensor, keep: Tensor, pixels: Tensor) -> Tensor:
    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, t[f"blip.{name}.weight"], t[f"blip.{name}.bias"])

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], t[f"blip.{name}.weight"], t[f"blip.{name}.bias"], eps)

    proj = "blip.visual_encoder.patch_embed.proj"
    patches = F.conv2d(pixels, t[f"{proj}.weight"], t[f"{proj}.bias"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([t["blip.visual_encoder.cls_token"].expand(len(patches), -1, -1), patches], dim=1)
    x = x + t["blip.visual_encoder.pos_embed"]
    for i in range(2):
        block = f"visual_encoder.blocks.{i}"
        q, k, v = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, dim=-1)
        x = x + linear(attend(q, k, v), f"{block}.attn.proj")
        h = F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        x = x + linear(h, f"{block}.mlp.fc2")
    image = norm(x, "visual_encoder.norm", 1e-6)

    table = "blip.text_encoder.embeddings"
    h = t[f"{table}.word_embeddings.weight"][ids] + t[f"{table}.position_embeddings.weight"][: ids.shape[1]]
    h = norm(h, "text_encoder.embeddings.LayerNorm", 1e-12)
    for i in range(2):
        layer = f"text_encoder.encoder.layer.{i}"
        for attention, source, mask in (("attention", None, keep), ("crossattention", image, None)):
            name, keys = f"{layer}.{attention}", h if source is None else source
            q, k, v = (
                linear(h, f"{name}.self.query"),
                linear(keys, f"{name}.self.key"),
                linear(keys, f"{name}.self.value"),
            )
            h = norm(linear(attend(q, k, v, mask), f"{name}.output.dense") + h, f"{name}.output.LayerNorm", 1e-12)
        wide = F.gelu(linear(h, f"{layer}.intermediate.dense"))
        h = norm(linear(wide, f"{layer}.output.dense") + h, f"{layer}.output.LayerNorm", 1e-12)
    raw = direct_head(h[:, 0], t, "mlp.")
    return (raw - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert")
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    BertTokenizer(vocab={t: i for i, t in enumerate(tokens)}).save_pretrained(directory)
    return directory


def cropped(images: Tensor) -> Tensor:
    """40 x 56 to 32 x 44 (56 * 32 / 40 = 44.8), columns 6 to 37."""
    rows = [
        np.asarray(Image.fromarray(i.permute(1, 2, 0).numpy()).resize((44, 32), Image.Resampling.BICUBIC))[:, 6:38]
        for i in images
    ]
    unit = torch.from_numpy(np.stack(rows)).float() / 255
    return ((unit - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def test_imagereward_is_the_standardised_head_on_the_first_token_of_blip(bert: Path, tmp_path: Path) -> None:
    words = BertTokenizer.from_pretrained(bert)
    tensors = blip_tensors(len(words) + 2)  # [DEC] and [ENC]
    save_file(tensors, tmp_path / "ImageReward.safetensors")
    ids = torch.zeros(len(PROMPTS), 35, dtype=torch.long)
    for row, prompt in zip(ids, PROMPTS, strict=True):
        found = words(prompt).input_ids
        found = found if len(found) <= 35 else [*found[:34], found[-1]]
        row[: len(found)] = torch.tensor(found)
    expected = direct_imagereward(tensors, ids, ids != 0, cropped(IMAGES))
    assert_scores(get(f"imagereward:{tmp_path / 'ImageReward.safetensors'},base={bert}"), expected)


def test_imagereward_refuses_another_network_and_another_vocabulary(bert: Path, tmp_path: Path) -> None:
    save_file(head_tensors(128), tmp_path / "head.safetensors")
    with pytest.raises(EtudeError, match="does not hold ImageReward"):
        get(f"imagereward:{tmp_path / 'head.safetensors'},base={bert}")(IMAGES, PROMPTS)
    save_file(blip_tensors(20), tmp_path / "small.safetensors")
    with pytest.raises(EtudeError, match=r"tokens and '.*small.safetensors' 20: name the tokenizer"):
        get(f"imagereward:{tmp_path / 'small.safetensors'},base={bert}")(IMAGES, PROMPTS)
    incomplete = blip_tensors(200)
    del incomplete["blip.text_encoder.encoder.layer.1.crossattention.self.query.bias"]
    save_file(incomplete, tmp_path / "incomplete.safetensors")
    with pytest.raises(EtudeError, match="is not a whole BlipTextModel"):
        get(f"imagereward:{tmp_path / 'incomplete.safetensors'},base={bert}")(IMAGES, PROMPTS)


# ---- what they share


@pytest.mark.parametrize("shape", [(40, 56), (56, 40), (48, 48), (33, 47), (20, 24)])
def test_fitting_a_picture_follows_the_rounding_of_torchvision(shape: tuple[int, int]) -> None:
    height, width = shape
    image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy())

    short = min(shape)
    size = (int(SIZE * width / short), int(SIZE * height / short))
    left, top = (round((side - SIZE) / 2.0) for side in size)
    crop = picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + SIZE, top + SIZE))
    assert torch.equal(crop_to_square(image, SIZE), normal(np.asarray(crop)))

    scale = SIZE / float(max(shape))
    inner = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    array = np.asarray(inner)
    above, before = (SIZE - array.shape[0]) // 2, (SIZE - array.shape[1]) // 2
    canvas = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    canvas[above : above + array.shape[0], before : before + array.shape[1]] = array
    assert torch.equal(pad_to_square(image, SIZE), normal(canvas))


def normal(array: np.ndarray) -> Tensor:
    unit = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255
    return (unit - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_a_square_picture_is_what_the_clip_image_processor_gives() -> None:
    square = IMAGES[..., :40]
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in square]
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    expected = processor(images=pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(crop_to_square(square, SIZE), expected)
    torch.testing.assert_close(pad_to_square(square, SIZE), expected)


def test_a_score_depends_neither_on_the_batch_size_nor_on_the_company(clip: tuple[CLIPModel, Path]) -> None:
    whole = get(f"pickscore:{clip[1]}")(IMAGES, PROMPTS)
    torch.testing.assert_close(get(f"pickscore:{clip[1]},batch_size=2")(IMAGES, PROMPTS), whole, rtol=1e-5, atol=1e-5)
    alone = get(f"pickscore:{clip[1]}")(IMAGES[2:3], PROMPTS[2:3])
    torch.testing.assert_close(alone, whole[2:3], rtol=1e-5, atol=1e-5)
    assert get(f"pickscore:{clip[1]}")(IMAGES[:0], []).shape == (0,)


def test_a_batch_that_does_not_fit_is_halved_and_scores_the_same(
    clip: tuple[CLIPModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward: Any = PickScore(str(clip[1]), batch_size=4)
    compute, seen = reward._score, []

    def small(images: Tensor, prompts: list[str], device: torch.device) -> Tensor:
        seen.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(images, prompts, device)

    monkeypatch.setattr(reward, "_score", small)
    with pytest.warns(UserWarning, match="batch_size of the reward PickScore = 4 does not fit"):
        scores = reward(IMAGES, PROMPTS)
    assert (seen, reward.batch_size) == ([4, 2, 2, 1], 2)
    torch.testing.assert_close(scores, get(f"pickscore:{clip[1]}")(IMAGES, PROMPTS), rtol=1e-5, atol=1e-5)


def test_offloading_moves_a_reward_off_the_device_after_each_use(clip: tuple[CLIPModel, Path]) -> None:
    name, moved = f"pickscore:{clip[1]},batch_size=5", []
    reward: Any = get(name)
    reward.load()
    reward.network.to = lambda device: moved.append(torch.device(device).type)
    reward.device = torch.device("cuda")  # never reached: the network is not moved in earnest
    reward._score = lambda images, prompts, device: torch.zeros(len(images))
    WeightedRewards({name: 1.0}, offload=True)(IMAGES, PROMPTS)
    WeightedRewards({name: 1.0}, offload=True).start(IMAGES, PROMPTS).result()
    assert moved == ["cuda", "cpu", "cuda", "cpu"]
    WeightedRewards({name: 1.0})(IMAGES, PROMPTS)
    assert moved[4:] == ["cuda"]


def test_weights_are_read_at_first_use_frozen_and_in_evaluation_mode(clip: tuple[CLIPModel, Path]) -> None:
    reward: Any = get(f"pickscore:{clip[1]}")
    assert reward.network is None
    scores = score_one("pickscore", reward, IMAGES, PROMPTS)
    assert not scores.requires_grad
    assert not reward.network.training
    assert not any(p.requires_grad for p in reward.network.parameters())
    network = reward.network
    reward.load()
    assert reward.network is network, "they are read once"
    assert get(f"pickscore:{clip[1]}") is reward


def test_the_dtype_is_that_of_the_network_and_scores_stay_float32(clip: tuple[CLIPModel, Path]) -> None:
    reward: Any = get(f"clip_score:{clip[1]},dtype=bfloat16,device=cpu")
    scores = reward(IMAGES, PROMPTS)
    assert reward.network.dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, get(f"clip_score:{clip[1]}")(IMAGES, PROMPTS), rtol=0.2, atol=0.1)


def test_options_in_a_name_pass_through_a_weighted_sum(clip: tuple[CLIPModel, Path]) -> None:
    name = f"pickscore:{clip[1]},batch_size=3"
    rewards = WeightedRewards({name: 1.0}, held_out=[f"clip_score:{clip[1]}"])
    assert set(rewards.evaluate(IMAGES, PROMPTS)) == {name, f"clip_score:{clip[1]}"}


def test_every_model_reward_is_registered_and_costs_nothing_to_name() -> None:
    assert set(NAMES) <= set(names())
    for name in NAMES:
        reward: Any = get(name)
        assert reward.network is None
        assert reward.model == type(reward).MODEL
        assert reward.base == type(reward).BASE


def test_a_reward_of_ones_own_may_take_the_name_of_a_built_in() -> None:
    @register("pickscore")
    def mine(images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
        return torch.zeros(len(prompts))

    assert get("pickscore") is mine
    with pytest.raises(EtudeError, match="cannot be imported"):
        get("pickscore:somewhere")


def test_a_hub_id_is_fetched_at_its_revision_without_any_pickle(
    clip: tuple[CLIPModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        assert not any(Path(f"weights{end}").match(p) for p in allow_patterns for end in (".bin", ".pt", ".pth"))
        assert not any(Path("code.py").match(p) for p in allow_patterns)
        return str(clip[1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert_scores(get("pickscore"), direct_logits(clip[0], PROMPTS))
    get("clip_score:someone/clip@refs/pr/4")(IMAGES, PROMPTS)
    assert asked[0] == ("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800")
    assert {a[0] for a in asked[:3]} == {"yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
    assert set(asked[3:]) == {("someone/clip", "refs/pr/4")}


def test_the_commit_that_was_read_is_told_even_where_none_was_asked_for(
    clip: tuple[CLIPModel, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"  # the hub's cache keeps a commit in a directory of its name
    (tmp_path / commit).symlink_to(clip[1], target_is_directory=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *names, **how: str(tmp_path / commit))
    hub, local = "pickscore:someone/unpinned", f"pickscore:{clip[1]}"
    assert revisions([hub, local, "colorfulness"]) == {}
    for name in (hub, local):
        get(name)(IMAGES, PROMPTS)
    base = PickScore.BASE
    assert revisions([hub, local, "colorfulness"]) == {hub: {"someone/unpinned": commit, base: commit}}


def test_published_defaults_are_pinned_except_the_copies_of_which_no_commit_is_known() -> None:
    for name in NAMES:
        reward: Any = get(name)
        for source in (reward.model, reward.base):
            assert source.startswith("RE-N-Y/") or re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", source), source


# ---- errors


@pytest.mark.parametrize("name", NAMES)
def test_a_hub_out_of_reach_is_one_error_with_the_id_and_the_remedy(name: str) -> None:
    with pytest.raises(EtudeError, match=r"is not on disk and the hub does not give it .*`hf download \S+/[^`]+`"):
        get(name)(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("/nowhere/at/all", r"'/nowhere/at/all' is not on disk"),
        ("weights.pth", r"'weights.pth' is a pickle, which etude never reads: .*weights_only=True"),
        ("a/b/c/d", r"'a/b/c/d' is not on disk"),
        ("/nowhere/epoch=3/model", r"'/nowhere/epoch=3/model' is not on disk"),
        ("batchsize=3", r"unknown option .* 'batchsize'"),
        ("dtype=float32,batchsize=3", r"unknown option .* 'batchsize': did you mean 'batch_size'"),
        ("batch_size=many", r"batch_size = 'many' .* whole number"),
        ("batch_size=0", r"batch_size = 0"),
        ("dtype=float8", r"unknown dtype of a reward 'float8'"),
        ("device=toaster", r"device = 'toaster'"),
    ],
)
def test_a_wrong_option_is_an_error_before_anything_is_loaded(options: str, message: str) -> None:
    with pytest.raises(EtudeError, match=message):
        get(f"pickscore:{options}")


def test_a_directory_with_pickles_only_is_refused_with_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not opened")
    for name in NAMES:
        with pytest.raises(EtudeError, match=r"pytorch_model.bin' is a pickle.*save_file"):
            get(f"{name}:{tmp_path},base={tmp_path}").load()


def test_a_file_that_is_no_safetensors_and_a_directory_with_several_are_said_so(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"garbage")
    with pytest.raises(EtudeError, match="holds 2 safetensors files"):
        get(f"hpsv2:{tmp_path},base={tmp_path}").load()
    (tmp_path / "config.json").write_text(json.dumps(clip_config().to_dict()))
    with pytest.raises(EtudeError, match="is not a readable safetensors file"):
        get(f"hpsv2:{tmp_path / 'a.safetensors'},base={tmp_path}").load()


def test_a_checkpoint_without_weights_or_without_a_tokenizer_says_where_they_may_be(
    clip: tuple[CLIPModel, Path], tmp_path: Path
) -> None:
    with pytest.raises(EtudeError, match=r"holds no safetensors: .*refs/pr"):
        get(f"clip_score:{tmp_path}").load()
    clip[0].save_pretrained(tmp_path)
    with pytest.raises(EtudeError, match=r"holds no (tokenizer|image processor) .*option `base`"):
        get(f"clip_score:{tmp_path}").load()
