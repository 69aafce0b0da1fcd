"""The processes of one run: accelerator, wrapping of the network, and failures that all share."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, utils
from torch import nn
from torch.distributed.fsdp import FSDPModule

from etude.config import TrainConfig
from etude.errors import EtudeError, brief

LAUNCHED = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
"""Environment variables with the number of processes of torchrun, `accelerate launch` or MPI."""
SKEW = timedelta(minutes=30)
"""Longest delay between processes for other reasons than a reward: gloo's usual time-out."""


def make_accelerator(config: TrainConfig, out: Path) -> Accelerator:
    """The accelerator of a run.

    Raises:
        EtudeError: a strategy is not supported, the launched processes
            do not form one group, or the images of an iteration do not divide among them.
    """
    if _asks_for("DEEPSPEED"):
        raise EtudeError(
            "Accelerate's configuration asks for DeepSpeed, which is not supported: use FSDP2, which divides the network and the "
            "optimiser's moments among the processes (examples/accelerate/fsdp2.yaml)."
        )
    launched = utils.get_int_from_env(LAUNCHED, 1)
    # Explicit, so that no environment variable of a launcher scales the loss or changes the precision.
    accelerator = Accelerator(
        # Otherwise processes of torchrun without a GPU form no group: each is a run of its own.
        cpu=launched > 1 and not torch.accelerator.is_available(),
        project_dir=out,
        mixed_precision="no",
        gradient_accumulation_plugin=utils.GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            # After the default time-out a process with a slow reward would count as lost.
            utils.InitProcessGroupKwargs(timeout=timedelta(seconds=config.rollout.reward_timeout) + SKEW),
            # Buffers never change. Without their exchange, processes may differ in their calls.
            utils.DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )
    if accelerator.num_processes != launched:
        raise EtudeError(
            f"{launched} processes were launched, but Accelerate formed a group of {accelerator.num_processes}, so that each would be "
            "a run of its own: start one process, or set ACCELERATE_USE_CPU=true to let them share the work on the CPU."
        )
    if torch.distributed.is_initialized():
        # Kept alive as long as the process. Gloo's destructor waits for its threads. If the model's wrapper drops the
        # last reference, it does so while it holds Python's global lock. A thread that frees the tensors of the last
        # exchange at that moment waits for the lock, so neither ever ends (seen with torch 2.13).
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(torch.distributed.group.WORLD))
    _check(config, accelerator)
    return accelerator


def prepare(
    accelerator: Accelerator, network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wraps the network, or divides it among processes, which replaces its parameters."""
    with warnings.catch_warnings():
        # Accelerate has no other argument that stops the exchange of buffers.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        network, prepared = accelerator.prepare(network, optimizer)
    if isinstance(network, FSDPModule):
        # By default the outermost layers stay whole after a forward without gradients, and swapped
        # weights would not reach them.
        network.set_reshard_after_forward(True)
    return network, prepared


def _check(config: TrainConfig, accelerator: Accelerator) -> None:
    """Refuses FSDP on the CPU, where Accelerate would not divide the model, and unequal shares of a step."""
    if accelerator.distributed_type == utils.DistributedType.MULTI_CPU and _asks_for("FSDP"):
        raise EtudeError(
            "Accelerate's configuration asks for FSDP, which divides a network among accelerators, and this machine has none: use "
            "examples/accelerate/ddp.yaml."
        )
    if accelerator.distributed_type == utils.DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise EtudeError("FSDP's first version is not supported: set fsdp_version: 2 in Accelerate's configuration.")
    images, updates = config.rollout.images_per_iteration, config.objective.updates_per_epoch
    processes = accelerator.num_processes
    if images % processes:
        raise EtudeError(f"rollout.images_per_iteration = {images} is not a multiple of the {processes} processes.")
    if processes > 1 and images % (processes * updates):
        raise EtudeError(
            f"rollout.images_per_iteration = {images} is not a multiple of {processes} processes times objective.updates_per_epoch = "
            f"{updates}, so that the processes would have unequal shares of an optimiser step: change one of the three."
        )


def _asks_for(strategy: str) -> bool:
    """Whether the launcher's configuration asks for a strategy, FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{strategy}", "false").lower() == "true"


class SharedFailureError(EtudeError):
    """A failure of one process that every process knows of."""

    shared = True


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """Context in which a failure of one process ends all, which otherwise would wait for it in vain.

    Raises:
        SharedFailureError: in every process, if there are several. The message is that of the first
            process that failed, with its number.
    """
    if accelerator.num_processes == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    messages: list[str | None] = utils.gather_object([None if failure is None else brief(failure, 1000)])
    first = next(((i, message) for i, message in enumerate(messages) if message is not None), None)
    if first is not None:
        raise SharedFailureError(f"process {first[0]}: {first[1]}") from failure


def end_training(accelerator: Accelerator, dissolve: bool) -> None:
    """Dissolves the group of processes with `dissolve`."""
    if dissolve:
        accelerator.end_training()
