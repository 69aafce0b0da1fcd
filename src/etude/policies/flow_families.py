"""Families of flow transformers: for each the few facts that its pipeline's own call cannot tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from etude.errors import EtudeError
from etude.policies.flow import FlowPolicy, Mixed
from etude.policies.pipeline import PipelinePolicy


class Flux2KleinPolicy(FlowPolicy):
    """FLUX.2-klein, base (classifier-free guidance) and distilled (no guidance)."""

    mixed: Mixed | None = "vector"
    patch = 4
    targets = (*FlowPolicy.targets, "to_qkv_mlp_proj")  # the single blocks' attention

    def _as_latents(self, stepped: Tensor) -> Tensor:
        """The scheduler steps tokens `[n, h w, c]`; the pipeline takes `[n, c, h, w]`."""
        height, width = (side // self._side_multiple for side in self.image_size)
        return stepped.transpose(1, 2).unflatten(2, (height, width))


class ZImagePolicy(FlowPolicy):
    """Z-Image and Z-Image-Turbo: guidance `cond + w (cond - uncond)`, on for every w above 0."""

    off = 0.0
    call: Mapping[str, Any] = {"cfg_truncation": None}  # 1, the default, is compared with a number alone
    mixed: Mixed | None = "vector"
    patch = 1


class QwenImagePolicy(FlowPolicy):
    """Qwen-Image: guidance rescaled to the norm of its conditional part, token by token."""

    mixed: Mixed | None = "vector"
    patch = 4

    def _guidance(self, scale: float, prompts: int | None = None) -> dict[str, Any]:
        """`true_cfg_scale`, which works beside a negative prompt only: a space, as published."""
        negative = {"negative_prompt": " " if prompts is None else [" "] * prompts}
        return {"true_cfg_scale": scale, **(negative if scale > self.off else {})}


class SanaPolicy(FlowPolicy):
    """SANA."""

    mixed: Mixed | None = "doubled"
    patch = 1


class Lumina2Policy(FlowPolicy):
    """Lumina-Image 2.0: guidance rescaled to the norm of its conditional part."""

    mixed: Mixed | None = "vector"
    patch = 1


class Krea2Policy(FlowPolicy):
    """Krea 2: guidance `cond + w (cond - uncond)`, on for every w above 0."""

    off = 0.0
    mixed: Mixed | None = "vector"
    patch = 4


class ChromaPolicy(FlowPolicy):
    """Chroma1: a FLUX without embedded guidance, and with a mask for T5's padding."""

    load_arguments = PipelinePolicy.load_arguments
    mixed: Mixed | None = "vector"
    patch = 4

    def enable_gradient_checkpointing(self) -> None:
        """Raises EtudeError: under it diffusers leaves the mask out of the single blocks (gradients differ by 14 %)."""
        raise EtudeError(
            "memory.gradient_checkpointing gives Chroma other gradients, since diffusers leaves the mask of the prompt out there: "
            "set it to false."
        )


class HiDreamImagePolicy(FlowPolicy):
    """HiDream-I1: four text encoders, a mixture of experts, and images of one area in every shape."""

    mixed: Mixed | None = "doubled"
    patch = 1
    targets = ("to_q", "to_k", "to_v", "to_out")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self._trained_network.modules():
            if type(module).__name__ == "MOEFeedForwardSwiGLU":
                module.training = True  # otherwise diffusers computes the experts without their gradient


class WanPolicy(FlowPolicy):
    """Wan 2.1, whose videos have one frame: images."""

    call: Mapping[str, Any] = {"num_frames": 1}
    mixed: Mixed | None = "vector"
    patch = 1
    picture = ".frames[0][0]"

    def __init__(self, pipeline: Any, *args: Any, **kwargs: Any) -> None:
        said = {name: pipeline.config.get(name) for name in ("boundary_ratio", "expand_timesteps")}
        for name, value in said.items():
            if value:
                raise EtudeError(
                    f"{name} = {value} makes the model a Wan 2.2, whose second transformer or timesteps of single tokens etude does "
                    "not train: give a Wan 2.1."
                )
        super().__init__(pipeline, *args, **kwargs)

    @property
    def _side_multiple(self) -> int:
        return self.scale_factor * int(self._trained_network.config.patch_size[1])


class LongCatImagePolicy(FlowPolicy):
    """LongCat-Image without its rewriting of prompts: guidance rescaled as Qwen-Image's. Its pipeline loads no LoRA."""

    load_arguments: ClassVar[dict[str, Any]] = {"text_processor": None}
    call: Mapping[str, Any] = {"enable_prompt_rewrite": False}
    mixed: Mixed | None = "vector"
    patch = 4

    def loading_arguments(self) -> dict[str, Any]:
        """The part that rewrites prompts is not in an export."""
        return dict(self.load_arguments)

    def _guidance(self, scale: float, prompts: int | None = None) -> dict[str, Any]:
        """With as many empty prompts as prompts, of which the pipeline makes one by itself."""
        negative = {"negative_prompt": "" if prompts is None else [""] * prompts}
        return {"guidance_scale": scale, **(negative if scale > self.off else {})}


class ErnieImagePolicy(FlowPolicy):
    """ERNIE-Image without its rewriting of prompts: the pipeline takes one timestep a call."""

    load_arguments: ClassVar[dict[str, Any]] = {"pe": None, "pe_tokenizer": None}
    call: Mapping[str, Any] = {"use_pe": False}
    mixed: Mixed | None = "one"
    patch = 4
