"""The content of a checkpoint: everything that a run needs to continue to the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from etude.errors import EtudeError, brief
from etude.learning.advantages import Advantage
from etude.learning.objectives import Objective
from etude.learning.optimizers import load_optimizer_tensors, optimizer_tensors
from etude.policies.sharding import part, whole
from etude.policies.trainable import assign
from etude.runs.checkpoint import Checkpoint
from etude.training.best import BestWeights
from etude.training.ledger import Ledger

if TYPE_CHECKING:
    from etude.training.evaluation import Evaluation


class RunState:
    """The parts of a run that change, and their form in a checkpoint.

    Args:
        parameters: trained parameters by name.
        optimizer: optimiser of the parameters.
        ema: moving average of the parameters. None: the run has none.
        best: weights of the best evaluation.
        objective: objective, which may keep weights of its own.
        advantage: advantage, which may remember rewards.
        evaluation: evaluation, with the base model's scores and the newest result.
        ledger: present iteration and its stage.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        ema: dict[str, Tensor] | None,
        best: BestWeights,
        objective: Objective,
        advantage: Advantage,
        evaluation: Evaluation,
        ledger: Ledger,
    ) -> None:
        self.parameters, self.optimizer, self.ema, self.best = parameters, optimizer, ema, best
        self.objective, self.advantage, self.evaluation, self.ledger = objective, advantage, evaluation, ledger

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
        return {
            "base_scores": self.evaluation.base_scores,
            "last_evaluation": self.evaluation.last,
            "best": self.best.state(),
            "advantage": self.advantage.state(),
            "unevaluated": self.ledger.unevaluated,
        }

    def take_up(self, checkpoint: Checkpoint) -> None:
        """Restores the state of a checkpoint.

        Raises:
            EtudeError: the checkpoint belongs to another model, or lacks a part that this version
                of etude needs.
        """
        try:
            self._take_up(checkpoint.iteration, checkpoint.tensors, checkpoint.state)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise EtudeError(
                f"checkpoint '{checkpoint.path}' does not hold the state that this version of etude goes on from "
                f"({type(error).__name__}: {brief(error)}): continue with the version that wrote it, or start another run."
            ) from error

    def _take_up(self, iteration: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        def named(part: str) -> dict[str, Tensor]:
            prefix = f"{part}/"
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        assign(self.parameters, named("weights"))
        load_optimizer_tensors(self.optimizer, list(self.parameters), named("optimizer"))
        for name, average in (self.ema or {}).items():
            average.copy_(part(tensors[f"ema/{name}"], average))
        self.objective.load_state(named("objective"))
        self.advantage.load_state(values["advantage"])
        self.evaluation.base_scores = values["base_scores"]
        self.evaluation.last = values["last_evaluation"]
        if self.best.reward is not None:
            self.best.load_state(named("best"), values["best"])
        self.ledger.take_up(iteration, values.get("unevaluated"))
