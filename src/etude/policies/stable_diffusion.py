"""Stable Diffusion 1.x and 2.x (any StableDiffusionPipeline, also `emoji-sd`) as a policy."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from etude.policies.pipeline import Agreement, PipelinePolicy
from etude.sampling.paths import VPPath


class StableDiffusionPolicy(PipelinePolicy):
    """A StableDiffusionPipeline as a policy.

    `guidance_scale` is w of classifier-free guidance, or where the UNet embeds it
    (`time_cond_proj_dim`, as latent consistency models do) its input, as in the plain pipeline.
    Latents are the autoencoder's, `[c, h, w]`.
    """

    path_class = VPPath
    denoiser = "unet"
    load_arguments: ClassVar[dict[str, Any]] = {
        **PipelinePolicy.load_arguments,
        "safety_checker": None,
        "requires_safety_checker": False,
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.classifier_free = self._guidance_width is None

    @property
    def _guidance_width(self) -> int | None:
        """Width of the UNet's guidance embedding; None for a UNet without one."""
        width: int | None = self.pipeline.unet.config.get("time_cond_proj_dim")
        return width

    def agreements(self) -> list[Agreement]:
        unet, encoder = self.pipeline.unet.config, self.pipeline.text_encoder.config
        width, states = unet.get("cross_attention_dim"), getattr(encoder, "hidden_size", None)
        direct = (
            isinstance(width, int) and unet.get("encoder_hid_dim") is None and encoder.model_type == "clip_text_model"
        )
        text = (("unet.cross_attention_dim", width), ("text_encoder.hidden_size", states if direct else None))
        return [*self._channels(), text]

    def _guidance(self, x: Tensor, guidance_scale: float) -> Tensor | None:
        """The UNet's `timestep_cond`: the embedded scale, where it has such an input."""
        if self._guidance_width is None:
            return None
        scales = torch.tensor(guidance_scale - 1).repeat(len(x))
        return self.pipeline.get_guidance_scale_embedding(scales, embedding_dim=self._guidance_width).to(x)

    @property
    def _side_multiple(self) -> int:
        return math.lcm(8, int(self.pipeline.vae_scale_factor))  # the pipeline requires 8 with any autoencoder

    def _unscaled(self, latents: Tensor) -> Tensor:
        """`latents / scaling_factor`: the plain pipeline reads no `shift_factor`."""
        return latents / self.pipeline.vae.config.scaling_factor

    def _scaled(self, latents: Tensor) -> Tensor:
        return latents * self.pipeline.vae.config.scaling_factor

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        embedding, _ = self.pipeline.encode_prompt([prompt], self.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embedding}

    def _forward(self, x: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], guidance_scale: float) -> Tensor:
        guidance = self._guidance(x, guidance_scale)
        return self.network(x, timesteps, timestep_cond=guidance, return_dict=False, **conditioning)[0]
