"""A pipeline family: AuraFlow, a rectified-flow transformer with one text encoder."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from etude.policies.pipeline import PipelinePolicy
from etude.sampling.paths import FlowPath


class AuraFlowPolicy(PipelinePolicy):
    """An AuraFlowPipeline as a policy.

    `guidance_scale` is the weight w of classifier-free guidance (arXiv 2207.12598); w <= 1 means no
    guidance. Latents are the autoencoder's, `[c, h, w]`.
    """

    path_class = FlowPath
    denoiser = "transformer"
    load_arguments: ClassVar[dict[str, Any]] = {}

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        embedding = self.pipeline.encode_prompt([prompt], None, False, device=self.device)[0]
        return {"encoder_hidden_states": embedding}

    def _forward(self, x: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], guidance_scale: float) -> Tensor:
        output: Tensor = self.network(x, timestep=timesteps.to(x.dtype) / 1000, return_dict=False, **conditioning)[0]
        return output
