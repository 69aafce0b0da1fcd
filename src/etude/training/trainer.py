"""The loop: prompts, rollout under the training plan, rewards, advantages, optimiser steps, evaluation.

`_iterate` is the algorithm. Beside it stand durability, supervision and results (`durability.py`,
`supervision.py`, `finish.py`). All randomness is keyed by (seed, stream, iteration, sample, step): a
resumed run ends with the same bits as one that never stopped.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from etude.config import TrainConfig
from etude.files import locked, made
from etude.learning.advantages import zero_std_ratio
from etude.learning.draws import Draw, draw
from etude.learning.exchange import gather
from etude.learning.objectives import Samples
from etude.learning.optimizers import make_optimizer
from etude.learning.update import Learner
from etude.policies import TrainablePolicy
from etude.policies.attention import AttentionBackend
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.policies.trainable import swapped
from etude.sampling.plans import StepTable
from etude.training import finish
from etude.training.blueprint import Blueprint
from etude.training.dry_run import run_evaluations
from etude.training.durability import Durability, RunState
from etude.training.evaluation import Evaluation
from etude.training.guards import BestWeights
from etude.training.inputs import digests_after_loading
from etude.training.processes import end_training, failing_together, make_accelerator, prepare
from etude.training.progress import Display, OutlivedDisplay, SilentDisplay
from etude.training.reward_queue import Scorer
from etude.training.sizes import BatchSizes
from etude.training.speed import choose_compilation, matrix_products
from etude.training.supervision import Supervisor
from etude.training.training_sampler import TrainingSampler
from etude.undisturbed import undisturbed


class Trainer:
    """Fine-tunes a policy with a stochastic sampler, and evaluates it with the deterministic one.

    Args:
        config: settings of the run, which determine it completely.
        out: directory of the run.
        resume: continue the run that `out` holds.
        display: display of the progress. Default: none.
        policy: policy to train. Default: `config.model` is loaded.
        accept_changes: when resuming, go on with a prompt file, a model or a reward that has changed,
            with a warning. Default: refuse.

    Raises:
        EtudeError: for anything the user can mend; what was finished before stays in `out`.
        Interrupted: from `train`, after SIGINT or another signal of `etude.training.supervision`, with
            every finished iteration saved.

    Example:
        >>> import etude
        >>> small = {"iterations": 1, "sampling.num_steps": 2, "rollout.images_per_iteration": 8}
        >>> small |= {"evaluation.num_images": 2, "evaluation.held_out_rewards": []}
        >>> trainer = etude.Trainer(etude.load_config("emoji-ddpo", small), "runs/first")
        >>> trainer.train()["iterations"]
        1
    """

    def __init__(
        self,
        config: TrainConfig,
        out: str | Path,
        resume: bool = False,
        display: Display | None = None,
        policy: TrainablePolicy | None = None,
        accept_changes: bool = False,
    ) -> None:
        self.config, self.out, self.resume = config, Path(out), resume
        self.display = OutlivedDisplay(display or SilentDisplay())
        self.blueprint = Blueprint(config, self.out, resume, accept_changes, policy)
        self.inputs, self.trackers = self.blueprint.inputs, self.blueprint.trackers
        self.objective, self.advantage = self.blueprint.objective, self.blueprint.advantage
        self.rewards, self.train_prompts = self.blueprint.rewards, self.blueprint.prompts
        self.scorer = Scorer(self.rewards, config.rollout.reward_timeout, on_wait=lambda: self.supervisor.advance(0))
        self.forms_group = not torch.distributed.is_initialized()  # then this run dissolves the process group
        self.accelerator = make_accelerator(config, self.out)
        self.blueprint.check_groups(self.accelerator.num_processes)
        self.policy = policy or load_source(self.inputs.pinned(ModelSource.of(config)), self.accelerator.device)
        self.policy.attention = AttentionBackend(config.attention.backend)
        self.schedule = self.blueprint.schedule(self.policy)
        self.sizes = BatchSizes(config, self.policy)
        self.rollout_batches = self.sizes.rollout
        prompts = self.train_prompts, self.blueprint.evaluation_prompts
        self.evaluation = Evaluation(
            config, self.policy, self.scorer, self.accelerator, self.out, self.rollout_batches, *prompts
        )
        self._prepare_training()

    def _prepare_training(self) -> None:
        """Makes the policy trainable, with optimiser, moving average, durability and learner."""
        config, policy, accelerator = self.config, self.policy, self.accelerator
        self.blueprint.make_trainable(policy)
        if config.channels_last:
            policy.use_channels_last()
        optimizer = make_optimizer(config.optimizer, policy.trainable().values())
        policy.network, prepared = prepare(accelerator, policy.network, optimizer)
        self.parameters = parameters = policy.trainable()  # `prepare` replaces sharded parameters
        counts = run_evaluations(config, self.objective, self.schedule.table_at) if config.compile == "auto" else {}
        self.compilation = choose_compilation(config, policy, sum(total for _, _, total in counts.values()))
        self.ema = {name: p.detach().clone() for name, p in parameters.items()} if config.ema.decay else None
        solver, batches = self.blueprint.solver, self.rollout_batches
        self.sampler = TrainingSampler(config, policy, parameters, self.objective, solver, batches)
        best = BestWeights(config.checkpoint.best)
        parts = self.objective, self.advantage, self.evaluation, self.inputs, self.sizes
        self.state = RunState(parameters, optimizer, self.ema, best, *parts)
        self.ledger = self.state.ledger
        self.durability = Durability(config, self.out, accelerator, self.state)
        self.supervisor = Supervisor(accelerator, self.durability, self.display)
        self.rollout_batches.adaptive = whole = not self.durability.in_parts
        self.sizes.replay.adaptive = whole
        self.sizes.check(in_parts=not whole)
        # One rehearsal before the optimiser has its moments, one after.
        rehearsals, own = 2 if whole and accelerator.num_processes > 1 else 0, self._draw(1).indices
        objective, advance = self.objective, self.supervisor.advance
        self.learner = Learner(
            config, policy, objective, accelerator, parameters, prepared, self.sizes.replay, own, rehearsals, advance
        )

    def train(self) -> dict[str, Any]:
        """Runs to the end and returns the summary that is also written to `summary.json`."""
        started = time.time()
        with ExitStack() as held:
            with failing_together(self.accelerator):
                self.rewards.load()  # before anything is written: an unusable reward leaves no run behind
                self.inputs.take(digests_after_loading(self.config, self.policy))
                if self.accelerator.is_main_process:
                    held.enter_context(made(self.out))
                    held.enter_context(locked(self.out))
            self.durability.restore(self.resume)
            with failing_together(self.accelerator):
                if self.accelerator.is_main_process:
                    held.enter_context(self.trackers.started(self.config.to_yaml()))
                    self.durability.begin()
                    self.trackers.catch_up(self.out / "metrics.jsonl")
            try:
                return self._train(started)
            except Exception:
                if not self.resume:  # so that the same command can be given again
                    self.durability.withdraw()
                raise

    def _train(self, started: float) -> dict[str, Any]:
        supervisor, unevaluated = self.supervisor, self.ledger.unevaluated
        tf32 = matrix_products(self.config, self.policy.device)
        with self.display, supervisor.interruption, supervisor.failures_explained(), self.scorer, tf32:
            if self.config.memory.offload:
                self._encode_ahead()
            if self.sizes.to_find:
                with supervisor.phase("batch sizes"):
                    with failing_together(self.accelerator):
                        self.sizes.find(self.learner, self.schedule.table_at(1), self.train_prompts.texts[0])
                    self.sizes.agree(self.accelerator)
            if self.compilation != "off":  # once the sizes are known: each would be compiled for itself
                self.policy.compile(self.compilation)
            if unevaluated is not None:
                supervisor.seconds = unevaluated["seconds"]
                self._finish_iteration(unevaluated["row"])
            if self.evaluation.base_scores is None:
                self._finish_iteration({"iteration": 0})
            while self.ledger.iteration < self.config.iterations and self.evaluation.fallen is None:
                self._finish_iteration(self._iterate())
            summary = finish.finish(self.state, finish.confirm_best(self.state, supervisor), started)
        self.display.summary_table(summary)
        end_training(self.accelerator, self.forms_group)
        return summary

    def _iterate(self) -> dict[str, Any]:
        """One rollout, or the pairs of a file, and its optimiser steps; returns the row of metrics."""
        iteration, supervisor = self.ledger.draw(), self.supervisor
        supervisor.seconds, table, batch = {}, self.schedule.table_at(iteration), self._draw(iteration)
        if (offline := self.blueprint.offline) is None:
            samples, rewarded = self._rewarded(iteration, table, batch)
        else:
            with supervisor.phase("pairs", len(batch.indices)), failing_together(self.accelerator):
                samples = offline.samples(self.policy, table, iteration, batch.indices, supervisor.advance)
            self.ledger.update()
            rewarded = {}
        passes = self.config.objective.num_inner_epochs
        with supervisor.phase("update", len(self.learner.rows) * self.objective.columns(table) * passes):
            metrics = self.learner.update(samples, iteration, self._after_step)
        row: dict[str, Any] = {"iteration": iteration, "eta": self.schedule.eta_at(iteration)}
        if (window := self.schedule.window_at(iteration)) is not None:
            row["window"] = window
        return row | rewarded | metrics

    def _rewarded(self, iteration: int, table: StepTable, batch: Draw) -> tuple[Samples, dict[str, Any]]:
        """The samples of a rollout with their advantages, and the part of the row about their rewards."""
        groups, alone = batch.groups[batch.indices].tolist(), self.accelerator.num_processes == 1
        pending = self.scorer.pending(batch.own, alone, batch.indices[0], groups)
        with self.supervisor.phase("rollout", len(batch.indices) * self.sampler.evaluations(table)):
            samples = self.sampler.draw(iteration, table, batch, pending.begin, self.supervisor.advance)
        with self.supervisor.phase("rewards"):
            with failing_together(self.accelerator):
                local = pending.result()
            scores = {name: gather(self.accelerator, values, len(batch.prompts)) for name, values in local.items()}
            self.ledger.update()
            with undisturbed():  # and on copies, since the metrics need the scores
                own = {name: values.clone() for name, values in scores.items()}
                advantages = self.advantage(own, [*batch.prompts.texts], batch.groups.clone()).float()
        row: dict[str, Any] = {
            "reward": {n: {"mean": v.mean().item(), "std": v.std(correction=0).item()} for n, v in scores.items()}
        }
        if self.config.rollout.images_per_prompt > 1:
            row["zero_std_ratio"] = zero_std_ratio(self.rewards.combine(scores), batch.groups, advantages)
        return samples.judged(advantages[batch.indices].to(self.policy.device)), row

    def _draw(self, iteration: int) -> Draw:
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        return draw(self.train_prompts, self.config.rollout, self.config.seed, iteration, processes, index)

    def _after_step(self) -> None:
        """Updates the moving average after an optimiser step; obeys a signal to several processes."""
        for name, average in (self.ema or {}).items():
            average.lerp_(self.parameters[name].detach(), 1 - self.config.ema.decay)
        if self.accelerator.num_processes > 1:
            self.supervisor.end_if_asked()

    def _finish_iteration(self, row: dict[str, Any]) -> None:
        """Evaluates if due, then makes the iteration durable."""
        config, supervisor, iteration = self.config, self.supervisor, self.ledger.iteration
        last = iteration == config.iterations
        if iteration % config.evaluation.every == 0 or last:
            grids = "after" if last else "before" if iteration == 0 else None
            evaluating, phase = self.ledger.evaluating(row, supervisor.seconds), supervisor.phase
            with evaluating, phase("evaluation", self.evaluation.work), swapped(self.parameters, self.ema):
                row["evaluation"] = self.evaluation.measure(supervisor.advance, grids, iteration)
                self.state.best.offer(iteration, row["evaluation"], self.parameters)
            if config.evaluation.image_scores:
                row["scores"] = self.evaluation.scores
        last = last or self.evaluation.fallen is not None
        row["seconds"] = {**supervisor.seconds, "total": sum(supervisor.seconds.values())}
        row["memory_mb"] = finish.peak_memory_mb()
        self.durability.write(
            row, last or iteration % config.checkpoint.every == 0 or supervisor.interruption.arrived(self.accelerator)
        )
        self.trackers.tell(row)
        self.display.iteration(row)

    def _encode_ahead(self) -> None:
        """Encodes every prompt that this process will use; then text encoders are not needed."""
        self.display.phase("encoding")
        offline = self.blueprint.offline
        texts = dict.fromkeys(self.evaluation.measurement.shown(self.evaluation.samples).texts)
        for iteration in range(self.ledger.iteration + 1, self.config.iterations + 1):
            texts |= dict.fromkeys(self._draw(iteration).own.texts if offline is None else offline.captions(iteration))
        self.policy.encode_ahead(texts)
