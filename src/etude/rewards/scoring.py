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

from etude.errors import EtudeError, brief, brief_value
from etude.rewards.background import LOCAL, Turn
from etude.rewards.reward import WEIGHTED_SUM, Reward, get
from etude.undisturbed import begin_draws, undisturbed

if TYPE_CHECKING:
    from torch import Tensor

    Scores = dict[str, Tensor]
    Metadata = Mapping[str, Any] | None
    Groups = Sequence[int] | None


@dataclass(frozen=True)
class Batch:
    """Images to be scored, uint8 `[n, 3, h, w]`, with their n prompts.

    Attributes:
        metadata: by name, a list of n entries; a reward gets those for which it has a keyword.
        groups: the group of each image, for rewards that compare images of a group. Default: images
            of equal prompts.
        offset: index of the first image in a larger batch, in which errors count.

    Raises:
        EtudeError: images and prompts do not match, or there is not one group per image.
    """

    images: Tensor
    prompts: list[str]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    groups: Sequence[int] | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        import torch

        images, count = self.images, len(self.prompts)
        wanted = "rewards take uint8 images [n, 3, h, w]"
        if not isinstance(images, torch.Tensor):
            raise EtudeError(f"{wanted} as a tensor, not {type(images).__name__}.")
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
            raise EtudeError(f"{wanted}, not {images.dtype} of shape {list(images.shape)}.")
        if count != len(images):
            raise EtudeError(f"there are {len(images)} images but {count} prompts; rewards take one prompt per image.")
        if self.groups is not None and len(self.groups) != count:
            raise EtudeError(f"there are {count} images but {len(self.groups)} groups: give one an image.")

    def arguments(self, reward: Reward, function: Callable[..., Any]) -> tuple[Tensor, list[str], dict[str, Any]]:
        """Images, prompts and keywords for a call of `function`, a method of the reward or itself.

        They are copies, because a reward may work in place.
        """
        keywords = copy.deepcopy(dict(_select_keywords(function, self.metadata)))
        if getattr(reward, "whole_groups", False):
            first: dict[str, int] = {}
            same = [first.setdefault(prompt, i) for i, prompt in enumerate(self.prompts)]
            keywords["groups"] = list(same if self.groups is None else self.groups)
        return self.images.clone(), list(self.prompts), keywords


def score_one(
    name: str,
    reward: Reward,
    images: Tensor,
    prompts: list[str],
    metadata: Metadata = None,
    *,
    groups: Groups = None,
    offset: int = 0,
) -> Tensor:
    """One reward's scores of a `Batch`, float32 `[n]` on the CPU, checked.

    Raises:
        EtudeError: images and prompts do not match; the reward raises (its message is repeated, its
            error chained); it returns anything but n numbers (a floating tensor `[n]`, or a list,
            tuple or array of n numbers); or a score is NaN or infinite in float32 (the sample and
            its prompt are named). The error names the reward by `name`.
    """
    batch = Batch(images, prompts, metadata or {}, groups, offset)
    with _naming(name, prompts, offset):
        scores = _call(reward, batch)
    return _check_scores(name, scores, prompts, offset)


def score(rewards: str | Iterable[str], images: Tensor, prompts: list[str], metadata: Metadata = None) -> Scores:
    """Score images by one or several rewards: by name, float32 `[n]` on the CPU.

    Args:
        rewards: names, import paths or urls, or one of them.
        images: uint8 `[n, 3, h, w]`.
        prompts: n texts.
        metadata: by name, a list of n entries.

    Raises:
        EtudeError: a name is unknown, a reward fails, or a score is not a finite number.

    Example:
        >>> import etude, torch
        >>> black = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
        >>> etude.score(["colorfulness"], black, ["night", "coal"])
        {'colorfulness': tensor([0., 0.])}
    """
    names = [rewards] if isinstance(rewards, str) else rewards
    return {name: LOCAL.call(lambda name=name: score_one(name, get(name), images, prompts, metadata)) for name in names}


def check_group_size(rewards: Iterable[str], images: int, setting: str) -> None:
    """Refuse fewer images of a prompt than a reward compares.

    Args:
        rewards: names of the rewards.
        images: smallest number of images that a prompt has.
        setting: setting or option that raises this number, for the error.

    Raises:
        EtudeError: a reward needs more images of a prompt (its attribute `least_images`).
    """
    for name in rewards:
        if images < (least := getattr(get(name), "least_images", 1)):
            raise EtudeError(
                f"reward '{name}' compares the images of a prompt and needs at least {least} of each, but a prompt has {images}: "
                f"set {setting} to {least} or more."
            )


def revisions(rewards: Iterable[str]) -> dict[str, dict[str, str]]:
    """Commits of the hub repositories that each reward has read, by the reward's name."""
    by_name: dict[str, dict[str, str]] = {name: getattr(get(name), "revisions", dict)() for name in rewards}
    return {name: commits for name, commits in by_name.items() if commits}


class Scoring:
    """Scores that are being computed: one future for each reward, by name. `WeightedRewards.start` makes it."""

    def __init__(self, futures: dict[str, Any], prompts: list[str], offset: int = 0) -> None:
        self.futures: dict[str, Future[Any]] = futures
        self._prompts, self._offset = prompts, offset

    def done(self) -> bool:
        """Whether `result` would return, or raise, at once."""
        return all(future.done() for future in self.futures.values())

    def cancel(self) -> None:
        """Cancels requests, and calls that have not started; a local reward runs to its end, unheard."""
        for future in self.futures.values():
            if future is not None and not future.cancel() and isinstance(future, Turn):
                future.given_up = True

    def result(self, timeout: float | None = None) -> Scores:
        """Waits for the scores: by reward name, float32 `[n]` on the CPU, checked as by `score_one`.

        The first reward that fails ends the wait, cancels the others, and is named by the error. A
        score that is missing after `timeout` seconds is a failure; a remote reward has its own
        time-outs.
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

    Each reward is normalised within its group before the weighted sum of the advantages is taken:
    in a sum of raw rewards the reward with the widest scale would decide.

    Args:
        weights: reward name (or import path) to weight, at least one.
        held_out: names that are measured in evaluation and never trained on.
        offload: whether to call the method `offload` of each reward that has one after each use.

    Raises:
        EtudeError: a name is unknown, or there is no weight.
    """

    def __init__(self, weights: Mapping[str, float], held_out: Iterable[str] = (), *, offload: bool = False) -> None:
        if not weights:
            raise EtudeError("there is no reward to train on: give at least one name with its weight.")
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self.held_out = tuple(name for name in dict.fromkeys(held_out) if name not in self.weights)
        self.offload = offload
        begin_draws()  # so that a run depends on none before it
        for name in (*self.weights, *self.held_out):
            LOCAL.call(get, name)  # an unknown name is an error here, and not after the first rollout

    def load(self) -> None:
        """Calls the method `load` of each reward that has one, so that a failure costs no rollout."""
        for name in (*self.weights, *self.held_out):
            load = getattr(get(name), "load", None)
            try:
                if load is not None:
                    LOCAL.call(undisturbed()(load))
            except Exception as error:  # a user's code raises anything; the error names the reward
                raise EtudeError(f"reward '{name}' cannot be used: {brief(error)}") from error

    @property
    def whole_groups(self) -> bool:
        """Whether some reward compares the images of a group, and needs all of them in one call."""
        return any(getattr(get(name), "whole_groups", False) for name in (*self.weights, *self.held_out))

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata = None, groups: Groups = None) -> Scores:
        """Scores of the trained rewards, each float32 `[n]`; the arguments are `Batch`'s.

        Requests of remote rewards are sent first, and the other rewards are computed meanwhile.
        """
        return self._begin(self.weights, Batch(images, prompts, metadata or {}, groups)).result()

    def start(
        self,
        images: Tensor,
        prompts: list[str],
        metadata: Metadata = None,
        *,
        groups: Groups = None,
        held_out: bool = False,
        offset: int = 0,
    ) -> Scoring:
        """Starts scoring a `Batch` of whole groups and returns at once; `held_out` rewards too if asked.

        Rewards with a method `submit` score by themselves, and the others on one thread beside the
        caller's, one after the other in their order, also over several starts: no two local rewards
        run side by side. The images and the metadata must not change until the scores are there.
        """
        names = (*self.weights, *(self.held_out if held_out else ()))
        return self._begin(names, Batch(images, prompts, metadata or {}, groups, offset))

    def evaluate(self, images: Tensor, prompts: list[str], metadata: Metadata = None, groups: Groups = None) -> Scores:
        """Scores as of a call, with the held-out rewards and the `weighted_sum` of several rewards."""
        batch = Batch(images, prompts, metadata or {}, groups)
        return self.summed(self._begin((*self.weights, *self.held_out), batch).result())

    def summed(self, scores: Scores) -> Scores:
        """The scores, and the `weighted_sum` of several trained rewards."""
        return scores if len(self.weights) == 1 else {**scores, WEIGHTED_SUM: self.combine(scores)}

    def combine(self, values: Mapping[str, Tensor]) -> Tensor:
        """sum_k weight_k values_k over the trained rewards: scores or advantages of any shape."""
        first, *others = [weight * values[name] for name, weight in self.weights.items()]
        return sum(others, start=first)

    def _begin(self, names: Iterable[str], batch: Batch) -> Scoring:
        """Starts the rewards with `submit`, then the others."""
        scoring, local = Scoring(dict.fromkeys(names), batch.prompts, batch.offset), []
        try:
            for name in scoring.futures:
                reward = get(name)
                submit = getattr(reward, "submit", None)
                if submit is None:
                    local.append(name)
                    continue
                with _naming(name, batch.prompts, batch.offset), undisturbed():
                    images, prompts, keywords = batch.arguments(reward, submit)
                    scoring.futures[name] = submit(images, prompts, **keywords)
            for name in local:
                scoring.futures[name] = LOCAL.submit(partial(self._compute, name, batch))
        except BaseException:
            scoring.cancel()
            raise
        return scoring

    def _compute(self, name: str, batch: Batch) -> Tensor:
        reward = get(name)
        with _naming(name, batch.prompts, batch.offset):
            try:
                return _call(reward, batch)
            finally:
                if self.offload and hasattr(reward, "offload"):
                    with undisturbed():
                        reward.offload()


def _call(reward: Reward, batch: Batch) -> Any:
    import torch

    function = reward.forward if isinstance(reward, torch.nn.Module) else reward
    images, prompts, keywords = batch.arguments(reward, function)
    with undisturbed(), torch.no_grad():
        return reward(images, prompts, **keywords)


def _select_keywords(function: Callable[..., Any], metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metadata for which a function has keywords, or all if it has `**metadata`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a built-in function has no signature
        return metadata
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return metadata
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: values for name, values in metadata.items() if name in names}


@contextmanager
def _naming(name: str, prompts: list[str], offset: int) -> Iterator[None]:
    """A context that turns any exception of a reward into an error that names the reward, once."""
    try:
        yield
    except _RewardError:
        raise
    except (Exception, SystemExit) as error:  # exit() would end the run as if it had succeeded
        problem = f"{type(error).__name__}: {brief(error)}"
        raise _RewardError(f"reward '{name}' failed on {_batch(offset, prompts)}: {problem}") from error


class _RewardError(EtudeError):
    """A failure inside a reward; its text names the reward."""


def _check_scores(name: str, values: Any, prompts: list[str], offset: int) -> Tensor:
    """The values that a reward returned, as float32 `[n]` on the CPU, checked."""
    import torch

    subject, shape = f"reward '{name}' returned", [len(prompts)]
    scores = values if isinstance(values, torch.Tensor) else _numbers(values)
    if scores is None and (odd := _odd_entry(values)) is not None and len(values) == len(prompts):
        place = f"sample {offset + odd}, prompt {prompts[odd]!r}"
        raise EtudeError(
            f"{subject} {type(values).__name__} with {brief_value(values[odd])} for {place}; every score must be a number."
        )
    if scores is None or scores.is_nested:
        kind = "a nested tensor" if hasattr(values, "is_nested") else type(values).__name__
        raise EtudeError(f"{subject} {kind}; it must return a float32 tensor of shape {shape}, or as many numbers.")
    if list(scores.shape) != shape or not scores.is_floating_point():
        kind = f"a tensor of shape {list(scores.shape)} and {scores.dtype} for {_batch(offset, prompts)}"
        raise EtudeError(f"{subject} {kind}; it must return one float32 score per image, shape {shape}.")
    try:
        scores = scores.detach().to("cpu", torch.float32, copy=True).to_dense()
    except (RuntimeError, NotImplementedError) as error:  # a meta tensor, a nested one
        kind = f"a tensor without plain numbers ({brief(error, 100)})"
        raise EtudeError(f"{subject} {kind}; return a dense one.") from error
    if bad := (~scores.isfinite()).nonzero().flatten().tolist():
        more = f" ({len(bad)} of {len(prompts)} scores are not finite)" if len(bad) > 1 else ""
        place = f"sample {offset + bad[0]}, prompt {prompts[bad[0]]!r}{more}"
        raise EtudeError(f"{subject} {scores[bad[0]].item()} for {place}; every score must be a finite number.")
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


def _odd_entry(scores: Any) -> int | None:
    """The index of the first entry of a list or tuple that is no number; None without one."""
    entries = enumerate(scores) if isinstance(scores, list | tuple) else ()
    return next((index for index, entry in entries if _numbers([entry]) is None), None)


def _batch(offset: int, prompts: list[str]) -> str:
    last = offset + len(prompts) - 1
    return f"samples {offset} to {last} (the first prompt is {prompts[0]!r})" if prompts else "an empty batch"
