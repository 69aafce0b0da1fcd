"""An estimate of a run's accelerator memory, before it starts: sizes are counted, activations simulated.

For activations, one micro-batch of each phase runs on tensors that have shapes and no numbers. That
figure is rough: it leaves out the workspace of a device's kernels and the waste of its allocator,
and a device may compute attention in another way. Models of rewards are not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from etude.batching import AUTO, Size
from etude.config import OptimizerConfig, TrainConfig
from etude.learning.objectives import Objective
from etude.policies import Conditioning, TrainablePolicy
from etude.policies.loading import DTYPES
from etude.policies.pipeline import PipelinePolicy
from etude.sampling.plans import StepTable
from etude.sampling.shapes import NumbersNeededError, Shapes
from etude.training.blueprint import Blueprint
from etude.training.schedule import PlanSchedule

IN_ALL = "in all, roughly"
FLOAT = 4
"""Bytes of a float32."""
EIGHT_BIT_LEAST, EIGHT_BIT_BLOCK = 4096, 256
"""Sizes in bitsandbytes: smallest parameter with moments in 8 bits, and block with one scale."""


def memory_estimate(blueprint: Blueprint, policy: TrainablePolicy, schedule: PlanSchedule) -> dict[str, int]:
    """Bytes by part for a run in one process; the last entry is the sum. Empty parts are left out.

    `policy` is an outline of the model, made trainable. Where its pipeline computes with numbers,
    which shapes lack, there are no activations and no sum.
    """
    config, reference = blueprint.config, blueprint.needs_reference
    parameters, prompt = list(policy.trainable().values()), blueprint.prompts.texts[:1]
    trained, images = sum(parameter.nbytes for parameter in parameters), config.rollout.images_per_iteration
    staying = [_bytes(part) for name, part in _parts(policy).items() if name not in _waiting(policy)]
    table = max((schedule.table_at(iteration) for iteration in range(1, config.iterations + 1)), key=_stored_levels)
    stored = trajectory_bytes(policy, blueprint.objective, table)
    try:
        phases = activations(config, policy, schedule.table_at(1), prompt)
    except NumbersNeededError:
        phases = {}
    largest = max(phases, key=phases.__getitem__, default="")
    parts = {
        "frozen weights": sum(staying) - trained,
        "adapter" if config.lora.rank else "trained weights": trained,
        "gradients": trained,
        f"optimiser state ({config.optimizer.kind})": optimizer_bytes(parameters, config.optimizer),
        "moving average": trained if config.ema.decay else 0,
        "copy of the model before training": trained if config.lora.rank == 0 and reference else 0,
        f"trajectory of {images:,} images": images * stored,
        f"gradients of {images:,} images": images * trained if config.objective.gradients == "rollout" else 0,
        f"prompts of {images:,} images": images * sum(rows.nbytes for rows in policy.encode(prompt).prompt.values()),
        f"activations, roughly ({largest})": phases.get(largest, 0),
    }
    parts = {name: size for name, size in parts.items() if size}
    return parts | ({IN_ALL: sum(parts.values())} if phases else {})


def trajectory_bytes(policy: TrainablePolicy, objective: Objective, table: StepTable) -> int:
    """Bytes of one image's trajectory."""
    return FLOAT * trajectory_floats(table, policy.dimensions, objective.needs_reference + objective.keeps_means)


def trajectory_floats(table: StepTable, dimensions: int, means: int) -> int:
    """Count of a rollout's numbers for one image: states, log-probabilities, latents, and `means` per trained step.

    Means are those of the reference model and those of the policy, if they are kept.
    """
    steps = len(table.trained_steps)
    return (_stored_levels(table) + 1 + means * steps) * dimensions + steps


def _stored_levels(table: StepTable) -> int:
    return len({*table.trained_steps, *(step + 1 for step in table.trained_steps)})


def optimizer_bytes(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> int:
    """Bytes of AdamW's two moments: float32, or for large parameters 8 bits with a scale a block."""
    counts = [parameter.numel() for parameter in parameters]
    packed = [count for count in counts if config.kind != "adamw" and count >= EIGHT_BIT_LEAST]
    scales = sum(-(-count // EIGHT_BIT_BLOCK) for count in packed)
    return 2 * (FLOAT * (sum(counts) - sum(packed) + scales) + sum(packed))


def activations(config: TrainConfig, policy: TrainablePolicy, table: StepTable, prompt: list[str]) -> dict[str, int]:
    """The largest number of bytes alive at once in one micro-batch of each phase, beside what stays.

    An offloaded part counts in the phase in which it is on the device.
    """
    images, replay = config.rollout.images_per_iteration, _least(config.objective.batch_size)
    sampled, dtype = min(_least(config.rollout.batch_size), images), config.rollout.dtype
    trained = list(policy.trainable().values())
    predict = network_call(policy, table, policy.encode(prompt), config.sampling.guidance_scale)
    phases: dict[str, int] = {}

    def differentiate(count: int) -> int:
        return peak_bytes(lambda: torch.autograd.grad(predict(count).square().mean(), trained))

    if config.objective.gradients == "replay":
        phases[f"replay of {replay}"] = differentiate(replay)
    with policy.precision(DTYPES[dtype] if dtype else None):
        phases[f"rollout of {sampled}"] = (
            peak_bytes(torch.no_grad()(lambda: predict(sampled))) if phases else differentiate(sampled)
        )
    if isinstance(policy, PipelinePolicy):
        size = 1 if policy.decode_batch.automatic else policy.decode_batch.size
        count, vae, waiting = min(size, images), policy.pipeline.vae, _waiting(policy)
        latents = (count, *policy.latent_shape)
        decoding = peak_bytes(torch.no_grad()(lambda: policy.pictures(torch.zeros(latents, device=vae.device))))
        phases[f"decoding of {count}"] = decoding + (_bytes(vae) if "vae" in waiting else 0)
        if waiting:
            phases["encoding prompts"] = sum(_bytes(part) for name, part in waiting.items() if name != "vae")
    return phases


def _least(size: Size) -> int:
    """The least number of samples in a call: `auto` takes one where no more fit."""
    return 1 if size == AUTO else size


def network_call(
    policy: TrainablePolicy, table: StepTable, conditioning: Conditioning, guidance_scale: float
) -> Callable[[int], Tensor]:
    """A function that evaluates the network on so many rows of zeros, of the first row's prompt."""

    def predict(count: int) -> Tensor:
        x = torch.zeros(count, *policy.latent_shape, device=policy.device)
        rows = torch.zeros(count, dtype=torch.int64, device=policy.device)
        timesteps = table.timesteps[:1].to(policy.device)[rows]
        return policy.predict(x, timesteps, conditioning.take(rows), guidance_scale)

    return predict


def peak_bytes(work: Callable[[], Any]) -> int:
    """The largest number of bytes of tensors that `work` has alive at once on a GPU, computed on shapes."""
    live = _Live()
    with Shapes(live.add), _norms_of_gpu():
        work()
    return live.peak


@contextmanager
def _norms_of_gpu() -> Iterator[None]:
    """Context in which autocast computes norms in float32, as it does on a GPU, but not on a CPU, where shapes are.

    The backward keeps their inputs: in a UNet a third of all that it keeps. Not a mode for functions,
    which would be off while a backward recomputes a block.
    """

    def in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
            return norm(*args, **kwargs)

        return call

    group, layer = in_float32(torch.group_norm), in_float32(torch.layer_norm)
    with patch.object(torch, "group_norm", group), patch.object(torch, "layer_norm", layer):
        yield


class _Live(TorchDispatchMode):
    """Counts the bytes of storages from their creation by an operation to their release."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not (function.is_view or function._schema.is_mutable):  # such results use existing storages
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _parts(policy: TrainablePolicy) -> dict[str, nn.Module]:
    """The networks by name; the denoiser itself, without a wrapper of Accelerate."""
    if not isinstance(policy, PipelinePolicy):
        return {"network": policy.network}
    return {name: part for name, part in policy.pipeline.components.items() if isinstance(part, nn.Module)}


def _waiting(policy: TrainablePolicy) -> dict[str, nn.Module]:
    """The networks that are on the CPU while they are not used."""
    if not (isinstance(policy, PipelinePolicy) and policy.offload):
        return {}
    return {name: part for name, part in _parts(policy).items() if name != policy.denoiser}


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def readable(size: int) -> str:
    """A number of bytes in GiB, or in MiB below one GiB, with one decimal."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
