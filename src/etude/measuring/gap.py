"""The reward gap and the improvement, paired on prompt and initial noise.

    reward gap  = E r(ODE samples of the tuned model) - E r(SDE_eta samples of the tuned model)
    improvement = E r(ODE samples of the tuned model) - E r(ODE samples of the base model)

Every sampler gets the same weights, prompts, steps, guidance and initial noise. The difference is
therefore taken image by image, and its interval is clustered by prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from etude.errors import EtudeError
from etude.measuring.pairs import (
    QUANTITIES,
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
from etude.sampling.etas import Eta, eta_text
from etude.sampling.sampler import ODE, SDE, Sampler
from etude.terminal import plain_text


@dataclass(frozen=True, kw_only=True)
class GapRow(Comparison):
    """A comparison of a reward at one step count and eta."""

    num_steps: int
    eta: Eta
    reward: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"num_steps": self.num_steps, "eta": self.eta, "reward": self.reward, **super().to_dict()}


@dataclass(frozen=True, repr=False)
class GapReport:
    """The result of `reward_gap`; `print` shows it as a table.

    There is a row for each step count, eta and reward. The settings are all that is needed to
    measure again, as plain values.
    """

    rows: tuple[GapRow, ...]
    settings: dict[str, Any]

    def __getitem__(self, key: tuple[Any, ...]) -> GapRow:
        """The row of a reward and an eta, and of several step counts one: `report["alignment", 1.2, 20]`.

        Raises:
            EtudeError: no row was measured there, or several step counts were and none is named.
        """
        reward, eta, *steps = key if isinstance(key, tuple) else (key, None)
        rows = [row for row in self.rows if (row.reward, row.eta) == (reward, eta) and steps in ([], [row.num_steps])]
        if len(rows) == 1:
            return rows[0]
        keys = ", ".join(f"[{row.reward!r}, {eta_text(row.eta)}, {row.num_steps}]" for row in rows or self.rows)
        problem = "names several rows" if rows else "was not measured"
        raise EtudeError(
            f"{list(key) if isinstance(key, tuple) else [key]} {problem} in this report: give one of {keys}."
        )

    def table(self) -> Table:
        """The rows as a table for a rich console."""
        quantities = [q for q in QUANTITIES if getattr(self.rows[0], q) is not None]
        titles, caption = (QUANTITIES[q] for q in quantities), "means with 95 % intervals, clustered by prompt"
        table = Table("steps", "eta", "reward", *titles, "pairs", box=None, caption=caption)
        for row in self.rows:
            cells = [getattr(row, q).format(signed=q in {"gap", "improvement"}) for q in quantities]
            table.add_row(str(row.num_steps), eta_text(row.eta), row.reward, *cells, str(row.gap.n))
        return table

    def __repr__(self) -> str:
        return plain_text(self.table())

    def to_json(self) -> str:
        """The settings and the rows as the text of a JSON file."""
        rows = [row.to_dict() for row in self.rows]
        return json.dumps({"settings": self.settings, "rows": rows}, indent=2) + "\n"


def reward_gap(
    model: str | Path | ModelSource | Policy,
    rewards: str | Sequence[str] | None = None,
    etas: Sequence[Eta] | None = None,
    *,
    sampler: SDE | Sequence[SDE] | None = None,
    measurement: Measurement | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> GapReport:
    """Measure the reward gap of any model, base or tuned, with 95 % intervals.

        reward gap  = E r(ODE samples) - E r(SDE_eta samples)
        improvement = E r(ODE samples) - E r(ODE samples of the base model)

    The improvement is measured too where there is a base model: the policy holds an adapter, or it
    was trained and keeps the model before training.

    Args:
        model: a loaded policy, a `ModelSource`, or an embedded name, directory, file or hub id.
        rewards: names, import paths or urls. Default: alignment. A measurement has its own.
        etas: stochasticities to compare with the ODE, in the kernel's own unit. Default: the
            sampler's.
        sampler: the stochastic side: kernel, first_step, guidance and steps, and eta where none is
            listed. The ODE has the same steps and guidance. Several samplers may differ in eta and
            steps. Default: gDDIM at eta 1.2 in 20 steps.
        measurement: prompts, rewards, number of images and seed. Default:
            `Measurement.of(rewards)`, 128 images of emoji-eval.
        on_progress: called with the number of images that just made one step, and the image steps
            of the whole measurement.

    Returns:
        A report whose `print` is the table of `etude gap`. `report["alignment", 1.2].gap` is an
        `Estimate`.

    Raises:
        EtudeError: an eta, a step count, a reward, a model or a prompt file that cannot be used; a
            measurement with base of a model without one; rewards beside a measurement.

    Example:
        >>> import etude
        >>> policy = etude.load_policy("emoji-sd")
        >>> few = etude.Measurement.of(["colorfulness"], num_images=4)
        >>> gap = etude.reward_gap(policy, etas=[0.0, 1.2], sampler=etude.SDE(1.2, steps=2), measurement=few)
        >>> print(gap["colorfulness", 0.0].gap)
        0 [0, 0]
    """
    if measurement is not None and rewards is not None:
        raise EtudeError("a measurement has its own rewards: leave out rewards, or give Measurement.of(rewards, ...).")
    measurement = measurement or Measurement.of(rewards or "alignment")
    samplers = list(sampler) if isinstance(sampler, Sequence) else [sampler or SDE(eta=1.2)]
    if len({(each.kernel, each.first_step, each.guidance) for each in samplers}) != 1:
        raise EtudeError("the samplers of one report differ in eta and steps alone: give the others to another call.")
    runs: dict[ODE, list[SDE]] = {}
    for each in samplers:
        sdes = [replace(each, eta=eta) for eta in etas] if etas else [each]
        runs.setdefault(ODE(each.steps, each.guidance), []).extend(sdes)
    if isinstance(model, str | Path):
        model = ModelSource(model)
    policy = load_source(model) if isinstance(model, ModelSource) else model
    with_base = measures_base(policy, measurement)
    for ode, sdes in runs.items():
        for checked in (ode, *sdes):
            checked.check(policy)
    total = measurement.num_images * sum(ode.steps * (1 + with_base + len(sdes)) for ode, sdes in runs.items())

    def scores(under: Sampler) -> Scores:
        return measurement.scores(measurement.images(policy, under, lambda done: on_progress(done, total)))

    rows = []
    for ode, sdes in runs.items():
        tuned, base = scores(ode), None
        if with_base:
            assert isinstance(policy, TrainablePolicy)
            with policy.reference():
                base = scores(ode)
        for sde in sdes:
            for reward, compared in compare(tuned, scores(sde), base, measurement.clusters).items():
                rows.append(GapRow(**vars(compared), num_steps=sde.steps, eta=sde.eta, reward=reward))
    return GapReport(tuple(rows), _settings(policy, samplers[0], measurement))


def _settings(policy: Policy, sampler: SDE, measurement: Measurement) -> dict[str, Any]:
    model, measured = model_settings(policy), measurement_settings(measurement)
    kernel = sampler.kernel if isinstance(sampler.kernel, str) else sampler.kernel.__name__
    return {
        **{name: model.pop(name) for name in ("model", "lora")},
        "kernel": kernel,
        "first_step": sampler.first_step,
        **model,
        "guidance_scale": sampler.guidance,
        **measured,
    }
