"""FLUX.1 (any FluxPipeline: dev, schnell, `emoji-flux`) as a policy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor

from etude.errors import EtudeError
from etude.policies.pipeline import Agreement, PipelinePolicy
from etude.sampling.paths import FlowPath, Grid


class FluxPolicy(PipelinePolicy):
    """A FluxPipeline as a policy.

    `guidance_scale` is an input of the transformer's guidance embedding and may have any value. The
    model was distilled to predict the guided velocity, so one evaluation suffices. A model without
    the embedding (schnell) has no guidance: `predict` refuses a scale above 1.

    Latents are packed, `[tokens, c]`: each token is a 2 x 2 patch of the autoencoder's latents. T5
    reads at most 512 tokens, or the limit of its tokenizer if that is lower. Without a resolution,
    images have the autoencoder's `sample_size` (1024 pixels in FLUX.1), or the pipeline's size
    where the autoencoder has none (AutoencoderTiny).
    """

    path: FlowPath
    path_class = FlowPath
    denoiser = "transformer"
    classifier_free = False
    t5 = ("tokenizer_2", 512)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        height, width = self.latent_size
        self._image_ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, self.device, self.dtype)
        self._text_ids = torch.zeros(self.max_sequence_length, 3, device=self.device, dtype=self.dtype)

    def pipeline_size(self) -> tuple[int, int]:
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return (side, side)

    def grid(self, num_steps: int) -> Grid:
        """N even sigmas from 1 to 1/N, then shifted; dynamic shifting takes mu from the token count."""
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps).tolist() if num_steps > 0 else None  # None: refused there
        return self.path.grid(num_steps, sigmas=sigmas, mu=self._mu(self.latent_shape[0], 1.15))

    @property
    def _side_multiple(self) -> int:
        return 2 * int(self.pipeline.vae_scale_factor)

    def _default_size(self) -> tuple[int, int]:
        return self._size_of(self.pipeline.vae.config.get("sample_size") or self.pipeline_size()[0])

    def agreements(self) -> list[Agreement]:
        parts, network = self.pipeline, self.pipeline.transformer.config
        pooled, states = parts.text_encoder.config.hidden_size, parts.text_encoder_2.config.d_model
        return [
            *self._channels(patch=4),
            (
                ("transformer.pooled_projection_dim", network.pooled_projection_dim),
                ("text_encoder.hidden_size", pooled),
            ),
            (("transformer.joint_attention_dim", network.joint_attention_dim), ("text_encoder_2.d_model", states)),
        ]

    def _shape(self) -> tuple[int, ...]:
        height, width = self.latent_size
        return ((height // 2) * (width // 2), self.pipeline.transformer.config.in_channels)

    def _unpack(self, latents: Tensor) -> Tensor:
        return FluxPipeline._unpack_latents(latents, *self.image_size, self.pipeline.vae_scale_factor)

    def _pack(self, latents: Tensor) -> Tensor:
        packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
        return packed

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        embedding, pooled, _ = self.pipeline.encode_prompt(
            [prompt], device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": embedding, "pooled_projections": pooled}

    def _forward(self, x: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], guidance_scale: float) -> Tensor:
        guidance = None
        if self.pipeline.transformer.config.guidance_embeds:
            guidance = torch.full([len(x)], guidance_scale, device=x.device, dtype=torch.float32)
        elif guidance_scale > 1:
            raise EtudeError(
                f"guidance_scale = {guidance_scale:g}: this FLUX model has no guidance embedding, so set it to 1 (no guidance)."
            )
        timesteps = timesteps.to(x.dtype) / 1000  # in the pipeline's order: half precision rounds before dividing
        ids = {"img_ids": self._image_ids, "txt_ids": self._text_ids}
        arguments = {"guidance": guidance, **ids, **conditioning}
        return self.network(hidden_states=x, timestep=timesteps, return_dict=False, **arguments)[0]
