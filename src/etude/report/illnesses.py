"""Illnesses of a run, each declared once: a name, a test on the metrics, a sentence, a remedy.

A test reads what the run wrote and returns the figure that shows the illness, or None. Limits are in
units that hold for any reward: shares, and standard deviations of the reward under the ODE. They were
set on the runs of this project's studies, where the healthy ones pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist, fmean, median
from typing import Any

from etude.measuring.statistics import format_interval
from etude.runs.reader import Interval, Run

ENOUGH = 5
"""Iterations below which a course says nothing."""
NOISY, FALLEN, STILL = 2.0, 0.25, 0.1
"""Standard deviations of a reward: of a gap that no reward survives, of a fall of a gold reward, and of no movement."""
POWER = ((NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)) / NormalDist().inv_cdf(0.975)) ** 2
"""Ratio of the images at which an effect shows with a chance of 80 % to those at which it does with one of 50 %: 2.04."""
SPREAD = ("diversity", "vendi")
"""Rewards that measure diversity, by the beginning of their names."""

FILE_SIZES = ("jpeg_compressibility", "jpeg_incompressibility")
"""Rewards that measure the size of a file."""


@dataclass(frozen=True)
class Illness:
    """One thing that may be wrong with a run.

    Attributes:
        name: a few words.
        test: function from the run to the figure that shows the illness; None where there is none.
        sentence: a sentence with `{figure}` in it.
        remedy: what to change.
    """

    name: str
    test: Callable[[Run], str | None]
    sentence: str
    remedy: str


def ratio_never_moves(run: Run) -> str | None:
    """The largest deviation of a ratio from 1, where it is no more than rounding in every iteration.

    A ratio is 1 by construction where one optimiser step follows each rollout.
    """
    if _on_policy(run):
        return None
    moved = run.series("ratio_max_deviation")[1]
    rounding = run.series("rollout_ratio_max_deviation")[1]
    limit = max(1e-6, 2 * max(rounding, default=0.0))
    return f"{max(moved):.2g}" if len(moved) >= ENOUGH and max(moved) <= limit else None


def rollout_disagrees(run: Run) -> str | None:
    """The median disagreement of rollout and replay, in shares of the clip range, where it is above a half."""
    if run.setting("old_log_prob", "objective") == "replay":
        return None
    for setting, metric in (("clip_range", "rollout_ratio_deviation"), ("clip_nats", "rollout_mismatch")):
        clip, values = _number(run.setting(setting, "objective")), run.series(metric)[1]
        if clip > 0 and len(values) >= ENOUGH and median(values) > clip / 2:
            return f"{_percent(median(values) / clip)} of {setting.replace('_', ' ')}"
    return None


def nothing_clipped(run: Run) -> str | None:
    """The mean clipped fraction, where it is below a thousandth and no trained reward surely rose.

    A limit that a run which learns never reaches does no harm, and ratios that are always 1 reach none.
    """
    shares, evaluation = run.series("clipfrac")[1], _last(run)
    if _on_policy(run) or any(_improvement(evaluation, name, "low", 0.0) > 0 for name in run.trained):
        return None
    return _percent(fmean(shares)) if len(shares) >= ENOUGH and fmean(shares) < 1e-3 else None


def all_clipped(run: Run) -> str | None:
    """The median clipped fraction, where it is above a half."""
    shares = run.series("clipfrac")[1]
    return _percent(median(shares)) if len(shares) >= ENOUGH and median(shares) > 0.5 else None


def groups_without_variance(run: Run) -> str | None:
    """The mean share of groups of equal rewards, where it is above a half."""
    shares = run.series("zero_std_ratio")[1]
    return _percent(fmean(shares)) if shares and fmean(shares) > 0.5 else None


def sde_cannot_be_scored(run: Run) -> str | None:
    """The largest gap of the base model, in standard deviations, where the SDE's images are far from the ODE's."""
    evaluation = run.evaluations[0][1] if run.evaluations else {}
    gaps = {
        name: gap["mean"] / deviation
        for name, gap in (evaluation.get("gap") or {}).items()
        if gap["low"] > 0 and (deviation := _deviation(evaluation, name))
    }
    if not gaps or max(gaps.values()) < NOISY:
        return None
    worst = max(gaps, key=lambda name: gaps[name])
    return f"{gaps[worst]:.1f} standard deviations of {worst} lower"


def kl_rises(run: Run) -> str | None:
    """The growth of the approximate KL from the first to the last third, above tenfold, if no window moves."""
    values = run.series("approx_kl")[1]
    third = len(values) // 3
    if third < 2 or len(set(run.series("window", "start")[1])) > 1:
        return None
    first, last = median(values[:third]), median(values[-third:])
    return f"{last / first:.0f}-fold, from {first:.2g} to {last:.2g}" if 0 < 10 * first < last else None


def gradient_always_clipped(run: Run) -> str | None:
    """The median gradient norm, where nine in ten iterations are above the limit."""
    norms, limit = run.series("grad_norm")[1], _number(run.setting("max_grad_norm", "optimizer"))
    if limit == 0 or len(norms) < ENOUGH or sum(norm > limit for norm in norms) < 0.9 * len(norms):
        return None
    return f"{median(norms):.2g}, and the limit is {limit:g}"


def gold_falls(run: Run) -> str | None:
    """The change of a held-out reward that surely fell while a trained one surely rose.

    The size of a file counts only as a declared gold reward: it grows with whatever a picture gains.
    """
    evaluation, gold = _last(run), run.setting("gold_rewards", "evaluation")
    up = [name for name in run.trained if _improvement(evaluation, name, "low", 0.0) > 0]
    for name, change in (evaluation.get("improvement") or {}).items():
        deviation = _deviation(evaluation, name)
        if name in run.trained or name.startswith(SPREAD) or not up or not deviation:
            continue
        if name in FILE_SIZES and name not in (gold if isinstance(gold, list) else []):
            continue
        if change["high"] < -FALLEN * deviation:
            before = [i for i, each in run.evaluations if _improvement(each, name, "high", 0.0) >= 0]
            since = next(i for i, _ in run.evaluations if i > max(before, default=-1))
            both = f"{up[0]} rose by {_interval(evaluation, up[0])} and {name} changed by {_interval(evaluation, name)}"
            return f"{both}, surely so from iteration {since} on"
    return None


def collapsed(run: Run) -> str | None:
    """The change of a diversity that surely fell, by a tenth at least."""
    evaluation = _last(run)
    for name, change in (evaluation.get("improvement") or {}).items():
        now = (evaluation.get("ode") or {}).get(name, {}).get("mean", 0.0)
        if name.startswith(SPREAD) and change["high"] < 0 and change["mean"] < -0.1 * (now - change["mean"]):
            return f"{name} changed by {_interval(evaluation, name)}, from {now - change['mean']:.3g}"
    return None


def one_reward_decides(run: Run) -> str | None:
    """The largest share of the variance of the advantages, w_k^2 / sum w^2, of rewards with a spread, above 95 %."""
    rewards = run.config.get("rewards")
    weights = {name: _number(w) for name, w in rewards.items()} if isinstance(rewards, dict) else {}
    varied = {name for name in weights if any(std > 0 for std in run.series("reward", name, "std")[1])}
    if len(weights) < 2 or not varied:
        return None
    whole = sum(weights[each] ** 2 for each in varied) or math.inf
    shares = {name: weights[name] ** 2 / whole for name in varied}
    most = max(shares, key=lambda name: shares[name])
    return f"{most} makes {_percent(shares[most])} of their variance" if shares[most] > 0.95 else None


def noise_above_effect(run: Run) -> str | None:
    """The improvement of a trained reward that may be nothing, and the images that would settle it.

    The interval's half-width falls with the root of their number. At `n (half / mean)^2` images it reaches 0 in
    half of all repetitions, and at `POWER` times as many it stays above 0 in four fifths.
    """
    evaluation = _last(run)
    for name in run.trained:
        change = (evaluation.get("improvement") or {}).get(name)
        if change is None or not change["low"] <= 0 <= change["high"] or moves_too_little(run):
            continue
        half, mean = (change["high"] - change["low"]) / 2, abs(change["mean"])
        images = POWER * _number(change.get("n")) * (half / mean) ** 2 if mean > 0 else math.inf
        many = f"about {_images(images)} images" if images <= 1e6 else "more than a million images"
        return (
            f"{name} changed by {_interval(evaluation, name)}; at this size of the effect {many} would settle it with "
            "a chance of 80 %"
        )
    return None


def moves_too_little(run: Run) -> str | None:
    """The improvement of a trained reward that is surely next to nothing, where the updates were far inside the clip."""
    evaluation, shares = _last(run), run.series("clipfrac")[1]
    if shares and fmean(shares) > 0.01:
        return None
    for name in run.trained:
        change, deviation = (evaluation.get("improvement") or {}).get(name), _deviation(evaluation, name)
        if change and deviation and -STILL * deviation < change["low"] <= change["high"] < STILL * deviation:
            return f"{name} changed by {_interval(evaluation, name)}, where single images vary by {deviation:.3g}"
    return None


ILLNESSES = (
    Illness(
        "ratio always 1",
        ratio_never_moves,
        "No importance ratio left 1 by more than {figure}, which is rounding.",
        "Raise optimizer.learning_rate or objective.updates_per_epoch.",
    ),
    Illness(
        "rollout and replay disagree",
        rollout_disagrees,
        "Before the first update the ratios of rollout and replay were off by {figure}, from rounding alone.",
        "Set objective.old_log_prob to replay, or rollout.dtype to null, or give both the same batch size.",
    ),
    Illness(
        "clip range idle",
        nothing_clipped,
        "The clip range touched {figure} of all pairs: it protects nothing.",
        "Raise optimizer.learning_rate if the reward stands still; else lower objective.clip_range.",
    ),
    Illness(
        "most of the update clipped",
        all_clipped,
        "In the median iteration {figure} of all pairs left the clip range, so that most of the update is thrown away.",
        "Lower optimizer.learning_rate or objective.updates_per_epoch, or raise objective.clip_range.",
    ),
    Illness(
        "groups without variance",
        groups_without_variance,
        "In {figure} of all groups every image had the same reward, and they taught nothing.",
        "Raise rollout.images_per_prompt, take harder prompts, or a reward with more shades.",
    ),
    Illness(
        "eta too high for these steps",
        sde_cannot_be_scored,
        "Before training the SDE's images scored {figure} than the ODE's: the reward sees noise.",
        "Lower sampling.eta, raise sampling.num_steps, or take sampling.first_step: ode.",
    ),
    Illness(
        "KL rising",
        kl_rises,
        "The approximate KL of an iteration rose {figure}.",
        "Lower optimizer.learning_rate, or raise objective.kl_coef.",
    ),
    Illness(
        "gradient at its limit",
        gradient_always_clipped,
        "Nearly every gradient was clipped: the median norm was {figure}.",
        "Lower objective.kl_coef or the advantages (objective.adv_clip_max), or raise optimizer.max_grad_norm.",
    ),
    Illness(
        "reward hacking",
        gold_falls,
        "Since the base model {figure}: the trained reward is being gamed.",
        "Stop by evaluation.stop_on_fall, keep checkpoint.best by the gold reward, raise objective.kl_coef, or train on both rewards.",
    ),
    Illness(
        "collapse",
        collapsed,
        "The images of a prompt became alike: {figure}.",
        "Stop by evaluation.stop_on_fall, raise objective.kl_coef, lower optimizer.learning_rate, or train longer at less eta.",
    ),
    Illness(
        "one reward decides",
        one_reward_decides,
        "The advantages are those of one reward: {figure}.",
        "Raise the weights of the other rewards; each is already normalised within its group.",
    ),
    Illness(
        "noise above the effect",
        noise_above_effect,
        "The held-out improvement cannot be told from 0: {figure}.",
        "Raise evaluation.num_images and the number of its prompts, or train longer.",
    ),
    Illness(
        "learning rate too small",
        moves_too_little,
        "Training surely moved next to nothing: {figure}.",
        "Raise optimizer.learning_rate, or iterations.",
    ),
)
"""The illnesses that `etude doctor` looks for, in its order."""


def _last(run: Run) -> dict[str, Any]:
    """The last evaluation of trained weights; empty before the first."""
    iteration, evaluation = run.evaluations[-1] if run.evaluations else (0, {})
    return evaluation if iteration > 0 else {}


def _on_policy(run: Run) -> bool:
    """Whether one optimiser step follows each rollout."""
    return all(_number(run.setting(key, "objective")) == 1 for key in ("num_inner_epochs", "updates_per_epoch"))


def _improvement(evaluation: dict[str, Any], name: str, end: str, default: float) -> float:
    change: Interval = (evaluation.get("improvement") or {}).get(name) or {}
    return float(change.get(end, default))


def _deviation(evaluation: dict[str, Any], name: str) -> float:
    """The standard deviation of a reward's single ODE images; 0 where it is not known.

    Metrics of earlier versions have the standard error alone, which tells it where each prompt has one image.
    """
    if (deviation := _number((evaluation.get("std") or {}).get(name))) > 0:
        return deviation
    ode: Interval = (evaluation.get("ode") or {}).get(name) or {}
    return _number(ode.get("standard_error")) * math.sqrt(max(0.0, _number(ode.get("n"))))


def _interval(evaluation: dict[str, Any], name: str) -> str:
    change = evaluation["improvement"][name]
    return format_interval(change["mean"], change["low"], change["high"])


def _number(value: Any) -> float:
    """A finite number, or 0 for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _images(count: float) -> str:
    """A number of images to two digits."""
    digits = max(0, math.floor(math.log10(max(count, 1))) - 1)
    return f"{round(count, -digits):,.0f}"
