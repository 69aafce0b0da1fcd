"""What a run would cost, counted before it starts: how often the network is evaluated, how much of it is trained, what memory it takes.

One evaluation is the network's answer for one image at one step, whatever guidance makes of it inside. With n images an
iteration, T steps for an image (those of a compressed tail included), the first P of them deterministic, K of them trained:

    rollout      n T, or g P + n (T - P) where the images of each of the g groups share their initial noise
    reference    n K if the KL to the reference model is wanted
    replay       n max(1, round(timestep_fraction K)) num_inner_epochs
    evaluation   2 evaluation.num_images N: the ODE and the SDE, N steps each, in the iterations that are evaluated

The steps of images that start alike are shared within a process; the counts are those of a run in one process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etude.config import TrainConfig
    from etude.sampling.plans import StepTable
    from etude.training.trainer import Trainer

PARTS = ("rollout", "reference", "replay", "evaluation")


@dataclass(frozen=True)
class ImageSteps:
    """The steps of one image while training: `total` of them, the first `prefix` deterministic, `trained` of them trained."""

    total: int
    prefix: int
    trained: int

    @classmethod
    def of(cls, table: StepTable) -> ImageSteps:
        return cls(table.num_evaluations, table.prefix_steps, len(table.trained_steps))


def evaluations(config: TrainConfig, steps: ImageSteps) -> dict[str, int]:
    """Network evaluations of one iteration by part, without its evaluation of the gap: see the module."""
    images, objective = config.rollout.images_per_iteration, config.objective
    starts = images // config.rollout.images_per_prompt if config.rollout.shared_noise else images
    kept = max(1, round(objective.timestep_fraction * steps.trained))
    return {
        "rollout": starts * steps.prefix + images * (steps.total - steps.prefix),
        "reference": images * steps.trained if objective.kl_coef > 0 else 0,
        "replay": images * kept * objective.num_inner_epochs,
    }


def gap_evaluations(config: TrainConfig) -> int:
    """Network evaluations of one evaluation: every held-out image under the ODE and under the SDE."""
    return 2 * config.evaluation.num_images * (config.evaluation.num_steps or config.sampling.num_steps)


def evaluated(config: TrainConfig) -> list[int]:
    """The iterations that end with an evaluation: 0, which is the base model, every k-th and the last."""
    return sorted({*range(0, config.iterations + 1, config.evaluation.every), config.iterations})


def run_evaluations(config: TrainConfig, steps_at: Callable[[int], ImageSteps]) -> dict[str, tuple[int, int, int]]:
    """By part: the fewest and the most network evaluations of an iteration, and those of the whole run.

    Args:
        steps_at: the steps of an image in each iteration from 1 on: a window that moves changes them.
    """
    seen = Counter(steps_at(iteration) for iteration in range(1, config.iterations + 1))
    parts = [(evaluations(config, steps), times) for steps, times in seen.items()]
    result = {
        part: (
            min(counts[part] for counts, _ in parts),
            max(counts[part] for counts, _ in parts),
            sum(counts[part] * times for counts, times in parts),
        )
        for part in PARTS[:-1]
    }
    one = gap_evaluations(config)
    return result | {"evaluation": (one, one, one * len(evaluated(config)))}


def resolved(trainer: Trainer) -> str:
    """The resolved configuration as YAML, then what the run would take as comments: text that is itself a recipe."""
    from etude.config.algorithm import essence
    from etude.training.memory_estimate import memory_estimate

    config, policy = trainer.config, trainer.policy
    trained = sum(parameter.numel() for parameter in trainer.parameters.values())
    whole = sum(parameter.numel() for parameter in policy.network.parameters())
    counts = run_evaluations(config, lambda iteration: ImageSteps.of(trainer.plans.table_at(iteration)))
    lines = [
        essence(config),
        f"trained parameters: {trained:,} of the network's {whole:,}",
        *_table(counts, len(evaluated(config)), config.iterations),
        *_memory(memory_estimate(trainer)),
        *_models_of_rewards([*config.rewards, *config.evaluation.held_out_rewards]),
    ]
    return config.to_yaml() + "".join(f"# {line}\n" for line in lines)


def _table(counts: Mapping[str, tuple[int, int, int]], evaluated: int, iterations: int) -> list[str]:
    """Rows of the parts that are not empty, and the whole run's sum."""
    rows = [("network evaluations, one image at one step", "each", "times", "in all")]
    for part, (low, high, total) in counts.items():
        if total:
            each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            rows.append((part, each, f"{evaluated if part == 'evaluation' else iterations:,}", f"{total:,}"))
    rows.append(("total", "", "", f"{sum(total for _, _, total in counts.values()):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _models_of_rewards(names: list[str]) -> list[str]:
    """One line on what the rewards add to the memory, as far as it is known; none if they have no weights."""
    from etude.rewards.reward import CLOSED_FORMS, WEIGHTS_GB

    weighty = [name for name in dict.fromkeys(names) if name not in CLOSED_FORMS]
    sizes = {name: WEIGHTS_GB.get(name.partition(":")[0]) for name in weighty}
    said = ", ".join(f"{name} {f'{size:g} GB' if size else 'of unknown size'}" for name, size in sizes.items())
    return [f"models of rewards come on top, in float32: {said}"] if said else []


def _memory(parts: Mapping[str, int]) -> list[str]:
    from etude.training.memory_estimate import readable

    rows = [(name, readable(size)) for name, size in parts.items()]
    title = "memory of the accelerator, each process, without models of rewards"
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [title, *(f"  {name.ljust(widths[0])}  {size.rjust(widths[1])}" for name, size in rows)]
