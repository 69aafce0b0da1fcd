"""Metrics: the numbers of an iteration, each declared once with words, computation and limit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from etude.errors import EtudeError
from etude.registry import OBJECTIVES

if TYPE_CHECKING:
    from torch import Tensor

Records = dict[str, list["Tensor"]]
"""Detached tensors by name: one entry for each micro-batch, or for each optimiser step."""


@dataclass(frozen=True)
class Metric:
    """One number of an iteration.

    Attributes:
        name: key in `metrics.jsonl`.
        title: name for people.
        note: one sentence on the meaning.
        act: when to act, and how; empty if never.
        compute: function from the records to the number, a scalar tensor; None: computed elsewhere.
        needs: names of the records that `compute` reads; without them there is no such number.
            Default: the record of a `mean`.
        merge: rule that makes one number of those of several processes.
        limit: largest magnitude in a run that has not diverged. Default: any finite number.
        from_zero: draw the axis from 0.
        logged: write the number into `metrics.jsonl`.
    """

    name: str
    title: str
    note: str
    act: str = ""
    compute: Callable[[Records], Tensor] | None = None
    needs: tuple[str, ...] = ()
    merge: Literal["mean", "max"] = "mean"
    limit: float = sys.float_info.max
    from_zero: bool = False
    logged: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.compute, Mean) and not self.needs:
            object.__setattr__(self, "needs", (self.compute.record,))


@dataclass(frozen=True)
class Mean:
    """A computation: the mean over all entries of a record."""

    record: str

    def __call__(self, records: Records) -> Tensor:
        values = joined(records[self.record])
        return (values if values.is_floating_point() else values.float()).mean()


def mean(record: str) -> Mean:
    """The computation of a record's mean, for `Metric.compute`, which then needs this record."""
    return Mean(record)


def joined(parts: list[Tensor]) -> Tensor:
    """The entries of a record as one tensor `[all]`."""
    import torch

    return torch.cat(parts) if parts[0].ndim else torch.stack(parts)


LOSS = Metric(
    "loss",
    "loss",
    "The loss, mean over the optimiser steps. PPO's stays near 0, because advantages have mean 0: it is no measure of progress.",
    compute=mean("loss"),
)
GRAD_NORM = Metric(
    "grad_norm",
    "gradient norm",
    "The norm of the gradient before clipping, mean over the optimiser steps.",
    "often above `optimizer.max_grad_norm`: every step is clipped",
    compute=mean("grad_norm"),
    from_zero=True,
)
LARGEST_WEIGHT = Metric("largest weight", "largest weight", "The largest trained weight.", merge="max", logged=False)
ZERO_STD_RATIO = Metric(
    "zero_std_ratio",
    "groups without a signal",
    "The share of groups whose rewards are all equal: they teach nothing.",
    "above a half: larger groups, harder prompts, or a reward with more shades",
    from_zero=True,
)
COMMON = (LOSS, GRAD_NORM, LARGEST_WEIGHT, ZERO_STD_RATIO)
"""The metrics of every objective."""


def metrics_of(objective: str) -> tuple[Metric, ...]:
    """The metrics of a run with that objective; only the common ones if it is not installed here."""
    try:
        own: tuple[Metric, ...] = OBJECTIVES.get(objective).metrics
    except EtudeError:
        own = ()
    return (*own, *COMMON)


def compute_all(metrics: Iterable[Metric], records: Records) -> dict[str, float]:
    """The numbers of those metrics whose records exist; the device is read once."""
    import torch

    values = {
        metric.name: metric.compute(records)
        for metric in metrics
        if metric.compute is not None and all(records.get(name) for name in metric.needs)
    }
    numbers = torch.stack([value.double() for value in values.values()]).tolist() if values else []
    return dict(zip(values, numbers, strict=True))


def merge(metrics: Iterable[Metric], columns: Mapping[str, Tensor]) -> dict[str, float]:
    """One number for each metric, from the numbers `[processes]` of all processes."""
    how = {metric.name: metric.merge for metric in metrics}
    return {name: float(values.max() if how[name] == "max" else values.mean()) for name, values in columns.items()}


def beyond_limit(metrics: Iterable[Metric], numbers: Mapping[str, float]) -> str | None:
    """The first metric that is not finite or exceeds its limit; None if training is sound."""
    limits = {metric.name: metric.limit for metric in metrics}
    return next((name for name, value in numbers.items() if not abs(value) <= limits[name]), None)
