"""An estimate of a run's accelerator memory, before it starts: sizes are counted, activations simulated.

The configuration determines the sizes of weights, gradients, optimiser state and stored trajectory.
It does not determine those of activations. For them, one micro-batch of each phase runs on fake
tensors, which have shapes and no numbers, and the largest number of bytes alive at once is
recorded. That figure is rough: it leaves out the workspace of a device's kernels and the waste of
its allocator, and a device may compute attention in another way. Models of rewards are not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from etude.config import OptimizerConfig, TrainConfig
from etude.policies.loading import DTYPES
from etude.policies.outline import fake_mode
from etude.policies.pipeline import PipelinePolicy
from etude.training.schedule import PlanSchedule

if TYPE_CHECKING:
    from etude.policies import TrainablePolicy
    from etude.sampling.plans import StepTable
    from etude.training.blueprint import Blueprint

FLOAT = 4
"""Bytes of a float32."""
EIGHT_BIT_LEAST, EIGHT_BIT_BLOCK = 4096, 256
"""Sizes in bitsandbytes: smallest parameter with moments in 8 bits, and block with one scale."""


def memory_estimate(blueprint: Blueprint, policy: TrainablePolicy, schedule: PlanSchedule) -> dict[str, int]:
    """Bytes by part for a run in one process; the last entry is the sum. Empty parts are left out.

    Args:
        blueprint: parts of the run that need no model.
        policy: outline of the model, made trainable.
        schedule: plan of each iteration.
    """
    config, reference = blueprint.config, blueprint.objective.needs_reference
    trained = list(policy.trainable().values())
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    waiting = _waiting(policy)
    images, prompt = config.rollout.images_per_iteration, blueprint.prompts.texts[:1]
    conditioning = policy.encode(prompt).prompt.values()
    table = max((schedule.table_at(iteration) for iteration in range(1, config.iterations + 1)), key=_stored_levels)
    stored = trajectory_floats(table, policy.dimensions, reference + blueprint.objective.keeps_means) * FLOAT
    copies = config.lora.rank == 0 and reference
    frozen = sum(_bytes(part) for name, part in _parts(policy).items() if name not in waiting) - trained_bytes
    phases = activations(config, policy, schedule.table_at(1), prompt)
    largest = max(phases, key=phases.__getitem__)
    parts = {
        "frozen weights": frozen,
        "adapter" if config.lora.rank else "trained weights": trained_bytes,
        "gradients": trained_bytes,
        f"optimiser state ({config.optimizer.kind})": optimizer_bytes(trained, config.optimizer),
        "moving average": trained_bytes if config.ema.decay else 0,
        "copy of the model before training": trained_bytes if copies else 0,
        f"trajectory of {images:,} images": images * stored,
        f"prompts of {images:,} images": images * sum(rows.nbytes for rows in conditioning),
        f"activations, roughly ({largest})": phases[largest],
    }
    parts = {name: size for name, size in parts.items() if size}
    return parts | {"in all, roughly": sum(parts.values())}


def trajectory_floats(table: StepTable, dimensions: int, means: int) -> int:
    """Count of numbers that a rollout stores for one image: states, log-probabilities and latents.

    The states are those at both ends of the trained steps. Means of the trained steps are added,
    those of the reference model and those of the policy, if they are kept.
    """
    steps = len(table.trained_steps)
    return (_stored_levels(table) + 1 + means * steps) * dimensions + steps


def _stored_levels(table: StepTable) -> int:
    return len({*table.trained_steps, *(step + 1 for step in table.trained_steps)})


def optimizer_bytes(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> int:
    """Bytes of AdamW's moments: float32, or for large parameters 8 bits with a scale a block."""

    def moments(count: int) -> int:
        if config.kind == "adamw" or count < EIGHT_BIT_LEAST:
            return 2 * FLOAT * count
        return 2 * (count + FLOAT * -(-count // EIGHT_BIT_BLOCK))

    return sum(moments(parameter.numel()) for parameter in parameters)


def activations(config: TrainConfig, policy: TrainablePolicy, table: StepTable, prompt: list[str]) -> dict[str, int]:
    """The largest number of bytes alive at once in one micro-batch of each phase.

    Weights, gradients and trajectory, which stay, are not included. An offloaded part counts in the
    phase in which it is on the device.
    """
    images, replay = config.rollout.images_per_iteration, config.objective.batch_size
    sampled = min(config.rollout.batch_size, images)
    trained = list(policy.trainable().values())
    conditioning = policy.encode(prompt)
    mode = fake_mode(policy)

    def predict(count: int) -> Tensor:
        x = torch.randn(count, *policy.latent_shape, device=policy.device)
        rows = torch.zeros(count, dtype=torch.int64, device=policy.device)
        timesteps = table.timesteps[:1].to(policy.device)[rows]
        return policy.predict(x, timesteps, conditioning.take(rows), config.sampling.guidance_scale)

    phases = {
        f"replay of {replay}": peak_bytes(lambda: torch.autograd.grad(predict(replay).square().mean(), trained), mode),
    }
    with policy.precision(DTYPES[config.rollout.dtype] if config.rollout.dtype else None):
        phases[f"rollout of {sampled}"] = peak_bytes(torch.no_grad()(lambda: predict(sampled)), mode)
    if isinstance(policy, PipelinePolicy):
        count, vae = min(policy.decode_batch.size, images), policy.pipeline.vae
        waiting = _waiting(policy)
        latents = (count, *policy.latent_shape)
        decoding = peak_bytes(torch.no_grad()(lambda: policy.pictures(torch.randn(latents, device=vae.device))), mode)
        phases[f"decoding of {count}"] = decoding + (_bytes(vae) if "vae" in waiting else 0)
        if waiting:
            parts = _parts(policy)
            phases["encoding prompts"] = sum(_bytes(parts[name]) for name in waiting if name != "vae")
    return phases


def peak_bytes(work: Callable[[], Any], mode: FakeTensorMode | None = None) -> int:
    """The largest number of bytes of tensors that `work` has alive at once.

    `work` runs on fake tensors: no number is computed and no memory allocated.

    Args:
        work: function to run.
        mode: mode of the fake tensors that `work` uses. Default: a new one.
    """
    with mode or FakeTensorMode(allow_non_fake_inputs=True), _Live() as live:
        work()
    return live.peak


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
                    self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
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
    components = policy.pipeline.components.items()
    return {name: part for name, part in components if isinstance(part, nn.Module)}


def _waiting(policy: TrainablePolicy) -> set[str]:
    """Names of the parts that are on the CPU while they are not used."""
    if not (isinstance(policy, PipelinePolicy) and policy.offload):
        return set()
    return {name for name in _parts(policy) if name != policy.denoiser}


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def readable(size: int) -> str:
    """A number of bytes in GiB, or in MiB below one GiB, with one decimal."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
