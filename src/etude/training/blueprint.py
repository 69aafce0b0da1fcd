"""The objects that a configuration builds before a model is loaded, so that a refused run loads none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from etude.config import TrainConfig
from etude.errors import EtudeError
from etude.learning.advantages import Advantage, make_advantage
from etude.learning.objectives import Keep, Objective, make_objective
from etude.learning.optimizers import check_optimizer
from etude.policies import TrainablePolicy
from etude.prompts import PromptSet, load_prompts
from etude.rewards import WeightedRewards
from etude.runs.layout import check_directory
from etude.training.schedule import PlanSchedule, check_sampling
from etude.undisturbed import undisturbed


def make_algorithm(config: TrainConfig) -> tuple[Objective, Advantage]:
    """Builds the objective and the advantage of a configuration, and checks that its sampling suits them.

    No file is read and no model is loaded.

    Raises:
        EtudeError: one of them refuses its settings, or the sampling cannot be trained with.
    """
    with undisturbed():
        objective, advantage = make_objective(config.objective), make_advantage(config)
    check_sampling(config.sampling, objective.keep is Keep.TRANSITIONS)
    return objective, advantage


@dataclass(frozen=True)
class Blueprint:
    """The parts of a run that need no model.

    Attributes:
        config: configuration of the run.
        objective: loss of an optimiser step.
        advantage: comparison of rewards.
        rewards: trained and held-out rewards, not yet loaded.
        prompts: training prompts.
    """

    config: TrainConfig
    objective: Objective
    advantage: Advantage
    rewards: WeightedRewards
    prompts: PromptSet

    @classmethod
    def of(cls, config: TrainConfig, out: Path, resume: bool = False) -> Blueprint:
        """Builds the parts of a configuration and checks directory, optimiser and sampling.

        Raises:
            EtudeError: one of them cannot be used.
        """
        check_directory(out, resume)
        check_optimizer(config.optimizer)
        objective, advantage = make_algorithm(config)
        rewards = WeightedRewards(
            config.rewards, held_out=config.evaluation.held_out_rewards, offload=config.memory.offload
        )
        return cls(config, objective, advantage, rewards, load_prompts(config.prompts.train))

    def check_groups(self, processes: int) -> None:
        """Refuses a group that is cut between two processes if a reward compares the images of a group.

        Raises:
            EtudeError: the number of groups is not a multiple of the number of processes.
        """
        rollout = self.config.rollout
        groups = rollout.images_per_iteration // rollout.images_per_prompt
        if self.rewards.whole_groups and groups % processes:
            raise EtudeError(
                f"a reward compares the images of a group, and the {groups} groups of an iteration do not divide among {processes} "
                "processes: change rollout.images_per_iteration, rollout.images_per_prompt or the number of processes."
            )

    def schedule(self, policy: TrainablePolicy) -> PlanSchedule:
        """The plan of each iteration on the noise levels of a policy."""
        config = self.config
        return PlanSchedule(
            config.sampling,
            policy.grid(config.sampling.num_steps),
            config.seed,
            policy.device,
            config.iterations,
            self.objective.keep is Keep.TRANSITIONS,
        )

    def make_trainable(self, policy: TrainablePolicy) -> None:
        """Adds the adapter to a policy, or makes its whole network trainable."""
        config = self.config
        if config.memory.gradient_checkpointing:
            policy.enable_gradient_checkpointing()
        if config.lora.rank:
            policy.add_lora(config.lora, config.seed)
        else:
            policy.train_everything(keep_reference=self.objective.needs_reference)
