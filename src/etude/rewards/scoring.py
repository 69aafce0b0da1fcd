"""Calls of rewards, with a check that each returns one finite float per image."""

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
    """Images to be scored, with their prompts, metadata and groups.

    Attributes:
        images: uint8 `[n, 3, h, w]`.
        prompts: n texts.
        metadata: by name, a list of n entries.
        groups: the group of each image, for rewards that compare images of a group. Default: images
            of equal prompts.
        offset: index of the first image in the whole batch, for errors.

    Raises:
        EtudeError: images and prompts do not match, or there is not one group per image.
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
        """Images, prompts and keywords for one call of a reward.

        They are copies, because a reward may work in place.

        Args:
            function: the function to call; the keywords are the metadata that it accepts.
            whole_groups: whether `groups` is a keyword, too.
        """
        keywords = copy.deepcopy(dict(_select_keywords(function, self.metadata)))
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
    """One reward's scores, float32 `[n]` on the CPU, checked.

    Args:
        name: the name of the reward in errors.
        images: uint8 `[n, 3, h, w]`.
        prompts: n texts.
        metadata: by name, a list of n entries; the reward gets those for which it has a keyword.
        groups: the group of each image, for a reward that compares them. Default: images of equal
            prompts.
        offset: index of the first image in the whole batch, so that errors count in the batch and
            not in a slice of it.

    Raises:
        EtudeError: images and prompts do not match; the reward raises (its message is repeated, its
            error chained); it returns anything but n numbers (a floating tensor `[n]`, or a list,
            tuple or array of n numbers); or a score is NaN or infinite in float32 (the sample and
            its prompt are named).
    """
    batch = Batch(images, prompts, metadata or {}, groups, offset)
    with _naming(name, prompts, offset):
        scores = _call(reward, batch)
    return _check_scores(name, scores, prompts, offset)


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
        EtudeError: a name is unknown, or as in `score_one`.

    Example:
        >>> import etude, torch
        >>> black = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
        >>> etude.score(["colorfulness"], black, ["night", "coal"])
        {'colorfulness': tensor([0., 0.])}
    """
    names = [rewards] if isinstance(rewards, str) else rewards
    return {name: score_one(name, get(name), images, prompts, metadata) for name in names}


def revisions(rewards: Iterable[str]) -> dict[str, dict[str, str]]:
    """By reward name, the commit of each hub repository that the reward has read."""
    by_name: dict[str, dict[str, str]] = {name: getattr(get(name), "revisions", dict)() for name in rewards}
    return {name: commits for name, commits in by_name.items() if commits}


class Scoring:
    """Scores that are being computed, as `WeightedRewards.start` returns them.

    Attributes:
        futures: by reward name, a future of its scores.
    """

    def __init__(self, futures: dict[str, Any], prompts: list[str], offset: int = 0) -> None:
        self.futures: dict[str, Future[Any]] = futures
        self._prompts, self._offset = prompts, offset

    def done(self) -> bool:
        """Whether `result` would return, or raise, at once."""
        return all(future.done() for future in self.futures.values())

    def cancel(self) -> None:
        """Cancels running requests, and calls that have not started.

        A local reward that has started runs to its end; its scores are dropped.
        """
        for future in self.futures.values():
            if future is not None:
                future.cancel()

    def result(self, timeout: float | None = None) -> dict[str, Tensor]:
        """Waits for the scores: by reward name, float32 `[n]` on the CPU.

        They are checked as by `score_one`. The first reward that fails ends the wait and cancels
        the others. A remote reward has its own time-outs.

        Args:
            timeout: seconds after which a missing score is an error. Default: no limit.

        Raises:
            EtudeError: a reward failed, returned something other than n finite numbers, or did not
                end in time; the error names it.
        """
        try:
            finished = wait(self.futures.values(), timeout, FIRST_EXCEPTION).done
            scores = {}
            for name, future in sorted(self.futures.items(), key=lambda item: item[1] not in finished):
                if future not in finished:
                    raise EtudeError(f"reward '{name}' has not finished after {timeout:g} s.")
                with _naming(name, self._prompts, self._offset):
                    values = future.result()
                scores[name] = _check_scores(name, values, self._prompts, self._offset)
        except BaseException:
            self.cancel()
            raise
        return {name: scores[name] for name in self.futures}


class WeightedRewards:
    """Several rewards with their weights; scores stay separate until `combine` sums them.

    Each reward is normalised within its group before the weighted sum of the advantages is taken.
    In a sum of raw rewards the reward with the widest scale would decide. `combine` computes the
    weighted sum of either.

    Args:
        weights: reward name (or import path) to weight, at least one.
        held_out: names that are measured in evaluation and never trained on.
        offload: whether to call the method `offload` of each reward that has one after each use;
            its network then waits on the CPU. Default: False.

    Raises:
        EtudeError: a name is unknown, or there is no weight.
    """

    def __init__(self, weights: Mapping[str, float], held_out: Iterable[str] = (), *, offload: bool = False) -> None:
        if not weights:
            raise EtudeError("there is no reward to train on: give at least one name with its weight.")
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self.held_out = tuple(name for name in dict.fromkeys(held_out) if name not in self.weights)
        self.offload, self._turns = offload, InTurn()
        for name in (*self.weights, *self.held_out):
            get(name)  # an unknown name is an error here, and not after the first rollout

    def load(self) -> None:
        """Calls the method `load` of each reward that has one, to read weights or reach a server.

        A failure then costs no rollout.

        Raises:
            EtudeError: a reward failed to load; the error names it.
        """
        for name in (*self.weights, *self.held_out):
            load = getattr(get(name), "load", None)
            if load is None:
                continue
            try:
                load()
            except Exception as error:  # a user's code raises anything; the error names the reward
                raise EtudeError(f"reward '{name}' cannot be used: {brief(error)}") from error

    @property
    def whole_groups(self) -> bool:
        """Whether some reward compares the images of a group, and needs all of them in one call."""
        return any(getattr(get(name), "whole_groups", False) for name in (*self.weights, *self.held_out))

    def __call__(
        self,
        images: Tensor,
        prompts: list[str],
        metadata: Mapping[str, Any] | None = None,
        groups: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Scores of the trained rewards, each float32 `[n]`.

        Requests of remote rewards are sent first, and the other rewards are computed meanwhile.
        """
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
        """Starts scoring and returns at once.

        Rewards with a method `submit` score by themselves, and the others in the background. The
        background takes its calls one after the other in their order, also over several starts, so
        no two local rewards run side by side. The images and the metadata must not change until the
        scores are there.

        Args:
            images: uint8 `[n, 3, h, w]`.
            prompts: n texts.
            metadata: by name, a list of n entries.
            groups: the group of each image; a group must be whole. Default: images of equal
                prompts.
            held_out: whether to measure the held-out rewards too. Default: False.
            offset: index of the first image in the whole batch, for errors.

        Raises:
            EtudeError: images and prompts do not match; `Scoring.result` raises any other error.
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
        """Scores of trained and held-out rewards, float32 `[n]`.

        The scores of several trained rewards come with their `weighted_sum`.
        """
        batch = Batch(images, prompts, metadata or {}, groups)
        return self.summed(self._begin((*self.weights, *self.held_out), batch, here=True).result())

    def _begin(self, names: Iterable[str], batch: Batch, here: bool) -> Scoring:
        """Starts the rewards with `submit`, then runs the others: here, or in the background."""
        scoring = Scoring(dict.fromkeys(names), batch.prompts, batch.offset)
        try:
            for name in [name for name in scoring.futures if not self._submit(name, scoring, batch)]:
                work = partial(self._compute, name, batch)
                scoring.futures[name] = _run_now(work) if here else self._turns.submit(work)
        except BaseException:
            scoring.cancel()
            raise
        return scoring

    def _submit(self, name: str, scoring: Scoring, batch: Batch) -> bool:
        """Starts a reward that has a method `submit`; returns whether it has one."""
        reward = get(name)
        submit = getattr(reward, "submit", None)
        if submit is not None:
            with _naming(name, batch.prompts, batch.offset):
                images, prompts, keywords = batch.arguments(submit, getattr(reward, "whole_groups", False))
                scoring.futures[name] = submit(images, prompts, **keywords)
        return submit is not None

    def _compute(self, name: str, batch: Batch) -> Tensor:
        reward = get(name)
        with _naming(name, batch.prompts, batch.offset):
            try:
                return _call(reward, batch)
            finally:
                if self.offload and hasattr(reward, "offload"):
                    reward.offload()

    def summed(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """The scores, and the `weighted_sum` of several trained rewards."""
        return scores if len(self.weights) == 1 else {**scores, WEIGHTED_SUM: self.combine(scores)}

    def combine(self, values: Mapping[str, Tensor]) -> Tensor:
        """sum_k weight_k values_k over the trained rewards: scores or advantages of any shape."""
        terms = [weight * values[name] for name, weight in self.weights.items()]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total


def _call(reward: Reward, batch: Batch) -> Any:
    import torch

    function = reward.forward if isinstance(reward, torch.nn.Module) else reward
    images, prompts, keywords = batch.arguments(function, getattr(reward, "whole_groups", False))
    with torch.no_grad():
        return reward(images, prompts, **keywords)


def _select_keywords(function: Callable[..., Any], metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metadata for which a function has keywords, or all if it has `**metadata`.

    All metadata are returned for a function without a signature, too.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a built-in function
        return metadata
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return metadata
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: values for name, values in metadata.items() if name in names}


def _run_now(work: Callable[[], Any]) -> Future[Any]:
    """A finished future of `work()`; raises what `work` raises."""
    future: Future[Any] = Future()
    future.set_result(work())
    return future


@contextmanager
def _naming(name: str, prompts: list[str], offset: int) -> Iterator[None]:
    """A context that turns any exception of a reward into an error that names the reward, once."""
    try:
        yield
    except _RewardError:
        raise
    except (Exception, SystemExit) as error:  # exit() would end the run as if it had succeeded
        raise _RewardError(
            f"reward '{name}' failed on {_batch(offset, prompts)}: {type(error).__name__}: {brief(error)}"
        ) from error


class _RewardError(EtudeError):
    """A failure inside a reward; its text names the reward."""


def _check_scores(name: str, values: Any, prompts: list[str], offset: int) -> Tensor:
    """The values that a reward returned, as float32 `[n]` on the CPU, checked."""
    import torch

    scores = values if isinstance(values, torch.Tensor) else _numbers(values)
    if scores is None or scores.is_nested:
        raise EtudeError(
            f"reward '{name}' returned {'a nested tensor' if hasattr(values, 'is_nested') else type(values).__name__}; "
            f"it must return a float32 tensor of shape [{len(prompts)}], or as many numbers."
        )
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
    except (TypeError, ValueError, RuntimeError, OverflowError):  # ragged, or a tensor in it
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
