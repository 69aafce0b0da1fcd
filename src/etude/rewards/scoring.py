"""Calling rewards, and holding what they return to the contract: float [n], finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from etude.errors import EtudeError, brief
from etude.rewards.registry import Reward, get

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTED_SUM = "weighted_sum"
"""The name under which the weighted sum of several raw rewards is reported."""


def score(
    name: str,
    reward: Reward,
    images: Tensor,
    prompts: list[str],
    metadata: Mapping[str, Any] | None = None,
    *,
    offset: int = 0,
) -> Tensor:
    """One reward's scores, float32 [n] on the CPU, checked.

    Args:
        name: what the reward is called in errors.
        images: uint8 [n, 3, h, w].
        prompts: n texts.
        metadata: by name, a list of n entries; passed on as keyword arguments.
        offset: index of the first image in the whole batch, so that errors count in the batch and not in a slice of it.

    Raises:
        EtudeError: if images and prompts do not match; if the reward raises (its message repeated, its error
            chained); if it returns anything but a floating tensor [n]; or if a score is NaN or infinite in float32 (the
            sample and its prompt are named).
    """
    import torch

    _check_images(images, prompts)
    try:
        with torch.no_grad():
            scores = reward(images, prompts, **(metadata or {}))
    except Exception as error:  # a reward is the user's code: whatever it raises has to say which reward it was
        raise EtudeError(
            f"reward '{name}' failed on {_batch(offset, prompts)}: {type(error).__name__}: {brief(error)}"
        ) from error
    if not isinstance(scores, torch.Tensor):
        raise EtudeError(
            f"reward '{name}' returned {type(scores).__name__}; "
            f"it must return a float32 tensor of shape [{len(prompts)}]."
        )
    if scores.shape != (len(prompts),) or not scores.is_floating_point():
        raise EtudeError(
            f"reward '{name}' returned a tensor of shape {list(scores.shape)} and {scores.dtype} "
            f"for {_batch(offset, prompts)}; it must return one float32 score per image, shape [{len(prompts)}]."
        )
    scores = scores.detach().to("cpu", torch.float32, copy=True)
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        more = f" ({len(bad)} of {len(prompts)} scores are not finite)" if len(bad) > 1 else ""
        raise EtudeError(
            f"reward '{name}' returned {scores[bad[0]].item()} for sample {offset + bad[0]}, "
            f"prompt {prompts[bad[0]]!r}{more}; every score must be a finite number."
        )
    return scores


def score_all(
    rewards: Iterable[str], images: Tensor, prompts: list[str], metadata: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """The scores of several rewards by name (or import path), each float32 [n] and checked as by `score`.

    Raises:
        EtudeError: if a name is unknown, and whatever `score` raises.
    """
    return {name: score(name, get(name), images, prompts, metadata) for name in rewards}


class WeightedRewards:
    """Several rewards with their weights, scored apart and summed only when asked.

    They are kept apart because each reward is normalised within its group before the weighted sum of the advantages is
    taken; a sum of raw rewards would let the one with the widest scale decide. `combine` is that sum, for either.

    Args:
        weights: reward name (or import path) to weight, at least one.
        held_out: names that are measured in evaluation and never trained on.

    Raises:
        EtudeError: if a name is unknown or there is no weight.
    """

    def __init__(self, weights: Mapping[str, float], held_out: Iterable[str] = ()) -> None:
        if not weights:
            raise EtudeError("there is no reward to train on: give at least one name with its weight.")
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self.held_out = tuple(name for name in dict.fromkeys(held_out) if name not in self.weights)
        for name in (*self.weights, *self.held_out):
            get(name)  # an unknown name is an error now, not after the first rollout

    def load(self) -> None:
        """Lets every reward that has a method `load` read its weights or reach its server: a failure costs no rollout then.

        Raises:
            EtudeError: naming the reward that failed.
        """
        for name in (*self.weights, *self.held_out):
            load = getattr(get(name), "load", None)
            if load is None:
                continue
            try:
                load()
            except Exception as error:  # a reward is the user's code: whatever it raises has to say which reward it was
                raise EtudeError(f"reward '{name}' cannot be used: {brief(error)}") from error

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Scores of the trained rewards, each float32 [n]."""
        return score_all(self.weights, images, prompts, metadata)

    def evaluate(
        self, images: Tensor, prompts: list[str], metadata: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Scores of trained and held-out rewards, float32 [n]; with several trained ones also their `weighted_sum`."""
        scores = score_all((*self.weights, *self.held_out), images, prompts, metadata)
        if len(self.weights) > 1:
            scores[WEIGHTED_SUM] = self.combine(scores)
        return scores

    def combine(self, values: Mapping[str, Tensor]) -> Tensor:
        """sum_k weight_k values_k over the trained rewards: raw scores or normalised advantages, any shape."""
        terms = [weight * values[name] for name, weight in self.weights.items()]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total


def _check_images(images: Tensor, prompts: list[str]) -> None:
    import torch

    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise EtudeError(f"rewards take uint8 images [n, 3, h, w], not {images.dtype} of shape {list(images.shape)}.")
    if len(prompts) != len(images):
        raise EtudeError(
            f"there are {len(images)} images but {len(prompts)} prompts; rewards take one prompt per image."
        )


def _batch(offset: int, prompts: list[str]) -> str:
    if not prompts:
        return "an empty batch"
    return f"samples {offset} to {offset + len(prompts) - 1} (the first prompt is {prompts[0]!r})"
