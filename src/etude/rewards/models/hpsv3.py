"""HPSv3: a Qwen2-VL that reads a question about an image, with a head on the state of one token."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import resources

import torch
from PIL import Image
from torch import Tensor, nn

from etude.errors import EtudeError
from etude.rewards.models.clip import companion
from etude.rewards.models.model_reward import ModelReward
from etude.rewards.models.preprocessing import pictures
from etude.rewards.models.weights import TEXT_FILES, assemble, fetch, read_tensors, weights_of

QUESTION = "\n".join(json.loads(resources.files(__package__).joinpath("hpsv3_question.json").read_text("utf-8")))
"""The question that the model was trained on, with `{prompt}` in it and the token of the reward at its end."""
REWARD, PATCH = "<|Reward|>", "<|image_pad|>"
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
UNIT, UNITS = 28, 256
"""Pixels of a side of a merged patch, and the number of merged patches to which every image is resized."""
HEAD = "rm_head."
LAYERS = ("0", "3", "5")
"""Linear layers of the head: hidden size to 1024, 16 and 2, with ReLU between them."""


class HPSv3(ModelReward):
    """HPSv3 = mu, the first of the two outputs (mu and log sigma) of the head, Ma et al. 2025, arXiv 2508.03789.

        mu = head(h), h the last state of Qwen2-VL at the token <|Reward|> after image, prompt and question

    Model: `MizzenAI/HPSv3` (licence of the authors' code, question and weights: MIT), which holds the
    whole tuned network; no commit is known for certain. Its architecture, tokenizer and image processor
    come from `base`, `Qwen/Qwen2-VL-7B-Instruct` (Apache-2.0). None of the authors' code runs. As in that
    code every image is resized to about 448 x 448 pixels, positions are counted along one axis for
    text and image alike, and the head computes in float32. "<|" in a prompt, which begins a special
    token, is read as "< |". Unbounded; in practice about 0 to 15.

    The network takes 16 GB in bfloat16, twice that in main memory while it is read.
    """

    MODEL = "MizzenAI/HPSv3"
    BASE = "Qwen/Qwen2-VL-7B-Instruct@eed13092ef92e448dd6875b2a00151bd3f7db0ac"
    BASE_FILES = ("config.json", "preprocessor_config.json", "tokenizer_config.json")

    def __init__(
        self, model: str = "", *, base: str = "", batch_size: int = 4, dtype: str = "bfloat16", device: str = ""
    ) -> None:
        super().__init__(model, base=base, batch_size=batch_size, dtype=dtype, device=device)

    def _load(self) -> nn.Module:
        from tokenizers import AddedToken
        from transformers import Qwen2VLConfig, Qwen2VLImageProcessorPil, Qwen2VLModel

        path, base = weights_of(fetch(self.model, ["*.safetensors"])), str(fetch(self.base, TEXT_FILES))
        tensors = read_tensors(path)
        self.head = head_of(tensors, str(path))
        names = renamed(tensors)
        self.tokenizer = companion("tokenizer", self.base)
        self.tokenizer.add_tokens([AddedToken(REWARD, special=True)])
        self.reward_token = self.tokenizer.convert_tokens_to_ids(REWARD)
        rows = len(names.get("language_model.embed_tokens.weight", ()))
        if rows <= self.reward_token:
            raise EtudeError(
                f"'{path}' embeds {rows} tokens, and {REWARD} is number {self.reward_token} of the tokenizer in '{base}': they "
                "belong to different models; name the right one by the reward's option `base`."
            )
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(base, local_files_only=True)
        config = Qwen2VLConfig.from_pretrained(base, local_files_only=True)
        config.text_config.vocab_size = rows
        network: nn.Module = assemble(Qwen2VLModel, path, config=config, state_dict=names)
        return network

    def _score(self, images: Tensor, prompts: list[str], device: torch.device) -> Tensor:
        seen = self.processor(images=[resized(picture) for picture in pictures(images)], return_tensors="pt")
        grid = seen["image_grid_thw"]
        counts = (grid.prod(dim=1) // self.processor.merge_size**2).tolist()
        texts = [message(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
        tokens = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        ids = tokens["input_ids"].to(device)
        states = self.network(
            input_ids=ids,
            attention_mask=tokens["attention_mask"].to(device),
            position_ids=torch.arange(ids.shape[1], device=device).expand(3, *ids.shape),
            pixel_values=seen["pixel_values"].to(device, self.dtype),
            image_grid_thw=grid.to(device),
            use_cache=False,
        ).last_hidden_state
        at = (ids == self.reward_token).int().argmax(dim=1)
        return self.head.to(device)(states[torch.arange(len(ids), device=device), at].float())[:, 0]


def message(prompt: str, patches: int) -> str:
    """The text of the model's input, with a place for each merged patch of the image."""
    question = QUESTION.replace("{prompt}", prompt.replace("<|", "< |"))
    return f"{BEFORE}{PATCH * patches}<|vision_end|>{question}{AFTER}"


def resized(picture: Image.Image) -> Image.Image:
    """The picture at sides of whole merged patches, with about as many pixels as `UNITS` of them, by PIL's bicubic.

    Sides are first rounded to the nearest multiple; if the area is then not the wanted one, both are
    scaled by the root of the areas' ratio and rounded towards it, as in Qwen2-VL's published resize.
    """
    wanted, area = UNITS * UNIT**2, picture.width * picture.height
    sides = [max(UNIT, round(side / UNIT) * UNIT) for side in picture.size]
    if math.prod(sides) != wanted:
        scale, towards = math.sqrt(wanted / area), math.floor if math.prod(sides) > wanted else math.ceil
        sides = [max(UNIT, towards(side * scale / UNIT) * UNIT) for side in picture.size]
    return picture.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)


def head_of(tensors: dict[str, Tensor], place: str) -> nn.Sequential:
    """The head in float32, made of the tensors `rm_head.*`, which are taken out."""
    layers: list[nn.Module] = []
    for name in LAYERS:
        weight, bias = (tensors.pop(f"{HEAD}{name}.{part}", None) for part in ("weight", "bias"))
        if weight is None or bias is None:
            raise EtudeError(f"'{place}' is no HPSv3: it lacks {HEAD}{name}.weight or its bias.")
        linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float32)
        linear.load_state_dict({"weight": weight, "bias": bias})
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval().requires_grad_(False)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of today's `Qwen2VLModel`, from these names or from those before transformers 4.52.

    Before: `visual.*` and `model.layers.*`. Since: `model.visual.*` and `model.language_model.layers.*`.
    The output embedding is left out: the head takes its place.
    """
    found = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix("model.")
        if inner.startswith(("visual.", "language_model.")):
            found[inner] = tensor
        elif name.startswith("model."):
            found[f"language_model.{inner}"] = tensor
    return found
