"""The reward gap and the improvement, paired on prompt and initial noise.

    reward gap  = E r(ODE samples of the tuned model) - E r(SDE_eta samples of the tuned model)
    improvement = E r(ODE samples of the tuned model) - E r(ODE samples of the base model)

Every sampler gets the same weights, prompts, steps, guidance and initial noise. The difference is
therefore taken image by image, and its interval is that of a mean of differences, clustered by
prompt: images of one prompt are not independent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from etude.batching import MicroBatch, Progress, silent
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

if TYPE_CHECKING:
    from rich.table import Table

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
        seed: key of the noise, the same for every sampler.
        stream: name of the noise's stream; another name is fresh noise under the same seed.
        batch_size: largest number of images in a network call.

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
    batch_size: int | MicroBatch = 32

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
    ) -> Measurement:
        """The measurement of named rewards, loaded and ready.

        Args:
            rewards: names, import paths or urls (`etude.rewards.get`), or one of them.
            prompts: a source that `load_prompts` takes, or prompts; repeats in a list are dropped.
            num_images: number of images under each sampler, spread evenly over the prompts.
            seed: key of the noise.
            batch_size: largest number of images in a network call.

        Raises:
            EtudeError: a reward or a prompt source that cannot be used.
        """
        if isinstance(prompts, str):
            prompts = load_prompts(prompts)
        elif not isinstance(prompts, PromptSet):
            prompts = PromptSet(list(dict.fromkeys(prompts)))
        names = [rewards] if isinstance(rewards, str) else rewards
        score = WeightedRewards(dict.fromkeys(names, 1.0))
        measurement = cls(prompts, score, num_images, seed, batch_size=batch_size)
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
        chosen = range(self.num_images) if samples is None else samples
        texts, noise = self.shown(chosen).texts, self.stream
        return sampler.draw(
            policy, texts, self.seed, samples=chosen, stream=noise, batch_size=self.batch_size, on_step=on_step
        )

    def scores(self, images: Tensor, samples: Sequence[int] | None = None) -> Scores:
        """Score all images, or those with the indices `samples`, with every reward."""
        shown = self.shown(samples)
        scores = self.score(images, shown.texts, shown.metadata)
        return {name: values.double().numpy() for name, values in scores.items()}


@dataclass(frozen=True)
class Comparison:
    """One reward under two samplers of one model, and against its base model.

    Attributes:
        ode: mean under the ODE.
        sde: mean under the SDE.
        gap: mean of ODE minus SDE, image by image.
        improvement: mean of ODE minus the base model's ODE, image by image. None where no base
            model was measured.
    """

    ode: Estimate
    sde: Estimate
    gap: Estimate
    improvement: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: an estimate by quantity."""
        estimates = {quantity: getattr(self, quantity) for quantity in QUANTITIES}
        return {quantity: estimate.to_dict() for quantity, estimate in estimates.items() if estimate is not None}


def compare(ode: Scores, sde: Scores, base: Scores | None, clusters: list[int]) -> dict[str, Comparison]:
    """Compare two samplers, and the base model where its scores are given, by reward.

    Args:
        ode: scores of the model's ODE images.
        sde: scores of the model's SDE images from the same noise.
        base: scores of the base model's ODE images from the same noise.
        clusters: the prompt of each image.
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
    """Plain values for JSON, by quantity and then by reward:
    `result["gap"]["colorfulness"]["mean"]`.
    """
    table: dict[str, dict[str, Any]] = {}
    for reward, comparison in comparisons.items():
        for quantity, estimate in comparison.to_dict().items():
            table.setdefault(quantity, {})[reward] = estimate
    return table


@dataclass(frozen=True, kw_only=True)
class GapRow(Comparison):
    """A comparison at one step count and eta.

    Attributes:
        num_steps: number of denoising steps of both samplers.
        eta: stochasticity of the SDE, one number or one for each step.
        reward: name of the reward.
    """

    num_steps: int
    eta: Eta
    reward: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"num_steps": self.num_steps, "eta": self.eta, "reward": self.reward, **super().to_dict()}


@dataclass(frozen=True, repr=False)
class GapReport:
    """The result of `reward_gap`; `print` shows it as a table.

    Attributes:
        rows: one for each step count, eta and reward.
        settings: everything needed to measure it again, as plain values.
    """

    rows: tuple[GapRow, ...]
    settings: dict[str, Any]

    def __getitem__(self, key: tuple[Any, ...]) -> GapRow:
        """The row of a reward and an eta, `report["colorfulness", 1.2]`; with several step counts
        also of its steps.

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
        from rich.table import Table

        quantities = [q for q in QUANTITIES if getattr(self.rows[0], q) is not None]
        caption = "means with 95 % intervals, clustered by prompt"
        titles = (QUANTITIES[q] for q in quantities)
        table = Table("steps", "eta", "reward", *titles, "pairs", box=None, caption=caption)
        for row in self.rows:
            cells = [getattr(row, q).format(signed=q in {"gap", "improvement"}) for q in quantities]
            table.add_row(str(row.num_steps), eta_text(row.eta), row.reward, *cells, str(row.gap.n))
        return table

    def __str__(self) -> str:
        return plain_text(self.table())

    __repr__ = __str__

    def to_json(self) -> str:
        """The settings and the rows as the text of a JSON file."""
        rows = [row.to_dict() for row in self.rows]
        return json.dumps({"settings": self.settings, "rows": rows}, indent=2) + "\n"


def reward_gap(
    model: str | Path | ModelSource | Policy,
    rewards: str | Sequence[str] | None = None,
    etas: Sequence[Eta] | None = None,
    steps: Sequence[int] | None = None,
    *,
    sampler: SDE | None = None,
    measurement: Measurement | None = None,
    lora: str | Path | None = None,
    compare_with_base: bool | None = None,
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
        steps: step counts, each for both samplers. Default: the sampler's.
        sampler: the stochastic side: kernel, first_step and guidance, and eta and steps where they
            are not listed. The ODE has the same guidance. Default: gDDIM at eta 1.2 in 20 steps.
        measurement: prompts, rewards, number of images and seed. Default:
            `Measurement.of(rewards)`, 128 images of emoji-eval.
        lora: adapter to load on top of a model that is given by name.
        compare_with_base: measure the improvement. True refuses a model without a base model.
            Default: where there is one.
        on_progress: called with the number of images that just made one step, and the image steps
            of the whole measurement.

    Returns:
        A report whose `print` is the table of `etude gap`. `report["alignment", 1.2].gap` is an
        `Estimate`.

    Raises:
        EtudeError: an eta, a step count, a reward, a model or a prompt file that cannot be used; a
            lora for a policy that is loaded already; rewards beside a measurement.

    Example:
        >>> import etude
        >>> policy = etude.load_policy("emoji-sd")
        >>> few = etude.Measurement.of(["colorfulness"], num_images=4)
        >>> gap = etude.reward_gap(policy, etas=[0.0, 1.2], steps=[2], measurement=few)
        >>> print(gap["colorfulness", 0.0].gap)
        0 [0, 0]
    """
    if measurement is not None and rewards is not None:
        raise EtudeError("a measurement has its own rewards: leave out rewards, or give Measurement.of(rewards, ...).")
    measurement = measurement or Measurement.of(rewards or "alignment")
    sampler = sampler or SDE(eta=1.2)
    runs = [
        (ODE(count, sampler.guidance), [replace(sampler, eta=eta, steps=count) for eta in etas or [sampler.eta]])
        for count in steps or [sampler.steps]
    ]
    policy = _policy(model, lora)
    has_base = isinstance(policy, TrainablePolicy) and policy.has_reference
    if compare_with_base and not has_base:
        raise EtudeError(
            f"there is no base model to compare {_name(policy)} with, since it holds no adapter and keeps no model before "
            "training: leave out compare_with_base, or load the base model with lora."
        )
    with_base = has_base if compare_with_base is None else compare_with_base
    for ode, sdes in runs:
        for each in (ode, *sdes):
            each.check(policy)
    total = measurement.num_images * sum(ode.steps * (1 + with_base + len(sdes)) for ode, sdes in runs)

    def scores(under: Sampler) -> Scores:
        return measurement.scores(measurement.images(policy, under, lambda done: on_progress(done, total)))

    rows = []
    for ode, sdes in runs:
        tuned, base = scores(ode), None
        if with_base:
            assert isinstance(policy, TrainablePolicy)
            with policy.reference():
                base = scores(ode)
        for sde in sdes:
            compared = compare(tuned, scores(sde), base, measurement.clusters)
            rows += [
                GapRow(**vars(each), num_steps=sde.steps, eta=sde.eta, reward=reward)
                for reward, each in compared.items()
            ]
    return GapReport(tuple(rows), _settings(policy, sampler, measurement))


def _policy(model: str | Path | ModelSource | Policy, lora: str | Path | None) -> Policy:
    """The model itself, or loaded."""
    if isinstance(model, Policy | ModelSource) and lora is not None:
        place = "ModelSource" if isinstance(model, ModelSource) else "load_policy"
        raise EtudeError(
            f"lora = '{lora}' is for a model that is given by name, and would not be loaded here: give it to {place}."
        )
    if isinstance(model, Policy):
        return model
    return load_source(model if isinstance(model, ModelSource) else ModelSource(model, lora=lora))


def _name(policy: Policy) -> str:
    source = getattr(policy, "source", None)
    return type(policy).__name__ if source is None else f"model '{source.name}'"


def _settings(policy: Policy, sampler: SDE, measurement: Measurement) -> dict[str, Any]:
    """Everything needed to measure again, as plain values."""
    source: ModelSource | None = getattr(policy, "source", None)
    adapter: Path | None = getattr(policy, "adapter", None)
    return {
        "model": type(policy).__name__ if source is None else str(source.name),
        "lora": None if adapter is None else str(adapter),
        "kernel": sampler.kernel if isinstance(sampler.kernel, str) else sampler.kernel.__name__,
        "first_step": sampler.first_step,
        "shift": None if source is None else source.shift,
        "resolution": None if source is None else source.resolution,
        "dtype": None if source is None else source.dtype,
        "guidance_scale": sampler.guidance,
        "num_images": measurement.num_images,
        "prompts": measurement.prompts.texts,
        "seed": measurement.seed,
    }
