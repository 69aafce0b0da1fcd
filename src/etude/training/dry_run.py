"""The cost of a run, counted before it starts: network evaluations, trained parameters and memory.

One evaluation is the network's answer for one image at one step, with or without guidance. An
iteration has n images, each with T steps (a compressed tail included). The first P steps are
deterministic, and K steps are trained:

    rollout      n T, or g P + n (T - P) if the images of each of g groups share their initial noise
    reference    n K with a KL to the reference model
    replay       n max(1, round(timestep_fraction K)) num_inner_epochs
    evaluation   2 evaluation.num_images N, N steps of the ODE and of the SDE, where one is due

Images with the same initial noise share steps only within a process; the counts are those of a run
in one process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from etude.config import TrainConfig
from etude.config.algorithm import essence

if TYPE_CHECKING:
    from etude.learning.objectives import Objective
    from etude.policies import TrainablePolicy
    from etude.sampling.plans import StepTable


@dataclass(frozen=True)
class ImageSteps:
    """The steps of one image in training.

    Attributes:
        total: number of network evaluations.
        prefix: number of deterministic steps before the first stochastic one.
        trained: number of trained steps.
    """

    total: int
    prefix: int
    trained: int

    @classmethod
    def of(cls, table: StepTable) -> ImageSteps:
        """The steps of an image under a plan."""
        return cls(table.num_evaluations, table.prefix_steps, len(table.trained_steps))


def evaluations(config: TrainConfig, objective: Objective, steps: ImageSteps, columns: int) -> dict[str, int]:
    """Network evaluations of one iteration by part, without its evaluation of the gap: see the module.

    Args:
        config: configuration of the run.
        objective: loss of an optimiser step.
        steps: steps of one image.
        columns: number of columns of each image (`Objective.columns`).
    """
    images, settings = config.rollout.images_per_iteration, config.objective
    starts = images // config.rollout.images_per_prompt if config.rollout.shared_noise else images
    per_pass = images * max(1, round(settings.timestep_fraction * columns))
    pairs = per_pass * settings.num_inner_epochs
    distinct = per_pass if settings.timestep_fraction == 1 else pairs
    rollout = starts * steps.prefix + images * (steps.total - steps.prefix)
    return {"rollout": rollout, **objective.evaluations(images, steps.trained, distinct, pairs)}


def gap_evaluations(config: TrainConfig) -> int:
    """Network evaluations of one evaluation: every held-out image under the ODE and under the SDE."""
    return 2 * config.evaluation.num_images * (config.evaluation.num_steps or config.sampling.num_steps)


def evaluated(config: TrainConfig) -> list[int]:
    """The evaluated iterations: 0 (the base model), every `evaluation.every`-th and the last."""
    return sorted({*range(0, config.iterations + 1, config.evaluation.every), config.iterations})


def run_evaluations(
    config: TrainConfig, objective: Objective, table_at: Callable[[int], StepTable]
) -> dict[str, tuple[int, int, int]]:
    """Network evaluations by part: fewest and most of an iteration, and the sum over the run.

    Args:
        config: configuration of the run.
        objective: loss of an optimiser step.
        table_at: plan of each iteration from 1 on; a window that moves changes it.
    """
    tables = map(table_at, range(1, config.iterations + 1))
    cases = Counter((ImageSteps.of(table), objective.columns(table)) for table in tables)
    parts = [(evaluations(config, objective, *case), times) for case, times in cases.items()]
    result = {
        part: (
            min(counts[part] for counts, _ in parts),
            max(counts[part] for counts, _ in parts),
            sum(counts[part] * times for counts, times in parts),
        )
        for part in parts[0][0]
    }
    one = gap_evaluations(config)
    base = one // 2 if config.lora.init is not None else 0  # at first, images of the base model as well
    return result | {"evaluation": (one, one + base, one * len(evaluated(config)) + base)}


def resolved(config: TrainConfig, out: Path, resume: bool = False, policy: TrainablePolicy | None = None) -> str:
    """The resolved configuration as YAML, followed by the cost of the run as comments: itself a recipe.

    Args:
        config: configuration of the run.
        out: directory of the run.
        resume: whether the run would continue the one in `out`.
        policy: model to count on. Default: an outline, which reads the model's configuration and
            none of its weights.

    Raises:
        EtudeError: the run would be refused.
    """
    from etude.policies.loading import load_source
    from etude.policies.source import ModelSource
    from etude.prompts import load_prompts
    from etude.training.blueprint import Blueprint
    from etude.training.evaluation import SamplerPair, count_trained
    from etude.training.memory_estimate import memory_estimate

    blueprint = Blueprint.of(config, out, resume)
    policy = policy or load_source(ModelSource.of(config), outline=True)
    schedule = blueprint.schedule(policy)
    SamplerPair(config).check(policy)
    count_trained(load_prompts(config.prompts.evaluation).head(config.evaluation.num_images), blueprint.prompts)
    blueprint.make_trainable(policy)
    trained = sum(parameter.numel() for parameter in policy.trainable().values())
    whole = sum(parameter.numel() for parameter in policy.network.parameters())
    counts = run_evaluations(config, blueprint.objective, schedule.table_at)
    lines = [
        essence(config),
        f"trained parameters: {trained:,} of the network's {whole:,}",
        *_table(counts, len(evaluated(config)), config.iterations),
        *_memory(memory_estimate(blueprint, policy, schedule)),
        *_models_of_rewards([*config.rewards, *config.evaluation.held_out_rewards]),
    ]
    return config.to_yaml() + "".join(f"# {line}\n" for line in lines)


def _table(counts: Mapping[str, tuple[int, int, int]], evaluated: int, iterations: int) -> list[str]:
    """Rows of the parts that are not empty, and the sum over the run."""
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
    """One line on the memory of the rewards' networks, as far as it is known; none without networks."""
    from etude.rewards.reward import CLOSED_FORMS, WEIGHTS_GB

    networks = [name for name in dict.fromkeys(names) if name not in CLOSED_FORMS]
    sizes = {name: WEIGHTS_GB.get(name.partition(":")[0]) for name in networks}
    listed = ", ".join(f"{name} {f'{size:g} GB' if size else 'of unknown size'}" for name, size in sizes.items())
    return [f"models of rewards come on top, in float32: {listed}"] if listed else []


def _memory(parts: Mapping[str, int]) -> list[str]:
    from etude.training.memory_estimate import readable

    rows = [(name, readable(size)) for name, size in parts.items()]
    title = "memory of the accelerator, each process, without models of rewards"
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [title, *(f"  {name.ljust(widths[0])}  {size.rjust(widths[1])}" for name, size in rows)]
