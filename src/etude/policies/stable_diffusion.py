"""Stable Diffusion 1.x and 2.x (any StableDiffusionPipeline) as a policy: `emoji-sd` and SD1.5 run the same lines."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from etude.config import LoraConfig
from etude.errors import EtudeError
from etude.paths import VPPath
from etude.policies.base import Conditioning, Policy

ADAPTER = "default"


class StableDiffusionPolicy(Policy):
    """A StableDiffusionPipeline as a policy.

    Args:
        pipeline: its scheduler's config gives the noise path; its scheduler is not used.
        dtype: of the frozen weights and of the network's input. Adapters, latents and predictions stay fp32.
        device: where it runs.
        resolution: side of the images in pixels; None is the pipeline's own.
        decode_batch_size: images decoded at a time.
    """

    pipeline_class = StableDiffusionPipeline

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        resolution: int | None = None,
        decode_batch_size: int = 32,
    ) -> None:
        pipeline.to(device=device) if pipeline.dtype == dtype else pipeline.to(device=device, dtype=dtype)
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False).eval()
        self.pipeline = pipeline
        self.network: nn.Module = pipeline.unet
        self.path = VPPath.from_config(pipeline.scheduler.config)
        self.scheduler_config: Mapping[str, Any] = dict(pipeline.scheduler.config)
        self.latent_shape = (pipeline.unet.config.in_channels, *self._latent_size(resolution))
        self.dtype, self.device, self.decode_batch_size = dtype, torch.device(device), decode_batch_size
        self._encoded: dict[str, Tensor] = {}
        self._initial: nn.Module | None = None
        self._trains_everything = False

    def _latent_size(self, resolution: int | None) -> tuple[int, int]:
        if resolution is None:
            size = self.pipeline.unet.config.sample_size
            return (size, size) if isinstance(size, int) else (size[0], size[1])
        factor = self.pipeline.vae_scale_factor
        if resolution < factor or resolution % factor:
            raise EtudeError(
                f"resolution = {resolution}: this model makes images whose side is a multiple of {factor} pixels."
            )
        return (resolution // factor, resolution // factor)

    def encode(self, prompts: list[str]) -> Conditioning:
        new = [prompt for prompt in dict.fromkeys([*prompts, ""]) if prompt not in self._encoded]
        for start in range(0, len(new), self.decode_batch_size):
            batch = new[start : start + self.decode_batch_size]
            with torch.no_grad():
                embeddings, _ = self.pipeline.encode_prompt(batch, self.device, 1, do_classifier_free_guidance=False)
            self._encoded.update(zip(batch, embeddings, strict=True))
        return Conditioning(
            {"encoder_hidden_states": torch.stack([self._encoded[prompt] for prompt in prompts])},
            {"encoder_hidden_states": self._encoded[""][None]},
        )

    def predict(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        guided = guidance_scale > 1
        inputs, hidden = x.to(self.dtype), conditioning.prompt["encoder_hidden_states"]
        if guided:
            empty = conditioning.unconditional["encoder_hidden_states"].expand_as(hidden)
            inputs, timesteps, hidden = (
                torch.cat([inputs, inputs]),
                torch.cat([timesteps, timesteps]),
                torch.cat([empty, hidden]),
            )
        with self._autocast():
            output = self.network(inputs, timesteps, encoder_hidden_states=hidden, return_dict=False)[0].float()
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _autocast(self) -> Any:
        """Adapters are fp32 while the frozen weights may be half precision."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae, images = self.pipeline.vae, []
        for batch in latents.split(self.decode_batch_size):
            decoded = vae.decode((batch / vae.config.scaling_factor).to(self.dtype), return_dict=False)[0].float()
            images.append((decoded / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu())
        return torch.cat(images)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.pipeline.unet.named_parameters() if p.requires_grad}

    def add_lora(self, config: LoraConfig, seed: int) -> None:
        names = [
            name for name, module in self.pipeline.unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
        ]
        missing = [t for t in config.targets if not any(name == t or name.endswith(f".{t}") for name in names)]
        if missing:
            layers = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
            raise EtudeError(
                f"lora.targets: no layer of the UNet is named '{missing[0]}'; it has {', '.join(layers)}, to_out.0."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.pipeline.unet.add_adapter(
                PeftLoraConfig(
                    r=config.rank,
                    lora_alpha=config.alpha,
                    target_modules=list(config.targets),
                    init_lora_weights="gaussian",
                ),
                adapter_name=ADAPTER,
            )
        cast_training_params(self.pipeline.unet, dtype=torch.float32)

    def train_everything(self, keep_reference: bool = True) -> None:
        if keep_reference:
            self._initial = copy.deepcopy(self.pipeline.unet)
        self._trains_everything = True
        self.pipeline.unet.float().requires_grad_(True)

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self._initial is not None:
            trained, self.network = self.network, self._initial
            try:
                yield
            finally:
                self.network = trained
        elif self._trains_everything:
            raise EtudeError(
                "no copy of the model before training was kept: call train_everything(keep_reference=True)."
            )
        elif not getattr(self.pipeline.unet, "peft_config", None):
            yield
        else:
            self.pipeline.unet.disable_adapters()
            try:
                yield
            finally:
                self.pipeline.unet.enable_adapters()

    @property
    def export_name(self) -> str:
        return "model" if self._trains_everything else "lora"

    def export(self, directory: Path) -> None:
        unet = self.pipeline.unet
        if self._trains_everything:
            unet.save_pretrained(directory / "unet")
            return
        layers = get_peft_model_state_dict(unet, adapter_name=ADAPTER)  # peft names: the older ones lose mixed targets
        metadata = unet.peft_config[ADAPTER].to_dict()
        metadata["target_modules"] = sorted(metadata["target_modules"])  # a set in peft, ordered anew by each process
        self.pipeline_class.save_lora_weights(directory, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)

    def load_lora(self, directory: Path) -> None:
        self.pipeline.load_lora_weights(directory, adapter_name=ADAPTER, local_files_only=True, use_safetensors=True)
        self.pipeline.unet.requires_grad_(False)
