"""ImageReward: BLIP's image-grounded text encoder with a score head, tuned on human rankings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etude.errors import EtudeError
from etude.rewards.models.aesthetic import ScoreHead
from etude.rewards.models.clip import companion, tokenize
from etude.rewards.models.model_reward import ModelReward
from etude.rewards.models.preprocessing import crop_to_square
from etude.rewards.models.weights import assemble, fetch, read_tensors, strip_prefix, weights_of

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # the raw score's, over the authors' test set
TOKENS = 35
HEAD_WIDTH = 64  # width of every attention head in BLIP; its tensors do not show it


class ImageReward(ModelReward):
    """ImageReward v1.0, Xu et al. 2023, arXiv 2304.05977.

        score = (MLP(h) - 0.1671736...) / 1.0333395...

    h is the first output token of BLIP's text encoder, MLP is `ScoreHead`. The text encoder (BERT
    base) attends to all tokens of the image encoder (ViT-L/16 at 224 pixels). As published, prompts
    are cut or padded to 35 tokens, and images are cropped to the centre. The score is standardised
    and unbounded: in practice about -2.3 to 2. Licence of the authors' code and weights: Apache-2.0
    (BLIP: BSD-3-Clause). The head is computed in float32.

    The default `model` is a copy of the pickle ImageReward.pt of `THUDM/ImageReward`, under the
    published names: see `ModelReward`. The network runs in the BLIP classes of transformers. The
    tokenizer comes from `base`: `google-bert/bert-base-uncased` (Apache-2.0).
    """

    MODEL = "RE-N-Y/ImageReward"
    BASE = "google-bert/bert-base-uncased@86b5e0934494bd15c9632b12f734a8a67f723594"
    BASE_FILES = ("tokenizer_config.json",)

    def _load(self) -> nn.Module:
        weights = weights_of(fetch(self.model, ["*.safetensors"]))
        self.tokenizer = companion("tokenizer", self.base)
        self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's, in its order
        tensors = read_tensors(weights)
        vision, text = vision_encoder(tensors, weights), text_encoder(tensors, weights)
        if len(self.tokenizer) > (size := text.config.vocab_size):
            problem = f"'{self.base}' has {len(self.tokenizer)} tokens and '{weights}' {size}"
            raise EtudeError(f"{problem}: name the tokenizer that it was trained with by the option `base`.")
        self.head = ScoreHead.of(text.config.hidden_size, strip_prefix(tensors, "mlp.layers.7.weight"), weights)
        return nn.ModuleDict({"vision": vision, "text": text})

    def _score(self, images: Tensor, prompts: list[str], device: torch.device) -> Tensor:
        vision, text = self.network["vision"], self.network["text"]
        pixels = crop_to_square(images, vision.config.image_size).to(device, self.dtype)
        tokens = tokenize(self.tokenizer, prompts, TOKENS, device)
        seen = vision(pixel_values=pixels).last_hidden_state
        states = text(**tokens, encoder_hidden_states=seen).last_hidden_state
        return (self.head.to(device)(states[:, 0].float()) - MEAN) / STD


_VISION_NAMES = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.(\d+)\.norm(\d)\.": r"encoder.layers.\1.layer_norm\2.",
    r"^blocks\.(\d+)\.attn\.qkv\.": r"encoder.layers.\1.self_attn.qkv.",
    r"^blocks\.(\d+)\.attn\.proj\.": r"encoder.layers.\1.self_attn.projection.",
    r"^blocks\.(\d+)\.mlp\.": r"encoder.layers.\1.mlp.",
}


def vision_encoder(tensors: Mapping[str, Tensor], origin: Path) -> Any:
    """`transformers.BlipVisionModel` from the published names; its sizes are read off the tensors."""
    from transformers import BlipVisionConfig, BlipVisionModel

    source = _part(tensors, "visual_encoder.", "patch_embed.proj.weight", origin)
    width, _, patch, _ = source["patch_embed.proj.weight"].shape
    positions = source["pos_embed"].shape[1] if "pos_embed" in source else 1
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=_depth(source, "blocks"),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=patch * math.isqrt(positions - 1),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    state = {}
    for name, tensor in source.items():
        for pattern, replacement in _VISION_NAMES.items():
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    return assemble(BlipVisionModel, origin, config=config, state_dict=state)


def text_encoder(tensors: Mapping[str, Tensor], origin: Path) -> Any:
    """`transformers.BlipTextModel` from the published names; its sizes are read off the tensors."""
    from transformers import BlipTextConfig, BlipTextModel

    source = _part(tensors, "text_encoder.", "encoder.layer.0.crossattention.self.key.weight", origin)
    width, image_width = source["encoder.layer.0.crossattention.self.key.weight"].shape
    words, places = (source.get(f"embeddings.{kind}_embeddings.weight") for kind in ("word", "position"))
    config = BlipTextConfig(
        vocab_size=0 if words is None else len(words),
        hidden_size=width,
        encoder_hidden_size=image_width,
        intermediate_size=4 * width,
        num_hidden_layers=_depth(source, r"encoder\.layer"),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=0 if places is None else len(places),
        layer_norm_eps=1e-12,
        is_decoder=True,  # for the cross-attention; the forward pass attends both ways all the same
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )
    # BLIP's attention adds the mask to its scores: it must be the additive one of "eager".
    how = {"config": config, "state_dict": source, "add_pooling_layer": False, "attn_implementation": "eager"}
    return assemble(BlipTextModel, origin, **how)


def _part(tensors: Mapping[str, Tensor], part: str, landmark: str, origin: Path) -> dict[str, Tensor]:
    whole = strip_prefix(tensors, part + landmark)
    if not whole:
        raise EtudeError(f"'{origin}' does not hold ImageReward: there is no '{part}{landmark}' in it.")
    inside = {name.removeprefix(part): t for name, t in whole.items() if name.startswith(part)}
    unused = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    return {name: t for name, t in inside.items() if name not in unused}


def _depth(names: Mapping[str, Tensor], stem: str) -> int:
    return 1 + max(int(match[1]) for name in names if (match := re.match(rf"{stem}\.(\d+)\.", name)))
