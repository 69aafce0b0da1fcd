"""What the processes of one run share: the accelerator, and who makes which sample."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    gather_object,
    get_int_from_env,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)
from torch import Tensor

from etude.config import TrainConfig
from etude.errors import EtudeError, brief

TRACKERS = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "trackio": is_trackio_available}
"""Whether the package of a tracker, which has its name, is there."""
LAUNCHED = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
"""Where launchers (torchrun, `accelerate launch`, MPI) say how many processes they started."""


def make_accelerator(config: TrainConfig, out: Path) -> Accelerator:
    """The accelerator of a run.

    Raises:
        EtudeError: a tracker's package is missing, the launched processes do not form one group, or the images of an iteration
            do not divide among them.
    """
    check_trackers(config.trackers)
    launched = get_int_from_env(LAUNCHED, 1)
    # Explicit, so that no environment variable of a launcher scales the loss or changes the precision.
    accelerator = Accelerator(
        # Without it processes that torchrun started where there is no GPU would form no group: each would be a run of its own.
        cpu=launched > 1 and not torch.accelerator.is_available(),
        log_with=list(config.trackers) or None,
        project_dir=out,
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if accelerator.num_processes != launched:
        raise EtudeError(
            f"{launched} processes were launched, but Accelerate formed a group of {accelerator.num_processes}, so that each would be "
            "a run of its own: start one process, or set ACCELERATE_USE_CPU=true to let them share the work on the CPU."
        )
    if torch.distributed.is_initialized():
        _keep_for_good(torch.distributed.group.WORLD)
    if config.rollout.images_per_iteration % accelerator.num_processes:
        raise EtudeError(
            f"rollout.images_per_iteration = {config.rollout.images_per_iteration} is not a multiple of "
            f"the {accelerator.num_processes} processes."
        )
    return accelerator


def _keep_for_good(group: object) -> None:
    """Lets the process group live as long as the process, whoever else lets go of it.

    Gloo's destructor waits for its threads, and does so holding Python's global lock when the model's wrapper was the last to let go. A
    thread that is just then freeing the tensors of the last exchange waits for that lock: neither ever ends (seen with torch 2.13).
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


class SharedFailureError(EtudeError):
    """A failure of one process that every process knows of."""


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """Inside, what one process raises ends the others too, which would else wait for it in their next exchange until a time-out.

    Raises:
        SharedFailureError: in every process, if there are several; what the first that failed said, and which it was.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if accelerator.num_processes == 1:
        if failure is not None:
            raise failure
        return
    said: list[str | None] = gather_object([None if failure is None else brief(failure, 1000)])
    first = next(((i, words) for i, words in enumerate(said) if words is not None), None)
    if first is not None:
        raise SharedFailureError(f"process {first[0]}: {first[1]}") from failure


def check_trackers(names: Iterable[str]) -> None:
    """A tracker whose package is missing is an EtudeError: Accelerate alone would warn and leave it out."""
    for name in names:
        if not TRACKERS[name]():
            raise EtudeError(
                f"trackers holds '{name}', whose package is not installed: pip install {name}, or take it out of trackers."
            )


def share(count: int, processes: int, index: int) -> list[int]:
    """The samples 0..count - 1 that process `index` makes: consecutive, and equally many for every process.

    Where they do not divide, the last sample is made again to fill up; `gather` in order and cut to `count` drops it.
    """
    size = -(-count // processes)
    return [min(i, count - 1) for i in range(index * size, (index + 1) * size)]


def gather(accelerator: Accelerator, values: Tensor, count: int) -> Tensor:
    """All processes' rows in the order of the samples (`share`), on the CPU: `[count, ...]`."""
    gathered: Tensor = accelerator.gather(values.to(accelerator.device))
    return gathered.cpu()[:count]
