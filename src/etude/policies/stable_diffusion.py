"""Stable Diffusion 1.x and 2.x (any StableDiffusionPipeline, also `emoji-sd`) as a policy."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from etude.policies.pipeline import PipelinePolicy
from etude.sampling.paths import VPPath


class StableDiffusionPolicy(PipelinePolicy):
    """A StableDiffusionPipeline as a policy.

    `guidance_scale` is w of classifier-free guidance. Latents are the autoencoder's, `[c, h, w]`.
    """

    path_class = VPPath
    denoiser = "unet"
    load_arguments: ClassVar[dict[str, Any]] = {
        **PipelinePolicy.load_arguments,
        "safety_checker": None,
        "requires_safety_checker": False,
    }

    @property
    def _side_multiple(self) -> int:
        return math.lcm(8, int(self.pipeline.vae_scale_factor))  # the pipeline requires 8 with any autoencoder

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        embedding, _ = self.pipeline.encode_prompt([prompt], self.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embedding}

    def _forward(self, x: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], guidance_scale: float) -> Tensor:
        return self.network(x, timesteps, return_dict=False, **conditioning)[0]
