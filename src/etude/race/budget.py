"""The budget of a race: network evaluations of training, counted before a run starts.

    forward                        1 for each image at one step
    forward with its backward      3
    classifier-free guidance       twice, since the network answers with and without the prompt

The evaluations of a run are not counted: they watch the run and teach it nothing. Counts are those of
`etude.training.dry_run`; decoding and rewards are in the seconds alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from etude.config import TrainConfig
from etude.errors import EtudeError
from etude.learning.objectives import Keep
from etude.policies import TrainablePolicy
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.training.blueprint import make_algorithm
from etude.training.dry_run import ImageSteps, evaluations
from etude.training.schedule import PlanSchedule

_SEEDLESS = ("progressive", "decay", "fixed")
"""Windows whose place is the same under every seed."""
BACKWARD = 2
"""Cost of a backward pass, in forwards."""


class Counter:
    """Counts the network evaluations of configurations. Each model is read once, as an outline without weights."""

    def __init__(self) -> None:
        self._policies: dict[ModelSource, TrainablePolicy] = {}
        self._spent: dict[str, tuple[list[int], Iterator[dict[str, int]]]] = {}

    def parts(self, config: TrainConfig) -> Iterator[dict[str, int]]:
        """Yield the cost of each iteration from the first on, by part, without end."""
        source, sampling, (objective, _) = ModelSource.of(config), config.sampling, make_algorithm(config)
        policy = self._policies[source] = self._policies.get(source) or load_source(source, outline=True)
        grid, trains_steps = policy.grid(sampling.num_steps), objective.keep is Keep.TRANSITIONS
        schedule = PlanSchedule(sampling, grid, config.seed, "cpu", config.iterations, trains_steps)
        guided = getattr(policy, "classifier_free", False) and sampling.guidance_scale > getattr(policy, "off", 1.0)
        iteration = 0
        while True:
            iteration += 1
            table = schedule.table_at(iteration)
            steps = ImageSteps(table.num_evaluations, table.prefix_steps, len(table.trained_steps))
            counts = evaluations(config, objective, steps, objective.columns(table))
            backward = (
                config.rollout.images_per_iteration * steps.trained
                if config.objective.gradients == "rollout"
                else counts["replay"]
            )
            yield {name: (1 + guided) * count for name, count in {**counts, "backward": BACKWARD * backward}.items()}

    def spent(self, config: TrainConfig, iterations: int | None = None) -> list[int]:
        """The cost up to the end of each iteration, from 0 before the first on. Default: all of the run's."""
        count = config.iterations if iterations is None else iterations
        # Runs that differ in rewards, rates, prompts and mostly in seeds cost the same.
        fixed = config.sampling.window is None or config.sampling.window.strategy in _SEEDLESS
        key = json.dumps([
            str(ModelSource.of(config)), None if fixed else config.seed,
            *(getattr(config, name).model_dump(mode="json") for name in ("sampling", "rollout", "objective")),
        ])  # fmt: skip
        costs, parts = self._spent.setdefault(key, ([0], self.parts(config)))
        while len(costs) <= count:
            costs.append(costs[-1] + sum(next(parts).values()))
        return costs[: count + 1]

    def iterations(self, config: TrainConfig, budget: int) -> int:
        """The number of whole iterations that a budget pays for.

        Raises:
            EtudeError: it does not pay for one.
        """
        count = 0
        while self.spent(config, count + 1)[-1] <= budget:
            count += 1
        if count == 0:
            one = self.spent(config, 1)[-1]
            raise EtudeError(
                f"one iteration costs {one:,} network evaluations, more than the budget of {budget:,}: raise the budget, or "
                "lower rollout.images_per_iteration."
            )
        return count
