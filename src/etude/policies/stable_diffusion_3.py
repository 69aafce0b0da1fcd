"""Stable Diffusion 3 and 3.5 (any StableDiffusion3Pipeline, with or without T5) as a policy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from etude.errors import EtudeError
from etude.policies.pipeline import PipelinePolicy
from etude.sampling.paths import FlowPath, Grid

LONGEST_PROMPT = 256
"""Default `max_sequence_length` of the pipeline, in tokens."""


class StableDiffusion3Policy(PipelinePolicy):
    """A StableDiffusion3Pipeline as a policy.

    `guidance_scale` is w of classifier-free guidance. Latents are the autoencoder's, `[c, h, w]`.
    T5 reads at most 256 tokens, or the limit of its tokenizer if that is lower. A pipeline saved
    without T5 gets zeros instead, as its design foresees.
    """

    path: FlowPath
    path_class = FlowPath
    denoiser = "transformer"
    optional = ("text_encoder_3", "tokenizer_3")

    @property
    def max_sequence_length(self) -> int:
        """Number of a prompt's tokens that T5 reads."""
        tokenizer = self.pipeline.tokenizer_3
        return LONGEST_PROMPT if tokenizer is None else min(LONGEST_PROMPT, tokenizer.model_max_length)

    def call_arguments(self, guidance_scale: float) -> dict[str, Any]:
        return {**super().call_arguments(guidance_scale), "max_sequence_length": self.max_sequence_length}

    def grid(self, num_steps: int) -> Grid:
        """The scheduler's levels; dynamic shifting takes mu from the number of patches."""
        if not self.pipeline.scheduler.config.get("use_dynamic_shifting"):
            return self.path.grid(num_steps)
        patch = self.pipeline.transformer.config.patch_size
        tokens = (self.latent_size[0] // patch) * (self.latent_size[1] // patch)
        return self.path.grid(num_steps, mu=self._mu(tokens, 1.16))

    @property
    def _side_multiple(self) -> int:
        return int(self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size)

    def _default_size(self) -> tuple[int, int]:
        size = self.pipeline.transformer.config.sample_size
        return (size, size)

    def _size_of(self, resolution: int) -> tuple[int, int]:
        largest = self.pipeline.transformer.config.pos_embed_max_size * self._side_multiple
        if resolution > largest:
            raise EtudeError(f"resolution = {resolution}: this model's position embeddings end at {largest} pixels.")
        return super()._size_of(resolution)

    def _shape(self) -> tuple[int, ...]:
        return (self.pipeline.transformer.config.in_channels, *self.latent_size)

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        how = {"do_classifier_free_guidance": False, "max_sequence_length": self.max_sequence_length}
        embedding, _, pooled, _ = self.pipeline.encode_prompt([prompt], None, None, device=self.device, **how)
        return {"encoder_hidden_states": embedding, "pooled_projections": pooled}

    def _forward(self, x: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], guidance_scale: float) -> Tensor:
        return self.network(hidden_states=x, timestep=timesteps, return_dict=False, **conditioning)[0]
