"""The books of a run: stage of its iteration and newest checkpoint, hence what a stop would lose.

    STARTING     nothing has been drawn since the process began
    DRAWING      images are drawn and scored; weights and statistics are those of the last finished iteration
    UPDATING     weights or statistics have moved on, the iteration is not finished
    EVALUATING   the update is done, its evaluation is not: only figures are missing
    WRITTEN      the row of the iteration is on the disk

An iteration is finished when its row is written. A checkpoint of a finished iteration can be saved
while the weights are still its own. A checkpoint can also be saved of an iteration that lacks only
its evaluation.
"""

from __future__ import annotations

from enum import Enum
from typing import Any


class Stage(Enum):
    """The stages of an iteration: see the module."""

    STARTING = "starting"
    DRAWING = "drawing"
    UPDATING = "updating"
    EVALUATING = "evaluating"
    WRITTEN = "written"


class Ledger:
    """The books of a run: present iteration, its stage, and the iteration of the newest checkpoint.

    Attributes:
        iteration: number of the present iteration; 0 is the evaluation of the base model.
        stage: stage of the present iteration.
        durable: iteration of the newest checkpoint; -1 before the first.
        unevaluated: row and seconds of an iteration that lacks its evaluation; None otherwise.
    """

    def __init__(self) -> None:
        self.iteration, self.stage, self.durable = 0, Stage.STARTING, -1
        self.unevaluated: dict[str, Any] | None = None

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

    def evaluate(self, row: dict[str, Any], seconds: dict[str, float]) -> None:
        """Notes that the evaluation begins, with the row and the seconds of the iteration so far."""
        self.stage, self.unevaluated = Stage.EVALUATING, {"row": dict(row), "seconds": dict(seconds)}

    def evaluated(self) -> None:
        """Notes that the evaluation is done."""
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

    @property
    def rows_written(self) -> int:
        """The last iteration whose row stays on the disk when the run continues; -1 for none."""
        return -1 if self.durable < 0 else self.iteration - (self.unevaluated is not None)
