"""A pipeline family: PixArt-Sigma (arXiv 2403.04692), a transformer with a T5 encoder that predicts noise."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from etude.policies.pipeline import PipelinePolicy
from etude.sampling.paths import VPPath


class PixArtSigmaPolicy(PipelinePolicy):
    """A PixArtSigmaPipeline as a policy.

    `guidance_scale` is w of classifier-free guidance (arXiv 2207.12598). Latents are the autoencoder's, `[c, h, w]`.
    """

    path_class = VPPath
    denoiser = "transformer"
    load_arguments: ClassVar[dict[str, Any]] = {}

    def call_arguments(self, guidance_scale: float) -> dict[str, Any]:
        """The plain pipeline would otherwise draw at the nearest of its training resolutions."""
        return {**super().call_arguments(guidance_scale), "use_resolution_binning": False}

    def _default_size(self) -> tuple[int, int]:
        side = self.pipeline.transformer.config.sample_size
        return (side, side)

    def _shape(self) -> tuple[int, ...]:
        return (self.pipeline.transformer.config.in_channels, *self.latent_size)

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        embedding, mask, _, _ = self.pipeline.encode_prompt([prompt], False, device=self.device)
        return {"encoder_hidden_states": embedding, "encoder_attention_mask": mask}

    def _forward(self, x: Tensor, timesteps: Tensor, told: dict[str, Tensor], guidance_scale: float) -> Tensor:
        added = {"resolution": None, "aspect_ratio": None}
        output: Tensor = self.network(x, timestep=timesteps, added_cond_kwargs=added, return_dict=False, **told)[0]
        return output.chunk(2, dim=1)[0]  # the other half is a learned variance, which no kernel here uses
