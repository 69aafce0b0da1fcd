"""Calling rewards, and holding what they return to the contract: float [n], finite."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from etude.errors import EtudeError, brief
from etude.rewards.background import InTurn
from etude.rewards.reward import WEIGHTED_SUM, Reward, get

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images to be scored, and what is known of them.

    Attributes:
        images: uint8 `[n, 3, h, w]`.
        prompts: n texts.
        metadata: by name, a list of n entries.
        groups: the group of each image, for rewards that compare images of a group. Default: images of equal prompts.
        offset: index of the first image in the whole batch, for errors.

    Raises:
        EtudeError: images and prompts do not match, or the groups are not one an image.
    """

    images: Tensor
    prompts: list[str]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    groups: Sequence[int] | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        _check_images(self.images, self.prompts)
        if self.groups is not None and len(self.groups) != len(self.prompts):
            raise EtudeError(f"there are {len(self.prompts)} images but {len(self.groups)} groups: give one an image.")

    def arguments(self, function: Callable[..., Any], whole_groups: bool) -> tuple[Tensor, list[str], dict[str, Any]]:
        """Images, prompts and keywords for one call of a reward, copies of its own: a reward may work in place.

        Args:
            function: what is called; it gets those keywords of the metadata that it takes.
            whole_groups: whether it gets `groups`, too.
        """
        keywords = copy.deepcopy(dict(_taken(function, self.metadata)))
        if whole_groups:
            first: dict[str, int] = {}
            same = [first.setdefault(prompt, i) for i, prompt in enumerate(self.prompts)]
            keywords["groups"] = list(same if self.groups is None else self.groups)
        return self.images.clone(), list(self.prompts), keywords


def score_one(
    name: str,
    reward: Reward,
    images: Tensor,
    prompts: list[str],
    metadata: Mapping[str, Any] | None = None,
    *,
    groups: Sequence[int] | None = None,
    offset: int = 0,
) -> Tensor:
    """One reward's scores, float32 [n] on the CPU, checked.

    Args:
        name: what the reward is called in errors.
        images: uint8 [n, 3, h, w].
        prompts: n texts.
        metadata: by name, a list of n entries; passed on as keyword arguments, of which the reward gets those that it takes.
        groups: the group of each image, for a reward that compares them. Default: images of equal prompts.
        offset: index of the first image in the whole batch, so that errors count in the batch and not in a slice of it.

    Raises:
        EtudeError: if images and prompts do not match; if the reward raises (its message repeated, its error
            chained); if it returns anything but n numbers (a floating
            tensor [n], or a list, tuple or array of n numbers); or if a score is NaN or infinite in float32 (the
            sample and its prompt are named).
    """
    batch = Batch(images, prompts, metadata or {}, groups, offset)
    with _named(name, prompts, offset):
        scores = _call(reward, batch)
    return _checked(name, scores, prompts, offset)


def score(
    rewards: str | Iterable[str], images: Tensor, prompts: list[str], metadata: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Score images by one or several rewards.

    Args:
        rewards: names, import paths or urls, or one of them.
        images: uint8 `[n, 3, h, w]`.
        prompts: n texts.
        metadata: by name, a list of n entries.

    Returns:
        By reward, float32 `[n]` on the CPU, checked as by `score_one`.

    Raises:
        EtudeError: a name is unknown, and whatever `score_one` raises.

    Example:
        >>> import etude, torch
        >>> black = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
        >>> etude.score(["colorfulness"], black, ["night", "coal"])
        {'colorfulness': tensor([0., 0.])}
    """
    names = [rewards] if isinstance(rewards, str) else rewards
    return {name: score_one(name, get(name), images, prompts, metadata) for name in names}


def revisions(rewards: Iterable[str]) -> dict[str, dict[str, str]]:
    """What the rewards that have read something from a hub have read: by their name, each repository's commit."""
    found: dict[str, dict[str, str]] = {name: getattr(get(name), "revisions", dict)() for name in rewards}
    return {name: commits for name, commits in found.items() if commits}


class Scoring:
    """Scores that are under way: what `WeightedRewards.start` returns.

    Attributes:
        futures: by the reward's name, what it will have returned.
    """

    def __init__(self, futures: dict[str, Any], prompts: list[str], offset: int = 0) -> None:
        self.futures: dict[str, Future[Any]] = futures
        self._prompts, self._offset = prompts, offset

    def done(self) -> bool:
        """Whether `result` would return, or raise, at once."""
        return all(future.done() for future in self.futures.values())

    def cancel(self) -> None:
        """Ends the requests that are under way, and what has not begun; a local reward that has begun runs to its end unheard."""
        for future in self.futures.values():
            if future is not None:
                future.cancel()

    def result(self, timeout: float | None = None) -> dict[str, Tensor]:
        """Waits for the scores, by the reward's name float32 [n] on the CPU, checked as by `score_one`.

        The first reward that fails ends the waiting, and the requests of the others. A remote reward ends by its own time-outs.

        Args:
            timeout: seconds after which it is an error; None waits for as long as it takes.

        Raises:
            EtudeError: naming the reward that failed, returned what it should not, or did not end in time.
        """
        try:
            finished = wait(self.futures.values(), timeout, FIRST_EXCEPTION).done
            scores = {}
            for name, future in sorted(self.futures.items(), key=lambda item: item[1] not in finished):
                if future not in finished:
                    raise EtudeError(f"reward '{name}' has not finished after {timeout:g} s.")
                with _named(name, self._prompts, self._offset):
                    found = future.result()
                scores[name] = _checked(name, found, self._prompts, self._offset)
        except BaseException:
            self.cancel()
            raise
        return {name: scores[name] for name in self.futures}


class WeightedRewards:
    """Several rewards with their weights, scored apart and summed only when asked.

    They are kept apart because each reward is normalised within its group before the weighted sum of the advantages is
    taken; a sum of raw rewards would let the one with the widest scale decide. `combine` is that sum, for either.

    Args:
        weights: reward name (or import path) to weight, at least one.
        held_out: names that are measured in evaluation and never trained on.
        offload: rewards with a method `offload` get it called after each use: their networks wait on the CPU.

    Raises:
        EtudeError: if a name is unknown or there is no weight.
    """

    def __init__(self, weights: Mapping[str, float], held_out: Iterable[str] = (), *, offload: bool = False) -> None:
        if not weights:
            raise EtudeError("there is no reward to train on: give at least one name with its weight.")
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self.held_out = tuple(name for name in dict.fromkeys(held_out) if name not in self.weights)
        self.offload, self._turns = offload, InTurn()
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

    @property
    def whole_groups(self) -> bool:
        """Whether some reward compares the images of a group, and must be given all of them in one call."""
        return any(getattr(get(name), "whole_groups", False) for name in (*self.weights, *self.held_out))

    def __call__(
        self,
        images: Tensor,
        prompts: list[str],
        metadata: Mapping[str, Any] | None = None,
        groups: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Scores of the trained rewards, each float32 [n]. Remote rewards are asked first, and the others computed meanwhile."""
        return self._begin(self.weights, Batch(images, prompts, metadata or {}, groups), here=True).result()

    def start(
        self,
        images: Tensor,
        prompts: list[str],
        metadata: Mapping[str, Any] | None = None,
        *,
        groups: Sequence[int] | None = None,
        held_out: bool = False,
        offset: int = 0,
    ) -> Scoring:
        """Begins to score and returns at once: rewards with a method `submit` score by themselves, the others on a thread.

        That thread takes its calls, also those of later starts, one after the other in their order, so no two local rewards run
        side by side. Neither the images nor the metadata may change until the scores are there.

        Args:
            images: uint8 [n, 3, h, w].
            prompts: n texts.
            metadata: by name, a list of n entries.
            groups: the group of each image; a group must be whole. Default: images of equal prompts.
            held_out: measure the held-out rewards too.
            offset: index of the first image in the whole batch, for errors.

        Raises:
            EtudeError: if images and prompts do not match; anything else is raised by `Scoring.result`.
        """
        names = (*self.weights, *(self.held_out if held_out else ()))
        return self._begin(names, Batch(images, prompts, metadata or {}, groups, offset), here=False)

    def evaluate(
        self,
        images: Tensor,
        prompts: list[str],
        metadata: Mapping[str, Any] | None = None,
        groups: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Scores of trained and held-out rewards, float32 [n]; with several trained ones also their `weighted_sum`."""
        batch = Batch(images, prompts, metadata or {}, groups)
        return self.summed(self._begin((*self.weights, *self.held_out), batch, here=True).result())

    def _begin(self, names: Iterable[str], batch: Batch, here: bool) -> Scoring:
        """Starts the rewards that score by themselves, then computes the others: here and now, or on the thread."""
        scoring = Scoring(dict.fromkeys(names), batch.prompts, batch.offset)
        try:
            for name in [name for name in scoring.futures if not self._submit(name, scoring, batch)]:
                work = partial(self._compute, name, batch)
                scoring.futures[name] = _done(work) if here else self._turns.submit(work)
        except BaseException:
            scoring.cancel()
            raise
        return scoring

    def _submit(self, name: str, scoring: Scoring, batch: Batch) -> bool:
        """Starts a reward that scores by itself; whether it is one."""
        reward = get(name)
        submit = getattr(reward, "submit", None)
        if submit is not None:
            with _named(name, batch.prompts, batch.offset):
                images, prompts, keywords = batch.arguments(submit, getattr(reward, "whole_groups", False))
                scoring.futures[name] = submit(images, prompts, **keywords)
        return submit is not None

    def _compute(self, name: str, batch: Batch) -> Tensor:
        reward = get(name)
        with _named(name, batch.prompts, batch.offset):
            try:
                return _call(reward, batch)
            finally:
                if self.offload and hasattr(reward, "offload"):
                    reward.offload()

    def summed(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """The scores, and with several trained rewards also their `weighted_sum`."""
        return scores if len(self.weights) == 1 else {**scores, WEIGHTED_SUM: self.combine(scores)}

    def combine(self, values: Mapping[str, Tensor]) -> Tensor:
        """sum_k weight_k values_k over the trained rewards: raw scores or normalised advantages, any shape."""
        terms = [weight * values[name] for name, weight in self.weights.items()]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total


def _call(reward: Reward, batch: Batch) -> Any:
    import torch

    called = reward.forward if isinstance(reward, torch.nn.Module) else reward
    images, prompts, keywords = batch.arguments(called, getattr(reward, "whole_groups", False))
    with torch.no_grad():
        return reward(images, prompts, **keywords)


def _taken(function: Callable[..., Any], metadata: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Of the metadata, what the function has keywords for: all if it takes `**metadata` or does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a built-in function
        return metadata or {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return metadata or {}
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: values for name, values in (metadata or {}).items() if name in named}


def _done(work: Callable[[], Any]) -> Future[Any]:
    """A future that has the result already; what `work` raises is raised here."""
    future: Future[Any] = Future()
    future.set_result(work())
    return future


@contextmanager
def _named(name: str, prompts: list[str], offset: int) -> Iterator[None]:
    """Whatever a reward, which is the user's code, raises has to say which reward it was, once."""
    try:
        yield
    except _RewardError:
        raise
    except (Exception, SystemExit) as error:  # exit() would end the run as if it had succeeded
        raise _RewardError(
            f"reward '{name}' failed on {_batch(offset, prompts)}: {type(error).__name__}: {brief(error)}"
        ) from error


class _RewardError(EtudeError):
    """A reward's own failure, named already."""


def _checked(name: str, scores: Any, prompts: list[str], offset: int) -> Tensor:
    """What a reward returned, as float32 [n] on the CPU."""
    import torch

    found = scores if isinstance(scores, torch.Tensor) else _numbers(scores)
    if found is None or found.is_nested:
        raise EtudeError(
            f"reward '{name}' returned {'a nested tensor' if hasattr(scores, 'is_nested') else type(scores).__name__}; "
            f"it must return a float32 tensor of shape [{len(prompts)}], or as many numbers."
        )
    scores = found
    if scores.shape != (len(prompts),) or not scores.is_floating_point():
        raise EtudeError(
            f"reward '{name}' returned a tensor of shape {list(scores.shape)} and {scores.dtype} "
            f"for {_batch(offset, prompts)}; it must return one float32 score per image, shape [{len(prompts)}]."
        )
    try:
        scores = scores.detach().to("cpu", torch.float32, copy=True).to_dense()
    except (RuntimeError, NotImplementedError) as error:  # a meta tensor, a nested one
        raise EtudeError(
            f"reward '{name}' returned a tensor without plain numbers ({brief(error, 100)}); return a dense one."
        ) from error
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        more = f" ({len(bad)} of {len(prompts)} scores are not finite)" if len(bad) > 1 else ""
        raise EtudeError(
            f"reward '{name}' returned {scores[bad[0]].item()} for sample {offset + bad[0]}, "
            f"prompt {prompts[bad[0]]!r}{more}; every score must be a finite number."
        )
    return scores


def _numbers(scores: Any) -> Tensor | None:
    """A list, tuple or array of numbers as a float64 tensor; None for anything else."""
    import numpy as np
    import torch

    if not isinstance(scores, list | tuple | np.ndarray):
        return None
    try:
        array = np.asarray([v.item() if isinstance(v, torch.Tensor) else v for v in scores])
    except (TypeError, ValueError, RuntimeError, OverflowError):  # ragged, or a tensor of several numbers
        return None
    return torch.from_numpy(array.astype(np.float64)) if array.dtype.kind in "fiub" else None


def _check_images(images: Tensor, prompts: list[str]) -> None:
    import torch

    if not isinstance(images, torch.Tensor):
        raise EtudeError(f"rewards take uint8 images [n, 3, h, w] as a tensor, not {type(images).__name__}.")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise EtudeError(f"rewards take uint8 images [n, 3, h, w], not {images.dtype} of shape {list(images.shape)}.")
    if len(prompts) != len(images):
        raise EtudeError(
            f"there are {len(images)} images but {len(prompts)} prompts; rewards take one prompt per image."
        )


def _batch(offset: int, prompts: list[str]) -> str:
    if not prompts:
        return "an empty batch"
    return f"samples {offset} to {offset + len(prompts) - 1} (the first prompt is {prompts[0]!r})"
