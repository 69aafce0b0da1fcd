"""The loop: prompts, rollout under the training plan, rewards, advantages, optimiser steps, evaluation.

`_iterate` is the algorithm. Beside it stand the durability of a run (`ledger.py`, `state.py`) and
its results (`finish.py`). All randomness is keyed by (seed, stream, iteration, sample, step), so a
run that is killed and resumed ends with the same bits as one that never stopped.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etude.batching import MicroBatch
from etude.config import TrainConfig
from etude.files import append_line, atomic_write_text, locked
from etude.learning.advantages import zero_std_ratio
from etude.learning.draws import Draw, draw
from etude.learning.exchange import gather
from etude.learning.objectives import Samples
from etude.learning.optimizers import make_optimizer
from etude.learning.update import Learner
from etude.policies import TrainablePolicy
from etude.policies.loading import DTYPES, load_source
from etude.policies.sharding import assembled, sharded
from etude.policies.source import ModelSource
from etude.policies.trainable import swapped
from etude.runs.checkpoint import Checkpoints
from etude.runs.layout import BEST, clear_half_written, truncate_metrics
from etude.sampling.noise import NoiseSource
from etude.sampling.plans import StepTable
from etude.sampling.rollout import rollout
from etude.training import finish
from etude.training.best import BestWeights, confirmation
from etude.training.blueprint import Blueprint
from etude.training.evaluation import Evaluation
from etude.training.ledger import Ledger
from etude.training.processes import (
    check_same_directory,
    end_training,
    failing_together,
    make_accelerator,
    prepare,
    tell_of_other_processes,
)
from etude.training.progress import Display, SilentDisplay
from etude.training.reward_queue import PendingScores, Scorer
from etude.training.state import RunState
from etude.training.supervision import Supervisor
from etude.undisturbed import undisturbed


class Trainer:
    """Fine-tunes a policy with a stochastic sampler, and evaluates it with the deterministic one.

    Args:
        config: settings of the run, which determine it completely.
        out: directory of the run.
        resume: continue the run that `out` holds.
        display: display of the progress. Default: none.
        policy: policy to train. Default: `config.model` is loaded.

    Raises:
        EtudeError: for anything the user can mend; what was finished before stays in `out`.
        Interrupted: from `train`, after SIGINT or SIGTERM, with every finished iteration saved.

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
    ) -> None:
        self.config, self.out, self.resume = config, Path(out), resume
        self.display: Display = display or SilentDisplay()
        self.blueprint = Blueprint.of(config, self.out, resume)
        self.objective, self.advantage = self.blueprint.objective, self.blueprint.advantage
        self.rewards, self.train_prompts = self.blueprint.rewards, self.blueprint.prompts
        self.scorer = Scorer(self.rewards, config.rollout.reward_timeout, on_wait=lambda: self.supervisor.advance(0))
        self.forms_group = not torch.distributed.is_initialized()  # then this run dissolves the process group
        self.accelerator = make_accelerator(config, self.out)
        self.blueprint.check_groups(self.accelerator.num_processes)
        self.policy = policy or load_source(ModelSource.of(config), self.accelerator.device)
        self.schedule = self.blueprint.schedule(self.policy)
        self.rollout_dtype = DTYPES[config.rollout.dtype] if config.rollout.dtype else None
        self.rollout_batches = MicroBatch(config.rollout.batch_size, "rollout.batch_size")
        self.evaluation = Evaluation(
            config, self.policy, self.scorer, self.accelerator, self.out, self.rollout_batches, self.train_prompts
        )
        self.best, self.checkpoints = BestWeights(config.checkpoint.best), Checkpoints(self.out, config)
        self.ledger = Ledger()
        self.supervisor = Supervisor(self.accelerator, self.ledger, self.checkpoints, self.display)
        self._prepare_training()

    def _prepare_training(self) -> None:
        """Makes the policy trainable, with optimiser, moving average, learner and state."""
        config = self.config
        self.blueprint.make_trainable(self.policy)
        optimizer = make_optimizer(config.optimizer, self.policy.trainable().values())
        self.policy.network, prepared = prepare(self.accelerator, self.policy.network, optimizer)
        self.parameters = self.policy.trainable()  # `prepare` replaces sharded parameters
        self.in_parts = sharded(self.parameters)
        self.ema = {n: p.detach().clone() for n, p in self.parameters.items()} if config.ema.decay else None
        self.rollout_batches.adaptive = not self.in_parts
        copies = self.accelerator.num_processes > 1 and not self.in_parts
        self.learner = Learner(
            config,
            self.policy,
            self.objective,
            self.accelerator,
            self.parameters,
            prepared,
            MicroBatch(config.objective.batch_size, "objective.batch_size", adaptive=not self.in_parts),
            self._draw(1).indices,
            rehearsals=2 if copies else 0,  # one before the optimiser has its moments, one after
            on_step=self.supervisor.advance,
        )
        self.state = RunState(
            self.parameters,
            optimizer,
            self.ema,
            self.best,
            self.objective,
            self.advantage,
            self.evaluation,
            self.ledger,
        )

    def train(self) -> dict[str, Any]:
        """Runs to the end and returns the summary that is also written to `summary.json`."""
        started = time.time()
        with ExitStack() as lock:
            with failing_together(self.accelerator):
                self.rewards.load()  # before anything is written: an unusable reward leaves no run behind
                if self.accelerator.is_main_process:
                    self.out.mkdir(parents=True, exist_ok=True)
                    lock.enter_context(locked(self.out))
            return self._train(started)

    def _train(self, started: float) -> dict[str, Any]:
        self._restore()
        with failing_together(self.accelerator):
            if self.accelerator.is_main_process:
                self._begin_writing()
        if self.config.trackers:
            self.accelerator.init_trackers("etude", config={"config": self.config.to_yaml()})
        supervisor = self.supervisor
        with (
            self.display,
            supervisor.interruption,
            supervisor.failures_explained(self._save, self.in_parts),
            self.scorer,
        ):
            if self.config.memory.offload:
                self._encode_ahead()
            if self.ledger.unevaluated is not None:
                self.supervisor.seconds = self.ledger.unevaluated["seconds"]
                self._finish_iteration(self.ledger.unevaluated["row"])
            if self.evaluation.base_scores is None:
                self._finish_iteration({"iteration": 0})
            while self.ledger.iteration < self.config.iterations and self.evaluation.fallen is None:
                self._finish_iteration(self._iterate())
            summary = self._finish(started)
        self.display.summary_table(summary)
        end_training(self.accelerator, self.forms_group)
        return summary

    def _iterate(self) -> dict[str, Any]:
        """One rollout and its optimiser steps; returns the row of metrics."""
        iteration = self.ledger.draw()
        self.supervisor.seconds, table, batch = {}, self.schedule.table_at(iteration), self._draw(iteration)
        groups, alone = batch.groups[batch.indices].tolist(), self.accelerator.num_processes == 1
        pending = self.scorer.pending(batch.own, alone, batch.indices[0], groups)
        with self.supervisor.phase("rollout", len(batch.indices) * table.num_evaluations):
            samples = self._rollout(iteration, table, batch, pending)
        with self.supervisor.phase("rewards"):
            with failing_together(self.accelerator):
                local = pending.result()
            scores = {name: gather(self.accelerator, values, len(batch.prompts)) for name, values in local.items()}
            self.ledger.update()
            with undisturbed():  # and on copies, since the metrics need the scores
                own = {name: values.clone() for name, values in scores.items()}
                advantages = self.advantage(own, [*batch.prompts.texts], batch.groups.clone()).float()
        samples = samples.judged(advantages[batch.indices].to(self.policy.device))
        passes = self.config.objective.num_inner_epochs
        with self.supervisor.phase("update", len(batch.indices) * self.objective.columns(table) * passes):
            metrics = self.learner.update(samples, iteration, self._after_step)
        window, has_groups = self.schedule.window_at(iteration), self.config.rollout.images_per_prompt > 1
        idle = zero_std_ratio(self.rewards.combine(scores), batch.groups, advantages) if has_groups else None
        return {
            "iteration": iteration,
            "eta": self.schedule.eta_at(iteration),
            **({} if window is None else {"window": window}),
            "reward": {n: {"mean": v.mean().item(), "std": v.std(correction=0).item()} for n, v in scores.items()},
            **({} if idle is None else {"zero_std_ratio": idle}),
            **metrics,
        }

    def _draw(self, iteration: int) -> Draw:
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        return draw(self.train_prompts, self.config.rollout, self.config.seed, iteration, processes, index)

    def _rollout(self, iteration: int, table: StepTable, batch: Draw, pending: PendingScores) -> Samples:
        """Draws this process's images, and has them scored meanwhile."""
        config, own = self.config, batch.own

        def score(rows: slice, latents: Tensor) -> None:
            pending.begin(rows, self.policy.decode(latents))

        ahead = config.rollout.score_ahead and not config.memory.offload
        conditioning = self.policy.encode(own.texts)
        with self.policy.precision(self.rollout_dtype), self.objective.sampling(self.parameters):
            trajectory = rollout(
                self.policy,
                table,
                conditioning,
                NoiseSource(config.seed, "training", iteration),
                batch.indices,
                config.sampling.guidance_scale,
                self.rollout_batches,
                config.objective.logprob_reduction,
                reference=self.policy.reference if self.objective.needs_reference else None,
                on_step=self.supervisor.advance,
                noise_samples=batch.noise_keys,
                on_rows=score if ahead else None,
                prompts=own.texts,
                starts=batch.starts,
            )
        if not ahead:
            score(slice(0, len(batch.indices)), trajectory.latents)
        noise = NoiseSource(config.seed, "objective", iteration)
        return Samples(table, trajectory, conditioning, config.sampling.guidance_scale, batch.indices, noise)

    def _after_step(self) -> None:
        """Updates the moving average after an optimiser step; obeys a signal to several processes."""
        for name, average in (self.ema or {}).items():
            average.lerp_(self.parameters[name].detach(), 1 - self.config.ema.decay)
        if self.accelerator.num_processes > 1:
            self.supervisor.end_if_asked()

    def _finish_iteration(self, row: dict[str, Any]) -> None:
        """Evaluates if due, then makes the iteration durable: first the metrics, then the checkpoint."""
        config, ledger = self.config, self.ledger
        last = ledger.iteration == config.iterations
        if ledger.iteration % config.evaluation.every == 0 or last:
            grids = "after" if last else "before" if ledger.iteration == 0 else None
            ledger.evaluate(row, self.supervisor.seconds)
            with self.supervisor.phase("evaluation", self.evaluation.work), swapped(self.parameters, self.ema):
                row["evaluation"] = self.evaluation.measure(self.supervisor.advance, grids, ledger.iteration)
                self.best.offer(ledger.iteration, row["evaluation"], self.parameters)
            ledger.evaluated()
        last = last or self.evaluation.fallen is not None
        row["seconds"] = {**self.supervisor.seconds, "total": sum(self.supervisor.seconds.values())}
        row["memory_mb"] = finish.peak_memory_mb()
        durable = last or ledger.iteration % config.checkpoint.every == 0 or self.supervisor.asked_to_end()
        if self.accelerator.is_main_process:
            append_line(self.out / "metrics.jsonl", json.dumps(row))
        if durable:
            self._save(ledger.iteration)
        ledger.write(durable)
        if config.trackers:
            self.accelerator.log(finish.flatten(row), step=ledger.iteration)
        self.display.iteration(row)

    def _save(self, iteration: int) -> None:
        """Writes a checkpoint from the first process. All must call this if they hold parts."""
        if not (self.accelerator.is_main_process or self.in_parts):
            return
        tensors = self.state.tensors()
        if self.accelerator.is_main_process:
            processes = self.accelerator.num_processes
            self.checkpoints.save(iteration, tensors, {**self.state.values(), "processes": processes})

    def _restore(self) -> None:
        """Restores the newest sound checkpoint, if there is one."""
        checkpoint = self.checkpoints.load() if self.resume else None
        iteration = -1 if checkpoint is None else checkpoint.iteration
        check_same_directory(self.accelerator, self.out, iteration)  # no process writes before all have read
        if checkpoint is not None:
            if self.accelerator.is_main_process:
                tell_of_other_processes(checkpoint.state.get("processes"), self.accelerator.num_processes)
            self.state.take_up(checkpoint)

    def _begin_writing(self) -> None:
        """Removes files and rows that go beyond the present state, and writes the configuration."""
        truncate_metrics(self.out / "metrics.jsonl", self.ledger.rows_written)
        self.checkpoints.prune()
        clear_half_written(self.out)
        atomic_write_text(self.out / "config.yaml", self.config.to_yaml())

    def _encode_ahead(self) -> None:
        """Encodes every prompt that this process will use; then text encoders are not needed."""
        self.display.phase("encoding")
        texts = dict.fromkeys(self.evaluation.measurement.shown(self.evaluation.samples).texts)
        for iteration in range(self.ledger.iteration + 1, self.config.iterations + 1):
            texts |= dict.fromkeys(self._draw(iteration).own.texts)
        self.policy.encode_ahead(texts)

    def _finish(self, started: float) -> dict[str, Any]:
        """Writes the results: the trained weights, their card, the summary and the report."""
        fresh = self._confirm_best()
        self._export(self.ema)
        if self.best.weights:
            self._export(self.best.weights, BEST)
        if not self.accelerator.is_main_process:
            return {}
        done, last = self.ledger.iteration, self.evaluation.last
        return finish.finish(self.out, self.config, self.policy, self.objective, last, started, done, self.best, fresh)

    def _export(self, weights: dict[str, Tensor] | None, suffix: str = "") -> None:
        """Exports weights from the first process. None: the present ones."""
        with swapped(self.parameters, weights), assembled(self.policy.network):
            if self.accelerator.is_main_process:
                finish.export(self.policy, self.out, suffix)

    def _confirm_best(self) -> dict[str, Any]:
        """Measures best and last weights and base model from fresh noise; empty without best."""
        if not self.best.weights:
            return {}
        states: dict[str, Any] = {"best": swapped(self.parameters, self.best.weights)}
        if self.best.iteration != self.ledger.iteration:
            states["last"] = swapped(self.parameters, self.ema)
        if self.config.lora.rank or self.objective.needs_reference:  # otherwise there is no copy of the base model
            states["base"] = self.policy.reference()
        with self.supervisor.phase("confirmation", len(states) * self.evaluation.work // 2):
            scores = self.evaluation.again(states, self.supervisor.advance)
        return confirmation(scores, self.evaluation.measurement.clusters)
