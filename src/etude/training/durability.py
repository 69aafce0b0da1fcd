"""The durability of a run: its stage, its state, and the rows and checkpoints from which it continues.

An iteration is finished when its row is written. A checkpoint can be saved of a finished iteration
while the weights are still its own, and of an iteration that lacks only its evaluation.
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from etude.config import TrainConfig
from etude.errors import EtudeError, brief
from etude.files import append_line, atomic_write_text
from etude.learning.advantages import Advantage
from etude.learning.exchange import gather
from etude.learning.objectives import Objective
from etude.learning.optimizers import load_optimizer_tensors, optimizer_tensors
from etude.policies.sharding import part, sharded, whole
from etude.policies.trainable import assign
from etude.runs.checkpoint import Checkpoint, Checkpoints
from etude.runs.layout import clear_half_written, truncate_metrics
from etude.training.evaluation import Evaluation
from etude.training.guards import BestWeights
from etude.training.inputs import Inputs
from etude.training.sizes import BatchSizes


class Stage(Enum):
    """The stages of an iteration, each with what holds in it."""

    STARTING = "nothing has been drawn since the process began"
    DRAWING = "images are drawn and scored; weights and statistics are those of the last finished iteration"
    UPDATING = "weights or statistics have moved on, the iteration is not finished"
    EVALUATING = "the update is done, its evaluation is not: only figures are missing"
    WRITTEN = "the row of the iteration is on the disk"


class Ledger:
    """The books of a run: what a stop would lose."""

    def __init__(self) -> None:
        self.iteration, self.stage = 0, Stage.STARTING  # the present ones; 0 is the evaluation of the base model
        self.durable = -1  # iteration of the newest checkpoint; -1 before the first
        self.unevaluated: dict[str, Any] | None = None  # row and seconds of an iteration that lacks its evaluation

    def take_up(self, iteration: int, unevaluated: dict[str, Any] | None) -> None:
        """Continues from the checkpoint of an iteration."""
        self.iteration = self.durable = iteration
        self.unevaluated = unevaluated

    def draw(self) -> int:
        """Begins the next iteration; returns its number."""
        self.iteration, self.stage = self.iteration + 1, Stage.DRAWING
        return self.iteration

    def update(self) -> None:
        """Notes that weights or statistics begin to change."""
        self.stage = Stage.UPDATING

    @contextmanager
    def evaluating(self, row: dict[str, Any], seconds: dict[str, float]) -> Iterator[None]:
        """Context of the evaluation, with the row and the seconds of the iteration so far."""
        self.stage, self.unevaluated = Stage.EVALUATING, {"row": dict(row), "seconds": dict(seconds)}
        yield  # a failure leaves the iteration unevaluated
        self.stage, self.unevaluated = Stage.UPDATING, None

    def write(self, durable: bool) -> None:
        """Notes that the row of the iteration is on the disk, and with `durable` its checkpoint."""
        self.stage = Stage.WRITTEN
        if durable:
            self.durable = self.iteration

    @property
    def may_stop(self) -> bool:
        """Whether the run may end here without losing a finished iteration."""
        return self.savable is not None or self.durable >= self.iteration - 1 or self.unevaluated is not None

    @property
    def savable(self) -> int | None:
        """The iteration of a checkpoint saved now; None if the present state belongs to no iteration."""
        if self.unevaluated is not None and self.iteration > 0:
            return self.iteration
        return self.iteration - 1 if self.stage is Stage.DRAWING else None

    @property
    def unsaved(self) -> int | None:
        """The iteration to save before the run ends; None if all is saved, or it is too late."""
        return self.savable if self.savable is not None and self.durable < self.savable else None


@dataclass
class RunState:
    """The parts of a run that change, and their form in a checkpoint."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer  # as it was before Accelerate wrapped it
    ema: dict[str, Tensor] | None  # moving average of the parameters, if the run has one
    best: BestWeights
    objective: Objective  # may keep weights of its own
    advantage: Advantage  # may remember rewards
    evaluation: Evaluation  # holds the base model's scores and the newest result
    inputs: Inputs  # digests of what was read by name
    sizes: BatchSizes  # may have found sizes that fit
    ledger: Ledger = field(default_factory=Ledger)

    def tensors(self) -> dict[str, Tensor]:
        """Whole weights, moments and averages. All processes must call this if they hold parts."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "weights": {name: whole(p.detach()) for name, p in self.parameters.items()},
            "optimizer": optimizer_tensors(self.optimizer, list(self.parameters)),
            "ema": {name: whole(average) for name, average in (self.ema or {}).items()},
            "best": self.best.weights,
            "objective": {name: whole(tensor) for name, tensor in self.objective.state().items()},
        }
        return {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}

    def values(self) -> dict[str, Any]:
        """The rest of the state, as JSON."""
        deployed = self.evaluation.base_deployed
        return {
            "base_scores": self.evaluation.base_scores,
            **({} if deployed is None else {"base_deployed": deployed}),
            "last_evaluation": self.evaluation.last,
            "best": self.best.state(),
            "advantage": self.advantage.state(),
            "unevaluated": self.ledger.unevaluated,
            "inputs": self.inputs.digests,
            "changed_inputs": self.inputs.changes,
            "batch_sizes": self.sizes.state(),
        }

    def take_up(self, checkpoint: Checkpoint) -> None:
        """Restores the state of a checkpoint.

        Raises:
            EtudeError: the checkpoint belongs to another model, or lacks a part that this version
                of etude needs.
        """
        values = checkpoint.state
        parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
        for path, tensor in checkpoint.tensors.items():
            kind, _, name = path.partition("/")
            parts[kind][name] = tensor
        try:
            assign(self.parameters, parts["weights"])
            load_optimizer_tensors(self.optimizer, list(self.parameters), parts["optimizer"])
            for name, average in (self.ema or {}).items():
                average.copy_(part(parts["ema"][name], average))
            self.objective.load_state(parts["objective"])
            self.advantage.load_state(values["advantage"])
            self.sizes.load_state(values.get("batch_sizes", {}))
            self.evaluation.base_scores, self.evaluation.last = values["base_scores"], values["last_evaluation"]
            self.evaluation.base_deployed = values.get("base_deployed")
            if self.best.reward is not None:
                self.best.load_state(parts["best"], values["best"])
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise EtudeError(
                f"checkpoint '{checkpoint.path}' does not hold the state that this version of etude goes on from "
                f"({type(error).__name__}: {brief(error)}): continue with the version that wrote it, or start another run."
            ) from error
        self.ledger.take_up(checkpoint.iteration, values.get("unevaluated"))


class Durability:
    """Writes the rows of metrics and the checkpoints of a run, and restores its state."""

    def __init__(self, config: TrainConfig, out: Path, accelerator: Accelerator, state: RunState) -> None:
        self.config, self.out, self.accelerator, self.state = config, out, accelerator, state
        self.ledger, self.checkpoints = state.ledger, Checkpoints(out, config)
        self.in_parts = sharded(state.parameters)  # then all processes must take part in `save`

    def restore(self, resume: bool) -> None:
        """Restores the newest sound checkpoint, if the run is to resume and there is one."""
        checkpoint, processes = self.checkpoints.load() if resume else None, self.accelerator.num_processes
        own = torch.tensor([-1 if checkpoint is None else checkpoint.iteration])
        iterations = gather(self.accelerator, own, processes).tolist()  # no process writes before all have read
        if len(set(iterations)) > 1:
            raise EtudeError(
                f"the processes do not find the same checkpoint in '{self.out}' (iterations {iterations}, -1 for none): give an --out "
                "that all machines share."
            )
        if len({*gather(self.accelerator, torch.tensor([self.state.inputs.number]), processes).tolist()}) > 1:
            raise EtudeError(
                "the processes do not read the same prompts, model and rewards: give every machine the same files and modules."
            )
        if checkpoint is None:
            return
        if self.accelerator.is_main_process:
            self._tell(checkpoint)
        before = checkpoint.state.get("processes")
        if self.accelerator.is_main_process and before not in (None, processes):
            warnings.warn(
                f"the run goes on with {processes} process{'es' if processes > 1 else ''} instead of {before}: prompts, noise and "
                "optimiser steps stay the same, and the results to rounding, not to the bit",
                stacklevel=2,
            )
        self.state.take_up(checkpoint)

    def _tell(self, checkpoint: Checkpoint) -> None:
        """Warns of inputs that have changed, or that may have."""
        inputs = self.state.inputs
        if inputs.unknown:
            warnings.warn(
                f"checkpoint '{checkpoint.path}' was written by a version of etude that kept no digests: whether prompts, model and "
                "rewards are still those of the run is not checked",
                stacklevel=3,
            )
        for change in inputs.accepted:
            warnings.warn(
                f"{change}, and the run goes on with it: figures from before and after, as in improvement, are not of the same inputs",
                stacklevel=3,
            )

    def begin(self) -> None:
        """Removes files and rows that go beyond the present state, and writes the configuration."""
        written = -1 if self.ledger.durable < 0 else self.ledger.iteration - (self.ledger.unevaluated is not None)
        truncate_metrics(self.out / "metrics.jsonl", written)
        self.checkpoints.prune()
        clear_half_written(self.out)
        if self.ledger.iteration < self.config.iterations:
            (self.out / "summary.json").unlink(missing_ok=True)  # of a finished run that trains on
        atomic_write_text(self.out / "config.yaml", self.config.to_yaml())

    def withdraw(self) -> None:
        """Removes the configuration of a run that failed before its first row, if nothing else is in its directory."""
        if self.accelerator.is_main_process and [path.name for path in self.out.iterdir()] == ["config.yaml"]:
            (self.out / "config.yaml").unlink()

    def write(self, row: dict[str, Any], durable: bool) -> None:
        """Writes the row of a finished iteration, then with `durable` its checkpoint."""
        if self.accelerator.is_main_process:
            append_line(self.out / "metrics.jsonl", json.dumps(row))
        if durable:
            self.save(self.ledger.iteration)
        self.ledger.write(durable)

    def save(self, iteration: int) -> None:
        """Writes a checkpoint from the first process. All must call this if they hold parts."""
        if self.accelerator.is_main_process or self.in_parts:
            tensors = self.state.tensors()
            if self.accelerator.is_main_process:
                values = {**self.state.values(), "processes": self.accelerator.num_processes}
                self.checkpoints.save(iteration, tensors, values)
