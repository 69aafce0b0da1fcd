"""Batch sizes that find themselves: the largest that fit, tried out before the first iteration.

A trial makes one network call of each phase on zeros, with as much memory taken away as trajectory
and optimiser will take later. It changes no weight and draws no random number. A size that turns
out to be too large is halved in the run, as a given one is.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator

from etude.batching import MicroBatch
from etude.config import TrainConfig
from etude.errors import EtudeError
from etude.learning.exchange import gather
from etude.learning.update import Learner
from etude.policies import TrainablePolicy
from etude.policies.loading import DTYPES
from etude.policies.pipeline import PipelinePolicy
from etude.sampling.plans import StepTable
from etude.training.memory_estimate import network_call, optimizer_bytes, trajectory_bytes

RUN_OUT = ("cuda", "xpu")
"""Devices whose lack of memory is an error. On a CPU it ends the process, so nothing is tried there."""
HEADROOM = 0.1
"""Share of the device's memory that the sizes leave free: in a device filled to the brim the allocator waits for it again and again."""


class BatchSizes:
    """The sizes of a run's micro-batches: those of sampling, of the replay, and of decoding."""

    def __init__(self, config: TrainConfig, policy: TrainablePolicy) -> None:
        self.config, self.policy = config, policy
        self.rollout = MicroBatch.of(config.rollout.batch_size, "rollout.batch_size")
        self.replay = MicroBatch.of(config.objective.batch_size, "objective.batch_size")
        self.known = policy.device.type not in RUN_OUT
        decode = [policy.decode_batch] if isinstance(policy, PipelinePolicy) else []
        self.automatic = [batch for batch in (self.rollout, self.replay, *decode) if batch.automatic]

    @property
    def to_find(self) -> bool:
        """Whether there are automatic sizes that no checkpoint has given."""
        return bool(self.automatic) and not self.known

    def check(self, in_parts: bool) -> None:
        """Refuses a size to be found if the processes hold the network in parts.

        Such a network is called by all processes together, and one that runs out of memory leaves
        the others waiting.
        """
        if in_parts and self.to_find:
            setting = self.automatic[0].setting
            raise EtudeError(
                f"{setting} = auto cannot be tried out where the processes hold the network in parts (FSDP): give a number, for "
                f"example {setting} = 4."
            )

    def find(self, learner: Learner, table: StepTable, prompt: str) -> None:
        """Finds this process's automatic sizes; `agree` must follow."""
        self.known = True
        policy, config, images = self.policy, self.config, len(learner.indices)
        trained = list(policy.trainable().values())
        later = optimizer_bytes(trained, config.optimizer)
        later += images * trajectory_bytes(policy, learner.objective, table)
        later += _headroom(policy.device)
        reserved = torch.empty(later, dtype=torch.uint8, device=policy.device)
        call = network_call(policy, table, policy.encode([prompt]), config.sampling.guidance_scale)
        pairs = max(len(rows) for rows, _ in learner.pairs(learner.objective.columns(table), 1))

        def replay(count: int) -> None:
            rows = count * learner.images_per_row
            # Recomputed activations need the kernels of the first pass, in which `call` was made.
            allowed = policy.attention.allowed(policy.device, policy.denoiser)
            with learner.accelerator.no_sync(policy.network), allowed:
                torch.autograd.grad(call(rows).square().mean(), trained)

        if self.rollout.automatic:
            dtype = config.rollout.dtype
            with policy.precision(DTYPES[dtype] if dtype else None):
                self.rollout.find(torch.no_grad()(call), images)
        if self.replay.automatic:
            self.replay.find(replay, pairs)
        del reserved
        if isinstance(policy, PipelinePolicy) and policy.decode_batch.automatic:
            policy.find_decode_batch(images)

    def agree(self, accelerator: Accelerator) -> None:
        """Lowers each automatic size to the smallest that a process has found."""
        own = torch.tensor([[batch.size for batch in self.automatic]])
        smallest = gather(accelerator, own, accelerator.num_processes).amin(0).tolist()
        for batch, size in zip(self.automatic, smallest, strict=True):
            batch.size = size

    def state(self) -> dict[str, int]:
        """The sizes that were found, by setting."""
        return {batch.setting: batch.size for batch in self.automatic}

    def load_state(self, sizes: dict[str, int]) -> None:
        """Restores the result of `state`; a run whose sizes were given keeps those."""
        for batch in self.automatic:
            batch.size = sizes.get(batch.setting, batch.size)
        self.known = self.known or all(batch.setting in sizes for batch in self.automatic)


def _headroom(device: torch.device) -> int:
    """Bytes of a device that are to stay free; 0 for one that does not tell its memory."""
    if device.type == "cpu":
        return 0
    return int(HEADROOM * torch.get_device_module(device).get_device_properties(device).total_memory)
