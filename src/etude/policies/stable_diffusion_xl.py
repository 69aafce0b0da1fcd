"""Stable Diffusion XL (any StableDiffusionXLPipeline) as a policy."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from etude.errors import EtudeError, brief
from etude.policies.pipeline import Agreement, PipelinePolicy
from etude.policies.stable_diffusion import StableDiffusionPolicy


class StableDiffusionXLPolicy(StableDiffusionPolicy):
    """A StableDiffusionXLPipeline as a policy.

    `guidance_scale` is w of classifier-free guidance. The unconditional embeddings are zeros if the
    pipeline sets `force_zeros_for_empty_prompt`, as SDXL does; otherwise they are those of the
    empty prompt. The network's inputs are the states of the two encoders, the pooled embedding and
    the size (arXiv 2307.01952). Original and target size are those of the images, and the crop is
    at (0, 0).

    Latents are the autoencoder's, normalised where its config has statistics: `(latents -
    latents_mean) / latents_std * scaling_factor`. The published autoencoder overflows in float16
    (its config sets `force_upcast`), so it stays in float32 there.

    Raises:
        EtudeError: also for a UNet whose added embedding does not fit the text encoder.
    """

    load_arguments: ClassVar[dict[str, Any]] = PipelinePolicy.load_arguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.dtype == torch.float16 and self.pipeline.vae.config.get("force_upcast"):
            self.pipeline.vae.float()

    def _take_size(self, latent_size: tuple[int, int]) -> None:
        super()._take_size(latent_size)
        size, projection = self.image_size, self.pipeline.text_encoder_2.config.projection_dim
        try:  # [1, 6]: original height and width, top and left of the crop, target height and width
            ids = self.pipeline._get_add_time_ids(
                size, (0, 0), size, self.dtype, text_encoder_projection_dim=projection
            )
        except ValueError as error:
            raise EtudeError(f"this SDXL model contradicts itself: {brief(error)}") from error
        self._time_ids = ids.to(self.device)

    def agreements(self) -> list[Agreement]:
        parts, unet = self.pipeline, self.pipeline.unet.config
        width = parts.text_encoder.config.hidden_size + parts.text_encoder_2.config.hidden_size
        read = unet.cross_attention_dim if isinstance(unet.cross_attention_dim, int) else None
        text = (("unet.cross_attention_dim", read), ("the sum of the text encoders' hidden_size", width))
        return [*self._channels(), text]

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of each channel, `[1, c, 1, 1]`; None for an autoencoder without them."""
        config = self.pipeline.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return None
        mean, std = (torch.tensor(values, dtype=latents.dtype, device=latents.device) for values in (mean, std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def _unscaled(self, latents: Tensor) -> Tensor:
        if (statistics := self._statistics(latents)) is None:
            return super()._unscaled(latents)
        mean, std = statistics
        return latents * std / self.pipeline.vae.config.scaling_factor + mean

    def _scaled(self, latents: Tensor) -> Tensor:
        if (statistics := self._statistics(latents)) is None:
            return super()._scaled(latents)
        mean, std = statistics
        return (latents - mean) / std * self.pipeline.vae.config.scaling_factor

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        embedding, _, pooled, _ = self.pipeline.encode_prompt(
            [prompt], device=self.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embedding, "text_embeds": pooled}

    def _encode_nothing(self) -> dict[str, Tensor]:
        empty = self._encode("")
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return empty
        return {name: torch.zeros_like(rows) for name, rows in empty.items()}

    def _forward(self, x: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], guidance_scale: float) -> Tensor:
        added = {"text_embeds": conditioning["text_embeds"], "time_ids": self._time_ids.expand(len(x), -1)}
        arguments = {
            "encoder_hidden_states": conditioning["encoder_hidden_states"],
            "timestep_cond": self._guidance(x, guidance_scale),
        }
        return self.network(x, timesteps, added_cond_kwargs=added, return_dict=False, **arguments)[0]
