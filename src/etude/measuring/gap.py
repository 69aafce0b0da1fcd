"""The reward gap and the improvement, paired on prompt and initial noise.

    reward gap  = E r(ODE samples of the tuned model) - E r(SDE_eta samples of the tuned model)
    improvement = E r(ODE samples of the tuned model) - E r(ODE samples of the base model)

Every sampler gets the same weights, prompts, steps, guidance and initial noise. The difference is
therefore taken image by image, and its interval is clustered by prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from torch import Tensor

from etude.batching import MicroBatch, Progress, Size, silent
from etude.errors import EtudeError
from etude.measuring.statistics import Estimate, estimate_mean
from etude.policies import Policy, TrainablePolicy
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.prompts import PromptSet, clusters, load_prompts
from etude.rewards import WeightedRewards
from etude.sampling.etas import Eta, eta_text
from etude.sampling.sampler import ODE, SDE, STREAM, Sampler
from etude.terminal import plain_text

Scores = dict[str, np.ndarray]
"""By reward, fp64 `[n]`: one score for each image."""
QUANTITIES = {"ode": "ODE", "sde": "SDE", "gap": "gap (ODE - SDE)", "improvement": "improvement (ODE)"}
"""The estimates of a comparison and their titles; the last two are differences."""


@dataclass(frozen=True)
class Measurement:
    """Prompts, scores and noise: everything that two samplers must share to be compared.

    Args:
        prompts: prompts, of which the first `num_images` are used; image i shows prompt i modulo
            their number.
        score: function from images, prompts and their metadata to every reward's scores.
        num_images: number of images under each sampler.
        seed: key of the noise.
        stream: name of the noise's stream; another name is fresh noise under the same seed.
        batch_size: largest number of images in a network call.
        with_base: whether `reward_gap` measures the improvement too. True refuses a model without
            a base model. Default: where there is one.

    Raises:
        EtudeError: fewer than 2 images, or no prompt.

    Example:
        >>> import etude
        >>> measurement = etude.Measurement.of(["colorfulness"], ["red heart", "pizza"], num_images=4)
        >>> policy = etude.load_policy("emoji-sd")
        >>> measurement.scores(measurement.images(policy, etude.ODE(steps=2)))["colorfulness"].shape
        (4,)
    """

    prompts: PromptSet
    score: Callable[[Tensor, list[str], Mapping[str, list[Any]]], dict[str, Tensor]]
    num_images: int = 128
    seed: int = 0
    stream: str = STREAM
    batch_size: Size | MicroBatch = 32
    with_base: bool | None = None

    def __post_init__(self) -> None:
        if self.num_images < 2:
            raise EtudeError(f"num_images = {self.num_images}: an interval needs at least 2 images.")
        if not self.prompts.texts:
            raise EtudeError("there is no prompt to measure on: give at least one.")
        object.__setattr__(self, "prompts", self.prompts.head(self.num_images))

    @classmethod
    def of(
        cls,
        rewards: str | Sequence[str] = "alignment",
        prompts: str | Sequence[str] | PromptSet = "emoji-eval",
        num_images: int = 128,
        seed: int = 0,
        batch_size: int = 32,
        with_base: bool | None = None,
    ) -> Measurement:
        """The measurement of named rewards, loaded and ready. The other arguments are those of the class.

        Args:
            rewards: names, import paths or urls (`etude.rewards.get`), or one of them.
            prompts: a source that `load_prompts` takes, or prompts; repeats in a list are dropped.
        """
        if isinstance(prompts, str):
            prompts = load_prompts(prompts)
        elif not isinstance(prompts, PromptSet):
            prompts = PromptSet(list(dict.fromkeys(prompts)))
        names = [rewards] if isinstance(rewards, str) else rewards
        score = WeightedRewards(dict.fromkeys(names, 1.0))
        measurement = cls(prompts, score, num_images, seed, batch_size=batch_size, with_base=with_base)
        score.load()
        return measurement

    def shown(self, samples: Iterable[int] | None = None) -> PromptSet:
        """The prompt of each image, or of the images with the indices `samples`."""
        chosen = range(self.num_images) if samples is None else samples
        return self.prompts.select(i % len(self.prompts) for i in chosen)

    @property
    def clusters(self) -> list[int]:
        """The index of each image's prompt: images of one prompt are one cluster, also if its source repeats it."""
        return clusters(self.shown().texts)

    def images(
        self, policy: Policy, sampler: Sampler, on_step: Progress = silent, samples: Sequence[int] | None = None
    ) -> Tensor:
        """Draw uint8 `[n, 3, h, w]`: all images, or those with the indices `samples`."""
        texts, stream, size = self.shown(samples).texts, self.stream, self.batch_size
        return sampler.draw(policy, texts, self.seed, samples=samples, stream=stream, batch_size=size, on_step=on_step)

    def scores(self, images: Tensor, samples: Sequence[int] | None = None) -> Scores:
        """Score all images, or those with the indices `samples`, with every reward."""
        shown = self.shown(samples)
        scores = self.score(images, shown.texts, shown.metadata)
        return {name: values.double().numpy() for name, values in scores.items()}


@dataclass(frozen=True)
class Comparison:
    """One reward under two samplers of one model: the means of ODE, SDE and ODE minus SDE.

    `improvement` is the mean of ODE minus the base model's ODE, None where no base model was measured.
    """

    ode: Estimate
    sde: Estimate
    gap: Estimate
    improvement: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: an estimate by quantity."""
        estimates = ((quantity, getattr(self, quantity)) for quantity in QUANTITIES)
        return {quantity: estimate.to_dict() for quantity, estimate in estimates if estimate is not None}


def compare(ode: Scores, sde: Scores, base: Scores | None, clusters: list[int]) -> dict[str, Comparison]:
    """Compare two samplers, and the base model where its ODE scores are given, by reward.

    All scores are of images from the same noise. `clusters` is the prompt of each image.
    """
    return {
        reward: Comparison(
            estimate_mean(values, clusters),
            estimate_mean(sde[reward], clusters),
            estimate_mean(values - sde[reward], clusters),
            None if base is None else estimate_mean(values - base[reward], clusters),
        )
        for reward, values in ode.items()
    }


def by_quantity(comparisons: Mapping[str, Comparison]) -> dict[str, dict[str, Any]]:
    """Plain values for JSON, by quantity and then reward: `result["gap"]["colorfulness"]["mean"]`."""
    rows = {reward: comparison.to_dict() for reward, comparison in comparisons.items()}
    return {q: {reward: row[q] for reward, row in rows.items()} for q in next(iter(rows.values()), {})}


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
    has_base = isinstance(policy, TrainablePolicy) and policy.has_reference
    if measurement.with_base and not has_base:
        source = getattr(policy, "source", None)
        name = type(policy).__name__ if source is None else f"model '{source.name}'"
        raise EtudeError(
            f"there is no base model to compare {name} with, since it holds no adapter and keeps no model before "
            "training: leave out with_base, or load the base model with lora."
        )
    with_base = has_base if measurement.with_base is None else measurement.with_base
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
    source: ModelSource | None = getattr(policy, "source", None)
    adapter: Path | None = getattr(policy, "adapter", None)
    return {
        "model": type(policy).__name__ if source is None else str(source.name),
        "lora": None if adapter is None else str(adapter),
        "kernel": sampler.kernel if isinstance(sampler.kernel, str) else sampler.kernel.__name__,
        "first_step": sampler.first_step,
        **{name: getattr(source, name, None) for name in ("shift", "resolution", "dtype")},
        "guidance_scale": sampler.guidance,
        "num_images": measurement.num_images,
        "prompts": measurement.prompts.texts,
        "seed": measurement.seed,
    }
