"""The cost of a run, counted before it starts: network evaluations, trained parameters and memory.

One evaluation is the network's answer for one image at one step, with or without guidance. An
iteration has n images, each with T steps. The first P are deterministic, and K are trained:

    rollout      n T, or g P + n (T - P) if the images of each of g groups share their initial noise;
                 n times those of `sampling.solver`, if there is one; 0 for pairs of a file
    reference    n K with a KL to the reference model
    replay       n max(1, round(timestep_fraction K)) num_inner_epochs; 0 with gradients of the rollout
    evaluation   2 evaluation.num_images N, N steps of the ODE and of the SDE, where one is due; with
                 evaluation.path_kl up to N more an image, for the reference model

The counts are those of a run in one process: only there do images with the same noise share steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from etude.batching import AUTO
from etude.config import TrainConfig
from etude.config.algorithm import essence
from etude.learning.objectives import Objective
from etude.policies import TrainablePolicy
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.rewards.reward import CLOSED_FORMS, WEIGHTS_GB
from etude.sampling.plans import StepTable
from etude.sampling.solvers import Solver
from etude.training.blueprint import Blueprint
from etude.training.evaluation import SamplerPair, count_trained
from etude.training.memory_estimate import IN_ALL, memory_estimate, readable
from etude.training.schedule import PlanSchedule


class ImageSteps(NamedTuple):
    """The numbers of an image's steps: all, those before the first stochastic one, and the trained ones."""

    total: int
    prefix: int
    trained: int


def evaluations(config: TrainConfig, objective: Objective, steps: ImageSteps, columns: int) -> dict[str, int]:
    """Network evaluations of one iteration by part, for `columns` columns an image (`Objective.columns`)."""
    images, settings = config.rollout.images_per_iteration, config.objective
    starts = images // config.rollout.images_per_prompt if config.rollout.shared_noise else images
    rows = images // config.rollout.images_per_prompt if objective.by_group else images
    per_pass = rows * max(1, round(settings.timestep_fraction * columns))
    pairs = per_pass * settings.num_inner_epochs
    distinct = per_pass if settings.timestep_fraction == 1 else pairs
    rollout = starts * steps.prefix + images * (steps.total - steps.prefix)
    if objective.pairs is not None:
        rollout = 0
    elif config.sampling.solver is not None:
        rollout = images * Solver(config.sampling.solver, config.sampling.num_steps).evaluations
    parts = {"rollout": rollout, **objective.evaluations(images, steps.trained, distinct, pairs)}
    return parts | {"replay": 0} if settings.gradients == "rollout" else parts


def gap_evaluations(config: TrainConfig) -> int:
    """Network evaluations of one evaluation: every held-out image under the ODE, the SDE and the deployed sampler.

    The KL of the SDE's path counts as one more at each step, also where the step is deterministic.
    """
    pair, with_kl = SamplerPair(config), config.evaluation.path_kl
    return config.evaluation.num_images * ((2 + with_kl) * pair.num_steps + pair.deployed_evaluations)


def base_evaluations(config: TrainConfig) -> int:
    """Network evaluations of the base model in the first evaluation; 0 where it is the model that is evaluated."""
    pair = SamplerPair(config)
    images = config.evaluation.num_images if config.lora.init is not None else 0
    return images * (pair.num_steps + pair.deployed_evaluations)


def evaluated(config: TrainConfig) -> list[int]:
    """The evaluated iterations: 0 (the base model), every `evaluation.every`-th and the last."""
    return sorted({*range(0, config.iterations + 1, config.evaluation.every), config.iterations})


def run_evaluations(
    config: TrainConfig, objective: Objective, table_at: Callable[[int], StepTable]
) -> dict[str, tuple[int, int, int]]:
    """Network evaluations by part: fewest and most of an iteration, and the sum over the run.

    `table_at` is the plan of each iteration from 1 on; a window that moves changes it.
    """
    cases: Counter[tuple[ImageSteps, int]] = Counter()
    for table in map(table_at, range(1, config.iterations + 1)):
        steps = ImageSteps(table.num_evaluations, table.prefix_steps, len(table.trained_steps))
        cases[steps, objective.columns(table)] += 1
    counts = {case: evaluations(config, objective, *case) for case in cases}
    result = {}
    for part in next(iter(counts.values())):
        numbers = [count[part] for count in counts.values()]
        result[part] = min(numbers), max(numbers), sum(counts[case][part] * times for case, times in cases.items())
    one, base = gap_evaluations(config), base_evaluations(config)
    return result | {"evaluation": (one, one + base, one * len(evaluated(config)) + base)}


def outlined(
    config: TrainConfig,
    out: Path,
    resume: bool = False,
    policy: TrainablePolicy | None = None,
    accept_changes: bool = False,
) -> tuple[Blueprint, TrainablePolicy, PlanSchedule]:
    """The parts of a run, its model made trainable and its plans: an outline unless a policy is given.

    Arguments and errors are those of `resolved`.
    """
    blueprint = Blueprint(config, out, resume, accept_changes, policy)
    policy = policy or load_source(blueprint.inputs.pinned(ModelSource.of(config)), outline=True)
    schedule = blueprint.schedule(policy)
    SamplerPair(config).check(policy)
    count = config.evaluation.num_images // (config.evaluation.images_per_prompt or 1)
    count_trained(blueprint.evaluation_prompts.head(count), blueprint.prompts)
    blueprint.make_trainable(policy)
    return blueprint, policy, schedule


def resolved(
    config: TrainConfig,
    out: Path,
    resume: bool = False,
    policy: TrainablePolicy | None = None,
    accept_changes: bool = False,
) -> str:
    """The resolved configuration as YAML, followed by the cost of the run as comments: itself a recipe.

    Args:
        resume: whether the run would continue the one in `out`.
        policy: model to count on. Default: an outline, which reads no weights.
        accept_changes: whether the run would go on with inputs that have changed.

    Raises:
        EtudeError: the run would be refused.
    """
    blueprint, policy, schedule = outlined(config, out, resume, policy, accept_changes)
    trained = sum(parameter.numel() for parameter in policy.trainable().values())
    whole = sum(parameter.numel() for parameter in policy.network.parameters())
    memory = "memory of the accelerator, each process, without models of rewards"
    sizes = memory_estimate(blueprint, policy, schedule)
    if IN_ALL not in sizes:
        memory += f", and without activations: not reckoned, since the {policy.pipeline_name} computes with numbers"
    lines = [
        essence(config),
        f"trained parameters: {trained:,} of the network's {whole:,}",
        *_table(run_evaluations(config, blueprint.objective, schedule.table_at), config),
        memory,
        *(f"  {line}" for line in _aligned([(name, readable(size)) for name, size in sizes.items()])),
        *_automatic_sizes(config),
        *_models_of_rewards([*config.rewards, *config.evaluation.held_out_rewards]),
    ]
    return config.to_yaml() + "".join(f"# {line}\n" for line in lines)


def _table(counts: Mapping[str, tuple[int, int, int]], config: TrainConfig) -> list[str]:
    """Rows of the parts that are not empty, and the sum over the run."""
    rows = [("network evaluations, one image at one step", "each", "times", "in all")]
    for part, (low, high, total) in counts.items():
        if total:
            each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            times = len(evaluated(config)) if part == "evaluation" else config.iterations
            rows.append((part, each, f"{times:,}", f"{total:,}"))
    rows.append(("total", "", "", f"{sum(total for _, _, total in counts.values()):,}"))
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The rows as lines: the first column to the left, the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    ]


def _automatic_sizes(config: TrainConfig) -> list[str]:
    """A line on the batch sizes that the run is to find."""
    sizes = {
        "rollout.batch_size": config.rollout.batch_size,
        "objective.batch_size": config.objective.batch_size,
        "memory.decode_batch_size": config.memory.decode_batch_size,
    }
    names = [name for name, size in sizes.items() if size == AUTO]
    return [f"counted with one sample, and as many as fit in the run: {', '.join(names)}"] if names else []


def _models_of_rewards(names: list[str]) -> list[str]:
    """One line on the memory of the rewards' networks, as far as it is known; none without networks."""
    networks = [name for name in dict.fromkeys(names) if name not in CLOSED_FORMS]
    sizes = {name: WEIGHTS_GB.get(name.partition(":")[0]) for name in networks}
    listed = ", ".join(f"{name} {f'{size:g} GB' if size else 'of unknown size'}" for name, size in sizes.items())
    return [f"models of rewards come on top, in float32: {listed}"] if listed else []
