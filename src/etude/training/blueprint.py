"""The objects that a configuration builds before a model is loaded, so that a refused run loads none."""

from __future__ import annotations

from pathlib import Path

from etude.config import TrainConfig
from etude.errors import EtudeError
from etude.learning.advantages import Advantage, make_advantage
from etude.learning.objectives import Keep, Objective, make_objective
from etude.learning.objectives.policy_gradient import PolicyGradient
from etude.learning.optimizers import check_optimizer
from etude.measuring.pairs import fewest_images
from etude.policies import TrainablePolicy
from etude.policies.source import ModelSource
from etude.prompts import load_prompts
from etude.rewards import WeightedRewards, check_group_size
from etude.runs.layout import check_directory
from etude.sampling.solvers import Solver
from etude.training.inputs import Inputs, digests_before_loading
from etude.training.offline import OfflinePairs
from etude.training.schedule import PlanSchedule, check_sampling
from etude.training.trackers import Trackers
from etude.undisturbed import undisturbed


def make_algorithm(config: TrainConfig) -> tuple[Objective, Advantage]:
    """The objective and the advantage of a configuration, checked (EtudeError) without reading a file."""
    with undisturbed():
        objective, advantage = make_objective(config.objective), make_advantage(config)
    check_sampling(config.sampling, objective.keep is Keep.TRANSITIONS)
    sampling = config.sampling
    if objective.by_group and config.rollout.images_per_prompt < 2:
        raise EtudeError(
            f"objective.kind = {config.objective.kind} compares the images of a group: set rollout.images_per_prompt to at least 2, not "
            f"{config.rollout.images_per_prompt}."
        )
    if config.objective.gradients == "rollout" and (
        not isinstance(objective, PolicyGradient) or objective.needs_reference or objective.keeps_means
    ):
        raise EtudeError(
            f"objective.gradients = rollout is for ppo and reinforce without a KL, kl_limit or normalised ratio, not for "
            f"objective.kind = {config.objective.kind} as it is set: set objective.gradients to replay."
        )
    if config.objective.mismatch_limit is not None and not isinstance(objective, PolicyGradient):
        raise EtudeError(
            f"objective.mismatch_limit is for log-probabilities of steps, which objective.kind = {config.objective.kind} has "
            "none of: set it to null."
        )
    if config.rollout.shared_noise and (sampling.solver is not None or max(sampling.all_etas) == 0):
        raise EtudeError(
            "rollout.shared_noise = true makes the images of a group equal under a deterministic sampler: set it to false."
        )
    return objective, advantage


class Blueprint:
    """The parts of a run that need no model, the rewards not yet loaded, each checked (EtudeError)."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        resume: bool = False,
        accept_changes: bool = False,
        policy: TrainablePolicy | None = None,
    ) -> None:
        check_directory(out, resume)
        check_optimizer(config.optimizer)
        self.config, self.trackers = config, Trackers(config.trackers, out)
        self.objective, self.advantage = make_algorithm(config)
        solver, steps, guidance = config.sampling.solver, config.sampling.num_steps, config.sampling.guidance_scale
        self.solver = Solver(solver, steps, guidance) if solver else None
        held_out = config.evaluation.held_out_rewards
        self.rewards = WeightedRewards(config.rewards, held_out, offload=config.memory.offload)
        self.prompts, self.evaluation_prompts = map(load_prompts, (config.prompts.train, config.prompts.evaluation))
        self.offline = OfflinePairs(self.objective.pairs, config) if self.objective.pairs else None
        source = ModelSource.of(config) if policy is None else policy.source
        self.inputs = Inputs(config, out, resume, accept_changes)
        each = config.evaluation.images_per_prompt or 1
        evaluated = self.evaluation_prompts.head(config.evaluation.num_images // each)
        check_group_size(config.rewards, config.rollout.images_per_prompt, "rollout.images_per_prompt")
        shown = fewest_images(evaluated, config.evaluation.num_images)
        check_group_size([*config.rewards, *held_out], shown, "evaluation.images_per_prompt")
        self.inputs.take(digests_before_loading(config, source, self.prompts, evaluated))

    @property
    def needs_reference(self) -> bool:
        """Whether the run needs the model before training: for its loss, or to measure the KL from it."""
        return self.objective.needs_reference or self.config.evaluation.path_kl

    def check_groups(self, processes: int) -> None:
        """Refuses a group that is cut between two processes if a reward or the objective compares its images.

        Gradients of the rollout are refused in several processes.
        """
        if processes > 1 and self.config.objective.gradients == "rollout":
            raise EtudeError(
                f"objective.gradients = rollout is for one process, and there are {processes}: set it to replay."
            )
        rollout = self.config.rollout
        groups = rollout.images_per_iteration // rollout.images_per_prompt
        if (self.rewards.whole_groups or self.objective.by_group) and groups % processes:
            who = "the objective" if self.objective.by_group else "a reward"
            raise EtudeError(
                f"{who} compares the images of a group, and the {groups} groups of an iteration do not divide among {processes} "
                "processes: change rollout.images_per_iteration, rollout.images_per_prompt or the number of processes."
            )

    def schedule(self, policy: TrainablePolicy) -> PlanSchedule:
        """The plan of each iteration on the noise levels of a policy, which must allow the solver, too."""
        if self.solver is not None:
            self.solver.check(policy)
        config, trains_steps = self.config, self.objective.keep is Keep.TRANSITIONS
        grid = policy.grid(config.sampling.num_steps)
        return PlanSchedule(config.sampling, grid, config.seed, policy.device, config.iterations, trains_steps)

    def make_trainable(self, policy: TrainablePolicy) -> None:
        """Adds the adapter to a policy, takes the one to train on from, or makes the whole network trainable.

        Raises:
            EtudeError: the policy was made trainable before, so its weights are not the base model's.
        """
        config = self.config
        if policy.in_training:
            raise EtudeError(
                "the policy has been made trainable before, by a Trainer, add_lora or train_everything, and a second run would take "
                "its tuned weights for the base model: load another policy (etude.load_policy), or leave out `policy`."
            )
        if config.memory.gradient_checkpointing:
            policy.enable_gradient_checkpointing()
        if config.lora.init is not None:
            policy.continue_lora(Path(config.lora.init).expanduser())
        elif config.lora.rank:
            policy.add_lora(config.lora, config.seed)
        else:
            policy.train_everything(keep_reference=self.needs_reference)
        if not config.autocast:
            policy.leave_autocast()
        policy.in_training = True
