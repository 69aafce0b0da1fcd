"""The gap between any two samplers of one model: of training, and of deployment.

    transfer gap = E r(images under the deployed sampler) - E r(images under the training sampler)
    improvement  = E r(deployed sampler, tuned model) - E r(deployed sampler, base model)

The two may differ in kernel, eta, steps, solver, guidance and size. With the ODE on one side and an
SDE of the same steps and guidance on the other it is the reward gap, to the bit. Images of one size
begin at the same noise and are pairs; images of two sizes share prompt and seed alone, so that
their difference is as noisy as that of independent images of the same prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from etude.config import SamplerSettings
from etude.errors import EtudeError
from etude.measuring.pairs import (
    Comparison,
    Measurement,
    Scores,
    compare,
    measurement_settings,
    measures_base,
    model_settings,
)
from etude.policies import Policy, TrainablePolicy
from etude.policies.loading import load_source
from etude.policies.source import ModelSource

NAMES = {"ode": "deployed", "sde": "training", "gap": "gap", "improvement": "improvement"}
"""The names of a comparison's quantities where its two samplers are any."""


@dataclass(frozen=True, kw_only=True)
class TransferRow(Comparison):
    """A comparison of a reward under a deployed sampler (`ode`) and under the training sampler (`sde`)."""

    deployed: SamplerSettings
    reward: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        estimates = {NAMES[quantity]: estimate for quantity, estimate in super().to_dict().items()}
        return {"sampler": self.deployed.model_dump(mode="json"), "reward": self.reward, **estimates}


@dataclass(frozen=True, repr=False)
class TransferReport:
    """The result of `transfer_gap`: a row for each deployed sampler and reward."""

    training: SamplerSettings
    rows: tuple[TransferRow, ...]
    settings: dict[str, Any]

    def table(self) -> Table:
        """The rows as a table for a rich console."""
        quantities = [q for q in NAMES if getattr(self.rows[0], q) is not None]
        caption = f"training: {self.training.label}; gap = deployed - training; 95 % intervals, clustered by prompt"
        table = Table("deployed sampler", "reward", *(NAMES[q] for q in quantities), "pairs", box=None, caption=caption)
        for row in self.rows:
            cells = [getattr(row, q).format(signed=q in {"gap", "improvement"}) for q in quantities]
            table.add_row(row.deployed.label, row.reward, *cells, str(row.gap.n))
        return table

    def to_json(self) -> str:
        """The settings and the rows as the text of a JSON file."""
        rows, training = [row.to_dict() for row in self.rows], self.training.model_dump(mode="json")
        return json.dumps({"settings": {**self.settings, "training": training}, "rows": rows}, indent=2) + "\n"


def transfer_gap(
    model: str | ModelSource | Policy,
    training: SamplerSettings,
    deployed: Sequence[SamplerSettings],
    measurement: Measurement,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TransferReport:
    """Measure the gap from a training sampler to each deployed one, with 95 % intervals.

    Args:
        model: a loaded policy, a `ModelSource`, or an embedded name, directory, file or hub id.
        training: sampler under which the model was, or would be, trained.
        deployed: samplers under which the model is to be served, at least one.
        measurement: prompts, rewards, number of images and seed.
        on_progress: as in `reward_gap`.

    Raises:
        EtudeError: a sampler does not fit the model, or as `reward_gap`.
    """
    if not deployed:
        raise EtudeError("there is no deployed sampler to compare with that of training: give at least one.")
    source = ModelSource(model) if isinstance(model, str) else model
    policy = load_source(source) if isinstance(source, ModelSource) else source
    with_base = measures_base(policy, measurement)
    for settings in (training, *deployed):
        settings.sampler().check(policy.resized(settings.size))
    drawn = [training, *(each for each in deployed for _ in range(1 + with_base))]
    total = measurement.num_images * sum(each.sampler().evaluations for each in drawn)

    def scores(settings: SamplerSettings) -> Scores:
        def advance(done: int) -> None:
            on_progress(done, total)

        images = measurement.images(policy.resized(settings.size), settings.sampler(), advance)
        return measurement.scores(images)

    begun, rows = scores(training), []
    for settings in deployed:
        tuned, base = scores(settings), None
        if with_base:
            assert isinstance(policy, TrainablePolicy)
            with policy.reference():
                base = scores(settings)
        for reward, compared in compare(tuned, begun, base, measurement.clusters).items():
            rows.append(TransferRow(**vars(compared), deployed=settings, reward=reward))
    return TransferReport(training, tuple(rows), {**model_settings(policy), **measurement_settings(measurement)})
