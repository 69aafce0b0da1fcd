"""Stable Diffusion 3 and 3.5 (any StableDiffusion3Pipeline, with or without T5) as a policy."""

from __future__ import annotations

from torch import Tensor

from etude.errors import EtudeError
from etude.policies.pipeline import Agreement, PipelinePolicy
from etude.sampling.paths import FlowPath, Grid


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
    t5 = ("tokenizer_3", 256)

    def grid(self, num_steps: int) -> Grid:
        """The scheduler's levels; dynamic shifting takes mu from the number of patches."""
        if not self.pipeline.scheduler.config.get("use_dynamic_shifting"):
            return self.path.grid(num_steps)
        patch = self.pipeline.transformer.config.patch_size
        tokens = (self.latent_size[0] // patch) * (self.latent_size[1] // patch)
        return self.path.grid(num_steps, mu=self._mu(tokens, 1.16))

    def agreements(self) -> list[Agreement]:
        parts, network = self.pipeline, self.pipeline.transformer.config
        pooled = parts.text_encoder.config.projection_dim + parts.text_encoder_2.config.projection_dim
        t5 = None if parts.text_encoder_3 is None else parts.text_encoder_3.config.d_model
        return [
            *self._channels(),
            (
                ("transformer.pooled_projection_dim", network.pooled_projection_dim),
                ("the sum of the text encoders' projection_dim", pooled),
            ),
            (("transformer.joint_attention_dim", network.joint_attention_dim), ("text_encoder_3.d_model", t5)),
        ]

    def _size_of(self, resolution: int) -> tuple[int, int]:
        largest = self.pipeline.transformer.config.pos_embed_max_size * self._side_multiple
        if resolution > largest:
            raise EtudeError(f"resolution = {resolution}: this model's position embeddings end at {largest} pixels.")
        return super()._size_of(resolution)

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        how = {"do_classifier_free_guidance": False, "max_sequence_length": self.max_sequence_length}
        embedding, _, pooled, _ = self.pipeline.encode_prompt([prompt], None, None, device=self.device, **how)
        return {"encoder_hidden_states": embedding, "pooled_projections": pooled}

    def _forward(self, x: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], guidance_scale: float) -> Tensor:
        return self.network(hidden_states=x, timestep=timesteps, return_dict=False, **conditioning)[0]
