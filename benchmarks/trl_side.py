"""TRL's side of the comparison, in TRL's environment: its DDPOTrainer runs an iteration on request."""

from __future__ import annotations

import atexit
import json
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.prompts import PROMPTS
from benchmarks.protocol import serve
from benchmarks.workload import brightness

PartialState(cpu=json.loads(sys.argv[1]).get("cpu", True))  # before anything of TRL looks for a device

from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline  # type: ignore[import-not-found]  # noqa: E402


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Callable[..., dict[str, Any]]]]:
    """Builds TRL's trainer; returns its info and the handlers of requests.

    Args:
        settings: `pipeline`, `work`, `images`, `num_steps`, `updates`, `sample_batch_size`,
            `train_batch_size` and the hyper-parameters; with `lora` a LoRA beside bfloat16 weights is trained,
            with `cpu` false on a GPU.
    """
    out = tempfile.TemporaryDirectory(dir=settings["work"], prefix="run-")
    atexit.register(out.cleanup)
    choice = random.Random(settings["seed"])
    warnings.simplefilter("ignore", DeprecationWarning)
    trainer = DDPOTrainer(
        _config(settings, out.name),
        lambda images, prompts, metadata: (brightness(images, list(prompts)), {}),
        lambda: (choice.choice(PROMPTS), {}),
        DefaultDDPOStableDiffusionPipeline(settings["pipeline"], use_lora=settings.get("lora", False)),
    )
    trainer.sd_pipeline.set_progress_bar_config(disable=True)
    info = {
        "device": str(trainer.accelerator.device),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("trl", "torch", "diffusers", "transformers", "accelerate")},
        "parameters": sum(p.numel() for p in trainer.sd_pipeline.unet.parameters() if p.requires_grad),
    }
    state = {"epoch": 0, "step": 0}
    handlers: dict[str, Callable[..., dict[str, Any]]] = {
        "iterate": lambda: {"seconds": _iterate(trainer, state)},
        "parity": lambda path: _parity(trainer, Path(path)),
    }
    return info, handlers


def _config(settings: dict[str, Any], out: str) -> DDPOConfig:
    images, updates, train = settings["images"], settings["updates"], settings["train_batch_size"]
    return DDPOConfig(
        seed=settings["seed"],
        mixed_precision="bf16" if settings.get("lora") else "no",
        project_kwargs={"project_dir": out, "automatic_checkpoint_naming": True, "total_limit": 2},
        save_freq=1,
        sample_num_steps=settings["num_steps"],
        sample_eta=1.0,
        sample_guidance_scale=settings["guidance_scale"],
        sample_batch_size=settings["sample_batch_size"],
        sample_num_batches_per_epoch=images // settings["sample_batch_size"],
        train_batch_size=train,
        train_gradient_accumulation_steps=images // (updates * train),
        train_learning_rate=settings["learning_rate"],
        train_clip_range=settings["clip_range"],
        train_cfg=True,
        per_prompt_stat_tracking=True,
        negative_prompts=None,
    )


def _iterate(trainer: DDPOTrainer, state: dict[str, Any]) -> float:
    """Runs one iteration, an epoch in TRL: with a checkpoint from the second on."""
    started = time.perf_counter()
    state["step"] = trainer.step(state["epoch"], state["step"])
    state["epoch"] += 1
    return time.perf_counter() - started


def _parity(trainer: DDPOTrainer, path: Path) -> dict[str, Any]:
    """Samples one batch and writes its latents with TRL's log-probabilities, loss and gradient."""
    (sample,), ((_, prompts, _),) = trainer._generate_samples(iterations=1, batch_size=trainer.config.sample_batch_size)
    generator = torch.Generator().manual_seed(0)
    n, steps = sample["timesteps"].shape
    advantages = 4 * torch.randn(n, generator=generator)  # some exceed the limit of 5
    old = sample["log_probs"] + 2 * trainer.config.train_clip_range * torch.randn(n, steps, generator=generator)
    embeds = torch.cat([sample["negative_prompt_embeds"], sample["prompt_embeds"]])
    losses = []
    for j in range(steps):
        values = [sample[key][:, j] for key in ("latents", "timesteps", "next_latents")]
        loss, _, _ = trainer.calculate_loss(*values, old[:, j], advantages, embeds)
        (loss / steps).backward()
        losses.append(loss.detach())
    found = {
        "latents": sample["latents"],
        "next_latents": sample["next_latents"],
        "timesteps": sample["timesteps"],
        "log_prob": sample["log_probs"],
        "old_log_prob": old,
        "advantages": advantages,
        "loss": torch.stack(losses).mean(),
        "gradient": torch.cat([_gradient(p) for _, p in sorted(trainer.sd_pipeline.unet.named_parameters())]),
    }
    save_file({name: value.detach().contiguous().clone() for name, value in found.items()}, path)
    trainer.optimizer.zero_grad()
    return {"prompts": list(prompts)}


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros(parameter.numel()) if parameter.grad is None else parameter.grad.flatten()


if __name__ == "__main__":
    serve(start)
