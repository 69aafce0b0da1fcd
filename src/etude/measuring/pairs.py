"""Paired measurements: the prompts, scores and noise that two samplers share, and their differences.

Every sampler gets the same weights, prompts and initial noise. A difference is therefore taken image
by image, and its interval is clustered by prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from etude.batching import MicroBatch, Progress, Size, silent
from etude.errors import EtudeError
from etude.measuring.statistics import Estimate, estimate_mean
from etude.policies import Policy, TrainablePolicy
from etude.policies.source import ModelSource
from etude.prompts import PromptSet, clusters, load_prompts
from etude.rewards import WeightedRewards, check_group_size
from etude.sampling.sampler import STREAM, Sampler

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
        images_per_prompt: number of images of each prompt; the first `num_images /
            images_per_prompt` prompts are used. Default: as few as the prompts allow.

    Raises:
        EtudeError: fewer than 2 images, no prompt, or a number of images that `images_per_prompt`
            does not divide.

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
    images_per_prompt: int | None = None

    def __post_init__(self) -> None:
        if self.num_images < 2:
            raise EtudeError(f"num_images = {self.num_images}: an interval needs at least 2 images.")
        if not self.prompts.texts:
            raise EtudeError("there is no prompt to measure on: give at least one.")
        each = self.images_per_prompt or 1
        if each < 1 or self.num_images % each:
            raise EtudeError(f"num_images = {self.num_images} is not a multiple of images_per_prompt = {each}.")
        object.__setattr__(self, "prompts", self.prompts.head(self.num_images // each))

    @classmethod
    def of(
        cls,
        rewards: str | Sequence[str] = "alignment",
        prompts: str | Sequence[str] | PromptSet = "emoji-eval",
        num_images: int = 128,
        seed: int = 0,
        batch_size: int = 32,
        with_base: bool | None = None,
        images_per_prompt: int | None = None,
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
        measurement = cls(prompts, score, num_images, seed, STREAM, batch_size, with_base, images_per_prompt)
        check_group_size(names, fewest_images(measurement.prompts, num_images), "images_per_prompt")
        score.load()
        return measurement

    def shown(self, samples: Iterable[int] | None = None) -> PromptSet:
        """The prompt of each image, or of the images with the indices `samples`."""
        return prompts_shown(self.prompts, range(self.num_images) if samples is None else samples)

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


def prompts_shown(prompts: PromptSet, samples: Iterable[int]) -> PromptSet:
    """The prompts of the images with the indices `samples`: image i shows prompt i modulo their number."""
    return prompts.select(i % len(prompts) for i in samples)


def fewest_images(prompts: PromptSet, num_images: int) -> int:
    """The smallest number of images that a prompt has among `num_images` images of all prompts."""
    return min(Counter(prompts_shown(prompts, range(num_images)).texts).values())


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


def measures_base(policy: Policy, measurement: Measurement) -> bool:
    """Whether the base model is measured too: there is one, and the measurement does not leave it out.

    Raises:
        EtudeError: the measurement asks for the base model, and the policy has none.
    """
    has_base = isinstance(policy, TrainablePolicy) and policy.has_reference
    if measurement.with_base and not has_base:
        source = getattr(policy, "source", None)
        name = type(policy).__name__ if source is None else f"model '{source.name}'"
        raise EtudeError(
            f"there is no base model to compare {name} with, since it holds no adapter and keeps no model before "
            "training: leave out with_base, or load the base model with lora."
        )
    return has_base if measurement.with_base is None else measurement.with_base


def model_settings(policy: Policy) -> dict[str, Any]:
    """Plain values that say which model was measured, and how it was held."""
    source: ModelSource | None = getattr(policy, "source", None)
    adapter: Path | None = getattr(policy, "adapter", None)
    return {
        "model": type(policy).__name__ if source is None else str(source.name),
        "lora": None if adapter is None else str(adapter),
        **{name: getattr(source, name, None) for name in ("shift", "resolution", "dtype")},
    }


def measurement_settings(measurement: Measurement) -> dict[str, Any]:
    """Plain values of a measurement: number of images, prompts and seed."""
    each = {} if measurement.images_per_prompt is None else {"images_per_prompt": measurement.images_per_prompt}
    settings = {"num_images": measurement.num_images, **each}
    return {**settings, "prompts": measurement.prompts.texts, "seed": measurement.seed}
