"""preferences.html: votes, agreement, the reward and its ranking, the training and the verdict, on one page."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from etude.files import atomic_write_text
from etude.measuring.statistics import format_interval
from etude.preferences.agreement import Agreement, measure
from etude.preferences.pool import Pool
from etude.preferences.preference_reward import Head, read_head
from etude.preferences.verdict import Verdict, describe, judge
from etude.report.figures import COLOURS, Line, draw_line, figure, line_figure
from etude.report.page import templates
from etude.runs.reader import Run, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 12
"""Images at either end of the ranking."""
Figure = tuple[str, str, str]  # title, explanation, svg


def write_page(
    pool: Pool,
    reward: Path | None = None,
    run: Path | None = None,
    judgement: Path | None = None,
    out: Path | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Writes the page, whole, and returns its path. It refers to nothing outside itself.

    Args:
        pool: images and votes.
        reward: directory of a fitted reward, for its figures and its ranking of the pool.
        run: directory of a run, for the curves of its rewards.
        judgement: pool of a blind judgement. Default: the pool itself, if it is one.
        out: the page. Default: `preferences.html` in the pool.
        advance: called with the number of images whose features were just computed, and of all.

    Raises:
        EtudeError: one of the directories is none of its kind.
    """
    head = None if reward is None else read_head(reward)
    verdict = _verdict(pool, judgement)
    ballots = pool.ballots()
    agreement = measure(ballots, {image.id: image.prompt for image in pool.images()})
    text = (
        templates("preferences", "report")
        .get_template("preferences.html")
        .render(
            pool=pool.root.name,
            votes=_votes(pool, agreement),
            raters=Counter(ballots.rater.tolist()).most_common(),
            trust=describe(agreement),
            reward=None if head is None else _reward(head, reward),
            figures=[] if head is None else _figures(head),
            ranking=[] if head is None else _ranking(pool, head, advance),
            training=[] if run is None else _training(read_run(run)),
            run=None if run is None else run.name,
            verdict=verdict,
        )
    )
    target = out or pool.root / "preferences.html"
    atomic_write_text(target, text)
    return target


def _verdict(pool: Pool, judgement: Path | None) -> Verdict | None:
    if judgement is not None:
        with Pool(judgement) as other:
            return judge(other)
    return None if pool.fact("sides") is None else judge(pool)


def _votes(pool: Pool, agreement: Agreement) -> list[tuple[str, str]]:
    images = pool.images()
    facts = [
        ("votes", str(pool.count())),
        ("images", str(len(images))),
        ("prompts", str(len({image.prompt for image in images}))),
        ("makers", "; ".join(maker.label for maker in pool.makers().values())),
    ]
    if agreement.ties is not None:
        facts.append(("ties", str(agreement.ties)))
    return facts


def _reward(head: Head, place: Path | None) -> list[tuple[str, str]]:
    card = head.card
    share = card["accuracy"]
    accuracy = f"{100 * share['mean']:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}], {share['basis']}"
    rows = [
        ("reward", str(place)),
        ("features", head.backbone),
        ("learnt from", f"{card['votes']} votes on {card['prompts']} prompts"),
        ("held-out accuracy", accuracy),
    ]
    if card.get("ceiling"):
        low, high = card.get("ceiling_interval") or [card["ceiling"]] * 2
        most = f"{100 * card['ceiling']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        rows.append(("at most possible", f"{most}, by the pairs that came back"))
    for name, label in (("slope", "calibration slope (1 is calibrated)"), ("side", "leaning to the left, logits")):
        if each := card.get(name):
            rows.append((label, format_interval(each["mean"], each["low"], each["high"], signed=name == "side")))
    rows.append(("told from chance", "yes" if card["told_from_chance"] else "no"))
    return rows


def _figures(head: Head) -> list[Figure]:
    curve, bins = head.card["curve"], head.card["calibration"]
    figures = []
    if curve:
        x = [row["votes"] for row in curve]
        lines = [
            Line(x, [100 * row["mean"] for row in curve], "train", "accuracy", [100 * row["low"] for row in curve],
                 [100 * row["high"] for row in curve])
        ]  # fmt: skip
        if ceiling := head.card.get("ceiling"):
            lines.append(Line(x, [100 * ceiling] * len(x), "gap", "at most possible", marks=False))

        def draw(axes: Axes) -> None:
            axes.axhline(50, color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))
            for line in lines:
                draw_line(axes, line)
            axes.set_ylabel("%")
            axes.legend(loc="lower right", handlelength=1.4)

        alt = f"Held-out accuracy: {100 * curve[0]['mean']:.0f} % from {x[0]} votes to {100 * curve[-1]['mean']:.0f} % from {x[-1]}."
        note = "Share of held-out votes that the reward gets right, with 95 % intervals. Dashed: chance."
        figures.append(("Accuracy by votes", note, figure(draw, alt, xlabel="votes")))
    if bins:
        x, y = [100 * each["predicted"] for each in bins], [100 * each["observed"] for each in bins]

        def draw_bins(axes: Axes) -> None:
            axes.plot([0, 100], [0, 100], color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))
            axes.plot(x, y, color=COLOURS["train"], marker="o", markersize=4)
            axes.set_ylabel("seen, %")

        alt = "; ".join(f"said {a:.0f} %, seen {b:.0f} %" for a, b in zip(x, y, strict=True))
        note = "Votes for the left image: what the reward said on held-out prompts, and what people did."
        figures.append(("Calibration", note, figure(draw_bins, alt, xlabel="said, %")))
    return figures


def _ranking(
    pool: Pool, head: Head, advance: Callable[[int, int], None]
) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """The best and the worst images beside others of their prompt: (title, [(data URI, prompt, score)])."""
    import torch

    from etude.preferences.features import pool_features

    features = pool_features(pool, head.backbone, advance)
    scores = head.score(torch.from_numpy(features.values)).numpy()
    images = {image.id: image for image in pool.images()}
    group = np.unique([images[number].prompt for number in features.images.tolist()], return_inverse=True)[1]
    scores = scores - (np.bincount(group, scores) / np.bincount(group))[group]
    order = np.argsort(-scores, kind="stable")
    ends = [("Liked most", order[:SHOWN]), ("Liked least", order[::-1][:SHOWN])]
    rows = []
    for title, places in ends:
        cells = []
        for place in places:
            image = images[int(features.images[place])]
            data = base64.b64encode(pool.read_image(image.digest)).decode()
            cells.append((f"data:image/png;base64,{data}", image.prompt, f"{scores[place]:+.2f}"))
        rows.append((title, cells))
    return rows


def _training(run: Run) -> list[Figure]:
    figures = []
    for reward in run.rewards:
        x, mean = run.series("reward", reward, "mean")
        if x:
            alt = f"{reward} while training: {mean[0]:.3g} to {mean[-1]:.3g} over {len(x)} iterations."
            figures.append(
                (
                    reward,
                    "While training, mean of an iteration.",
                    line_figure([Line(x, mean, "train", marks=False)], alt),
                )
            )
        if points := run.estimates("improvement", reward):
            ends: list[list[Any]] = [[each[key] for _, each in points] for key in ("mean", "low", "high")]
            line = Line([i for i, _ in points], ends[0], "gain", low=ends[1], high=ends[2])
            alt = f"Improvement of {reward}: last {format_interval(ends[0][-1], ends[1][-1], ends[2][-1])}."
            note = "ODE of the tuned minus ODE of the base model, with 95 % intervals."
            figures.append((f"Improvement in {reward}", note, line_figure([line], alt, zero=True)))
    return figures
