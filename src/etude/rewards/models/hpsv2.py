"""HPS v2.1: a CLIP-ViT-H-14 tuned on human preferences, from either of two layouts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from etude.errors import EtudeError
from etude.rewards.models.clip import VIT_H, Cosine, companion
from etude.rewards.models.preprocessing import pad_to_square
from etude.rewards.models.weights import TEXT_FILES, assemble, fetch, read_tensors, strip_prefix, weights_of


class HPSv2(Cosine):
    """HPS v2.1 = cos(f(image), g(prompt)), Wu et al. 2023, arXiv 2306.09341.

    The network is LAION's CLIP-ViT-H-14, tuned (licence of the authors' repository and weights:
    Apache-2.0). Its architecture and tokenizer come from `base`:
    `laion/CLIP-ViT-H-14-laion2B-s32B-b79K` (MIT). As published, there is no logit scale, and a
    picture that is not square is resized to fit and padded with black, not cropped. Range [-1, 1],
    in practice about 0.2 to 0.35; papers often print the score times 100.

    The default `model` is a copy of the pickle HPS_v2.1_compressed.pt of `xswu/HPSv2`: see
    `ModelReward`. Two layouts are read: OpenCLIP's names, with any prefix, and those of
    `transformers.CLIPModel`. OpenCLIP itself is not needed.
    """

    MODEL = "RE-N-Y/hpsv21"
    BASE = VIT_H
    BASE_FILES = ("config.json", "tokenizer_config.json")

    def _load(self) -> nn.Module:
        from transformers import CLIPConfig, CLIPModel

        weights = weights_of(fetch(self.model, ["*.safetensors"]))
        config = CLIPConfig.from_pretrained(str(fetch(self.base, TEXT_FILES)), local_files_only=True)
        tensors = read_tensors(weights)
        names = strip_prefix(tensors, "vision_model.embeddings.class_embedding") or from_open_clip(tensors)
        if not names:
            raise EtudeError(f"'{weights}' holds no CLIP in the layout of OpenCLIP or of transformers.")
        self.tokenizer = companion("tokenizer", self.base)
        network: nn.Module = assemble(CLIPModel, weights, config=config, state_dict=names)
        return network

    def _pixels(self, images: Tensor) -> Tensor:
        return pad_to_square(images, self.network.config.vision_config.image_size)

    def _scale(self, cosine: Tensor) -> Tensor:
        return cosine


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of OpenCLIP's CLIP under the names of `transformers.CLIPModel`, or an empty one.

    OpenCLIP keeps query, key and value in one matrix, and its two projections act from the right.
    """
    source = strip_prefix(tensors, "visual.class_embedding")
    return {name: t for key, tensor in source.items() for name, t in _rename(key, tensor)}


_WHOLE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
}
_PROJECTIONS = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
_IN_BLOCK = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
_BLOCK = re.compile(r"(?P<tower>visual\.)?transformer\.resblocks\.(?P<i>\d+)\.(?P<part>.+?)[._](?P<kind>weight|bias)")


def _rename(key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    stem, _, kind = key.rpartition(".")
    block = _BLOCK.fullmatch(key)
    if key in _WHOLE:
        # Some versions store logit_scale in shape [1].
        yield _WHOLE[key], tensor.reshape(()) if key == "logit_scale" else tensor
    elif key in _PROJECTIONS:
        yield _PROJECTIONS[key], tensor.T.contiguous()
    elif stem in _NORMS:
        yield f"{_NORMS[stem]}.{kind}", tensor
    elif block:
        layer = f"{'vision' if block['tower'] else 'text'}_model.encoder.layers.{block['i']}"
        if block["part"] == "attn.in_proj":
            for name, rows in zip("qkv", torch.chunk(tensor, 3), strict=True):
                yield f"{layer}.self_attn.{name}_proj.{block['kind']}", rows.clone()
        elif block["part"] in _IN_BLOCK:
            yield f"{layer}.{_IN_BLOCK[block['part']]}.{block['kind']}", tensor
