"""Time of iterations: scores after the rollout over scores of each micro-batch during the next one."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.processes import BUILD, Side
from benchmarks.results import Headline, Ratio, Result, milliseconds

if TYPE_CHECKING:
    from torch import Tensor

TARGET = 1.3
WARM_UP = 1
AFTER, AHEAD = "scored after the rollout", "scored ahead"
DURATION = "ETUDE_BENCHMARK_REWARD_SECONDS"
"""Environment variable with the seconds that the slow reward takes for an image."""


def slow(images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
    """Brightness, with a delay as if another machine or GPU computed the reward."""
    time.sleep(float(os.environ[DURATION]) * len(images))
    return images.float().mean(dim=(1, 2, 3)) / 255


@dataclass(frozen=True)
class Work:
    """The work of every iteration."""

    images: int = 16
    batch: int = 2
    num_steps: int = 5


def run(work: Work, repeats: int, threads: int | None) -> Result:
    """Alternates iterations that score after the rollout and ahead: the same images, the same scores.

    On every machine the reward takes as long for all images as the rollout: the largest overlap.

    Args:
        repeats: number of pairs, after one that is thrown away.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    duration = _rollout_seconds(work, threads) / work.images
    with _side(work, AFTER, threads, duration) as after, _side(work, AHEAD, threads, duration) as ahead:
        rounds = [
            {name: side.ask("iterate") for name, side in ((AFTER, after), (AHEAD, ahead))}
            for _ in range(WARM_UP + repeats)
        ][WARM_UP:]
        info = ahead.info
    settings = {"repeats": repeats, "threads": info["threads"], "reward_seconds": duration * work.images}
    return _result(work, rounds, settings, info["versions"])


def _rollout_seconds(work: Work, threads: int | None) -> float:
    """Seconds of the rollout on this machine, with a reward that takes no time."""
    with _side(work, AFTER, threads, 0.0) as side:
        return float([side.ask("iterate")["phases"]["rollout"] for _ in range(WARM_UP + 1)][-1])


def _side(work: Work, name: str, threads: int | None, duration: float) -> Side:
    environment = {DURATION: str(duration)}
    return Side(sys.executable, "benchmarks.etude_side", _settings(work, name), threads, environment=environment)


def _result(work: Work, rounds: list[dict[str, Any]], settings: dict[str, Any], versions: dict[str, str]) -> Result:
    def each(name: str, *phases: str) -> list[float]:
        return [sum(found[name]["phases"][p] for p in phases) if phases else found[name]["seconds"] for found in rounds]

    parts = {
        "waiting for rewards": (each(AFTER, "rewards"), each(AHEAD, "rewards")),
        "rollout and rewards": (each(AFTER, "rollout", "rewards"), each(AHEAD, "rollout", "rewards")),
        "iteration": (each(AFTER), each(AHEAD)),
    }
    return Result(
        "async_rewards",
        Headline("rollout and rewards, after / ahead", Ratio.of(*parts["rollout and rewards"]), TARGET, at_most=False),
        ["part of an iteration", f"{AFTER}, median ms", f"{AHEAD}, median ms", "after / ahead"],
        [[n, milliseconds(a), milliseconds(b), str(Ratio.of(a, b))] for n, (a, b) in parts.items()],
        settings={**asdict(work), **settings},
        measurements={"rounds": rounds},
        versions={"etude": versions},
    )


def _settings(work: Work, name: str) -> dict[str, Any]:
    overrides = [
        'rewards={"benchmarks.async_rewards:slow": 1.0}',
        "evaluation.held_out_rewards=[]",
        f"rollout.images_per_iteration={work.images}",
        f"rollout.batch_size={work.batch}",
        f"sampling.num_steps={work.num_steps}",
        "objective.timestep_fraction=0.1",  # a small update, since it is not measured
        f"rollout.score_ahead={'true' if name == AHEAD else 'false'}",
    ]
    return {"recipe": "emoji-ddpo", "overrides": overrides, "work": str(BUILD)}
