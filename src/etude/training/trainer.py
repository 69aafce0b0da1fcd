"""The loop: prompts, rollout under the training plan, rewards, advantages, replay, clipped policy gradient, evaluation.

State lives at the edges (this file, the accelerator, the run directory); everything it calls in the middle is a pure function on
tensors. All randomness is keyed by (seed, stream, iteration, sample, step), so a run that is killed and resumed ends with the bits
of one that never stopped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etude.batching import MicroBatch
from etude.config import TrainConfig
from etude.errors import EtudeError, brief
from etude.files import append_line, atomic_write_text, locked
from etude.learning.advantages import PromptStatistics, combine, group_advantages, zero_std_ratio
from etude.learning.draws import draw_prompts, most_starts, noise_keys, share
from etude.learning.loss_scale import LossScale
from etude.learning.optimizers import check_optimizer, load_optimizer_tensors, make_optimizer, optimizer_tensors
from etude.learning.update import Experience, PolicyUpdate
from etude.policies import Conditioning, TrainablePolicy
from etude.policies.loading import DTYPES, policy_of
from etude.policies.outline import fake_mode
from etude.policies.sharding import assembled, held_here, part, sharded, whole
from etude.policies.trainable import assign, swapped
from etude.prompts import PromptSet, load_prompts
from etude.rewards import WeightedRewards
from etude.runs.checkpoint import Checkpoint, Checkpoints
from etude.runs.layout import BEST, check_directory, clear_half_written, truncate_metrics
from etude.sampling.noise import NoiseSource
from etude.sampling.rollout import Trajectory, rollout
from etude.training import finish, zero
from etude.training.best import BestWeights, confirmation
from etude.training.evaluation import Evaluation
from etude.training.interruption import Interrupted, Interruption
from etude.training.processes import (
    SharedFailureError,
    check_same_directory,
    end_training,
    failing_together,
    gather,
    is_of_a_lost_process,
    make_accelerator,
    prepare,
    tell_of_other_processes,
)
from etude.training.progress import Display, SilentDisplay
from etude.training.reward_queue import Scorer
from etude.training.schedule import TrainingPlans

LARGEST_WEIGHT = "largest weight"
"""Watched beside the numbers that are logged."""
LARGEST, LIMITS = sys.float_info.max, {"approx_kl": 1e3}
"""Beyond which training has diverged: what is finite, and a KL (nats) that no step of a policy that still resembles the last one has."""


class Trainer:
    """Fine-tunes a policy with a stochastic sampler, and measures what the deterministic one makes of it.

    Args:
        config: everything that determines the run.
        out: the run directory.
        resume: continue the run that `out` holds.
        display: shows the progress; silent by default.
        policy: a policy to train instead of loading `config.model`.

    Raises:
        EtudeError: for anything the user can mend; what was finished before stays in `out`.
        Interrupted: from `train`, after SIGINT or SIGTERM, with every finished iteration saved.
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
        check_directory(self.out, resume)
        check_optimizer(config.optimizer)
        self.rewards = WeightedRewards(
            config.rewards, held_out=config.evaluation.held_out_rewards, offload=config.memory.offload
        )
        self.scorer = Scorer(self.rewards, config.rollout.reward_timeout, on_wait=lambda: self._advance(0))
        self.train_prompts = load_prompts(config.prompts.train)
        self.formed = not torch.distributed.is_initialized()  # then the group of processes is this run's to dissolve
        self.accelerator = make_accelerator(config, self.out)
        self.policy = policy or policy_of(config, self.accelerator.device)
        self.plans = TrainingPlans(
            config.sampling,
            self.policy.grid(config.sampling.num_steps),
            config.seed,
            self.policy.device,
            config.iterations,
        )
        self.table = self.plans.table_at(1)
        images, processes = config.rollout.images_per_iteration, self.accelerator.num_processes
        self.samples = share(images, processes, self.accelerator.process_index)  # this process's own of an iteration
        self.rollout_dtype = DTYPES[config.rollout.dtype] if config.rollout.dtype else None
        self.rollout_batches = MicroBatch(config.rollout.batch_size, "rollout.batch_size")
        self.replay_batches = MicroBatch(config.objective.batch_size, "objective.batch_size")
        self.evaluation = Evaluation(
            config, self.policy, self.scorer, self.accelerator, self.out, self.rollout_batches, self.train_prompts
        )
        self._prepare_training()
        self.prompt_statistics = {
            name: PromptStatistics(config.advantage.buffer_size, config.advantage.min_count) for name in config.rewards
        }
        self.iteration = 0
        self.seconds: dict[str, float] = {}
        self.best = BestWeights(config.checkpoint.best)
        self.checkpoints = Checkpoints(self.out, config)
        self.interruption = Interruption()
        self.unevaluated: dict[str, Any] | None = None  # what is known of an iteration whose evaluation is not done
        self.touched = True  # whether weights or statistics have changed since the last finished iteration
        self.durable = -1  # the iteration of the newest checkpoint; -1 before the first

    def _prepare_training(self) -> None:
        """What is trained, its optimiser and its average."""
        config = self.config
        if config.memory.gradient_checkpointing:
            self.policy.enable_gradient_checkpointing()
        if config.lora.rank:
            self.policy.add_lora(config.lora, config.seed)
        else:
            self.policy.train_everything(keep_reference=config.objective.kl_coef > 0)
        self.parameters = self.policy.trainable()
        self.optimizer = make_optimizer(config.optimizer, self.parameters.values())
        if fake_mode(self.policy) is not None:  # an outline, for a dry run: there is nothing to place or to wrap
            self.prepared = self.optimizer
        else:
            self.policy.network, self.prepared = prepare(self.accelerator, self.policy.network, self.optimizer)
            self.parameters = self.policy.trainable()  # others than before where they are held in parts
        self.in_parts = sharded(self.parameters) or zero.in_use(self.accelerator)
        self.rollout_batches.adaptive = self.replay_batches.adaptive = not self.in_parts
        copies = self.accelerator.num_processes > 1 and not self.in_parts
        self.ema = {n: p.detach().clone() for n, p in self.parameters.items()} if config.ema.decay else None
        averaged = self.policy.dimensions if config.objective.logprob_reduction == "mean" else 1
        self.update = PolicyUpdate(
            config,
            self.policy,
            self.accelerator,
            self.parameters.values(),
            self.prepared,
            LossScale(config.dtype == "float16", averaged, self._all),
            self.replay_batches,
            self.samples,
            rehearsals=2 if copies else 0,  # of a step's exchange: before AdamW has made its moments, and after
            on_step=self._advance,
        )

    def _all(self, answer: Tensor) -> Tensor:
        """Whether the answer is yes in every process."""
        processes = self.accelerator.num_processes
        return answer if processes == 1 else gather(self.accelerator, answer.reshape(1).float(), processes).bool().all()

    def train(self) -> dict[str, Any]:
        """Runs to the end and returns the summary that is also written to `summary.json`."""
        started = time.time()
        with ExitStack() as lock:
            with failing_together(self.accelerator):
                self.rewards.load()  # before anything is written: a reward that cannot be used leaves no run to clear away
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
        with self.display, self.interruption, self._failures_explained():
            if self.config.memory.offload:
                self._encode_ahead()
            if self.unevaluated is not None:
                self.seconds = self.unevaluated["seconds"]
                self._finish_iteration(self.unevaluated["row"])
            if self.evaluation.base_scores is None:
                self._finish_iteration({"iteration": 0})
            while self.iteration < self.config.iterations and self.evaluation.fallen is None:
                self.iteration += 1
                self._finish_iteration(self._iterate())
            summary = self._finish(started)
        self.display.summary_table(summary)
        end_training(self.accelerator, self.formed)
        return summary

    @contextmanager
    def _failures_explained(self) -> Iterator[None]:
        """A failure says which checkpoint is left; if it left the weights alone, what they are is saved first."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            self.scorer.cancel()
            evaluating = self.unevaluated is not None and self.iteration > 0  # only the figures are missing then
            done = self.iteration if evaluating else self.iteration - 1
            # Parts are brought together by all processes or not at all.
            reachable = not self.in_parts or isinstance(error, Interrupted | SharedFailureError)
            if (evaluating or not self.touched) and self.durable < done and reachable:
                self._save(done)
            if isinstance(error, Interrupted | SharedFailureError):
                self.accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has ended
            if isinstance(error, Interrupted):
                raise Interrupted(f"{error}: {self.checkpoints.advice()}.", error.signum) from None
            if self.accelerator.num_processes > 1 and is_of_a_lost_process(error):
                raise EtudeError(
                    f"another process of the run has ended, and its own message or the launcher's says why ({self.checkpoints.remaining()})."
                ) from error
            if not isinstance(error, EtudeError):
                raise
            told = SharedFailureError if isinstance(error, SharedFailureError) else EtudeError
            raise told(f"{str(error).rstrip('.')} ({self.checkpoints.remaining()}).") from error

    def _advance(self, done: int) -> None:
        """Tells of progress, and ends the run here if a signal asked for it."""
        self.display.advance(done)
        if self.accelerator.num_processes == 1:
            self._end_if_asked()  # several processes end where all of them pass: between phases and optimiser steps

    def _asked_to_end(self) -> bool:
        """Whether a signal came, to whichever process."""
        if self.accelerator.num_processes > 1:
            return self.interruption.share(self.accelerator)
        return self.interruption.signum is not None

    def _end_if_asked(self) -> None:
        """Ends the run if a signal asked for it, unless that lost a finished iteration: then this one is finished and saved first."""
        kept = not self.touched or self.durable >= self.iteration - 1 or self.unevaluated is not None
        if self._asked_to_end() and kept:
            assert self.interruption.signum is not None
            raise Interrupted(
                f"interrupted by {self.interruption.name} in iteration {self.iteration}", self.interruption.signum
            )

    def _encode_ahead(self) -> None:
        """Encodes every prompt that this process will show, after which the text encoders are no longer needed."""
        self.display.phase("encoding")
        texts = dict.fromkeys(self.evaluation.protocol.shown(self.evaluation.samples).texts)
        for iteration in range(self.iteration + 1, self.config.iterations + 1):
            texts |= dict.fromkeys(self._draw(iteration)[2].texts)
        self.policy.encode_ahead(texts)

    def _draw(self, iteration: int) -> tuple[PromptSet, Tensor, PromptSet, list[int]]:
        """The prompts and groups of an iteration's samples, and which of them are this process's own."""
        prompts, groups = draw_prompts(self.train_prompts, self.config.rollout, self.config.seed, iteration)
        return prompts, groups, prompts.select(self.samples), self.samples

    def _iterate(self) -> dict[str, Any]:
        """One rollout and its updates; returns the row of metrics."""
        config, objective = self.config, self.config.objective
        self.seconds, self.touched = {}, False
        self.table = self.plans.table_at(self.iteration)
        prompts, groups, own, samples = self._draw(self.iteration)
        pending = self.scorer.pending(own, self.accelerator.num_processes == 1, samples[0])

        def score(rows: slice, latents: Tensor) -> None:
            pending.begin(rows, self.policy.decode(latents))

        ahead = config.rollout.score_ahead and not config.memory.offload
        with self._phase("rollout", len(samples) * self.table.num_evaluations):
            conditioning = self.policy.encode(own.texts)
            with self.policy.precision(self.rollout_dtype):
                trajectory = rollout(
                    self.policy,
                    self.table,
                    conditioning,
                    NoiseSource(config.seed, "training", self.iteration),
                    samples,
                    config.sampling.guidance_scale,
                    self.rollout_batches,
                    objective.logprob_reduction,
                    reference=self.policy.reference if objective.kl_coef > 0 else None,
                    on_step=self._advance,
                    noise_samples=noise_keys(samples, config.rollout),
                    on_rows=score if ahead else None,
                    prompts=own.texts,
                    starts=most_starts(len(prompts), config.rollout, self.accelerator.num_processes),
                )
            if not ahead:
                score(slice(0, len(samples)), trajectory.latents)
        with self._phase("rewards"):
            with failing_together(self.accelerator):
                local_scores = pending.result()
            scores = {name: gather(self.accelerator, values, len(prompts)) for name, values in local_scores.items()}
            self.touched = True
            advantages = self._advantages(scores, prompts.texts, groups)
        with self._phase("update", len(samples) * len(trajectory.steps) * objective.num_inner_epochs):
            statistics = self._update(trajectory, conditioning, advantages[samples])
        alone, window = config.rollout.images_per_prompt == 1, self.plans.window_at(self.iteration)
        return {
            "iteration": self.iteration,
            "eta": self.plans.eta_at(self.iteration),
            **({} if window is None else {"window": window}),
            "reward": {n: {"mean": v.mean().item(), "std": v.std(correction=0).item()} for n, v in scores.items()},
            **({} if alone else {"zero_std_ratio": zero_std_ratio(self.rewards.combine(scores), groups, advantages)}),
            **statistics,
        }

    def _advantages(self, scores: dict[str, Tensor], captions: list[str], groups: Tensor) -> Tensor:
        """Each reward normalised on its own, then the weighted sum: `[n]` over all processes' samples."""
        kind = self.config.advantage.kind
        if kind == "per_prompt":
            normalised = {
                name: self.prompt_statistics[name].advantages(captions, values) for name, values in scores.items()
            }
        else:
            normalised = {
                name: group_advantages(v, groups, kind == "group_mean_global_std") for name, v in scores.items()
            }
        return combine(normalised, self.config.rewards).float()

    def _update(self, trajectory: Trajectory, conditioning: Conditioning, advantages: Tensor) -> dict[str, float]:
        """The optimiser steps of one iteration on this process's samples; returns what is logged about them."""
        experience = Experience(self.table, trajectory, conditioning, advantages.to(self.policy.device))
        statistics = self.update.run(experience, self.iteration, self._after_step)
        # Once an iteration: asking waits for the device.
        numbers = self._of_all({**statistics.row(), LARGEST_WEIGHT: self._largest_weight()})
        broken = next((name for name, value in numbers.items() if not abs(value) <= LIMITS.get(name, LARGEST)), None)
        if broken is not None:
            half = ", or use bfloat16, which has the range of float32," if self.config.dtype == "float16" else ""
            raise EtudeError(
                f"training diverged in iteration {self.iteration}: the {broken.replace('_', ' ')} is {numbers[broken]}; "
                f"lower optimizer.learning_rate or the clip range{half} and start another run."
            )
        return {name: value for name, value in numbers.items() if name != LARGEST_WEIGHT}

    def _after_step(self) -> None:
        """What follows each optimiser step."""
        self._update_ema()
        if self.accelerator.num_processes > 1:
            self._end_if_asked()

    def _of_all(self, numbers: dict[str, float]) -> dict[str, float]:
        """The means over all processes, which have equal shares of every optimiser step; of what is a maximum, the largest."""
        processes = self.accelerator.num_processes
        if processes == 1:
            return numbers
        columns = gather(self.accelerator, torch.tensor([list(numbers.values())]), processes).unbind(1)
        return {
            name: float(values.max() if "max" in name or name == LARGEST_WEIGHT else values.mean())
            for name, values in zip(numbers, columns, strict=True)
        }

    def _largest_weight(self) -> float:
        """Of the trained weights that this process holds; NaN or infinite if any of them is."""
        local = (held_here(p).detach() for p in self.parameters.values())
        return float(torch.stack([p.abs().max().float() for p in local if p.numel()]).max())

    def _update_ema(self) -> None:
        if self.ema is not None:
            for name, parameter in self.parameters.items():
                self.ema[name].lerp_(parameter.detach(), 1 - self.config.ema.decay)

    def _finish_iteration(self, row: dict[str, Any]) -> None:
        """Evaluates when due, then makes the iteration durable: metrics first, checkpoint second."""
        config = self.config
        last = self.iteration == config.iterations
        if self.iteration % config.evaluation.every == 0 or last:
            grids = "after" if last else "before" if self.iteration == 0 else None
            self.unevaluated = {"row": dict(row), "seconds": dict(self.seconds)}
            with self._phase("evaluation", self.evaluation.work), swapped(self.parameters, self.ema):
                row["evaluation"] = self.evaluation.measure(self._advance, grids, self.iteration)
                self.best.offer(self.iteration, row["evaluation"], self.parameters)
            self.unevaluated = None
        last = last or self.evaluation.fallen is not None
        row["seconds"] = {**self.seconds, "total": sum(self.seconds.values())}
        row["memory_mb"] = finish.peak_memory_mb()
        durable = last or self.iteration % config.checkpoint.every == 0 or self._asked_to_end()
        if self.accelerator.is_main_process:
            append_line(self.out / "metrics.jsonl", json.dumps(row))
        if durable:
            self._save(self.iteration)
            self.durable = self.iteration
        if config.trackers:
            self.accelerator.log(finish.flatten(row), step=self.iteration)
        self.display.iteration(row)

    @contextmanager
    def _phase(self, name: str, total: int | None = None) -> Iterator[None]:
        self._end_if_asked()
        self.display.phase(name, total)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def _save(self, iteration: int) -> None:
        """Writes a checkpoint, in the first process; all must call it where the state is held in parts."""
        if not (self.accelerator.is_main_process or self.in_parts):
            return
        tensors = {f"weights/{name}": whole(p.detach()) for name, p in self.parameters.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in self._moments().items()}
        tensors |= {f"ema/{name}": whole(t) for name, t in (self.ema or {}).items()}
        tensors |= {f"best/{name}": t for name, t in self.best.weights.items()}
        state = {
            "base_scores": self.evaluation.base_scores,
            "last_evaluation": self.evaluation.last,
            "best": self.best.state(),
            "prompt_statistics": {name: s.state() for name, s in self.prompt_statistics.items()},
            "unevaluated": self.unevaluated,
            "processes": self.accelerator.num_processes,
        }
        if self.accelerator.is_main_process:
            self.checkpoints.save(iteration, tensors, state)

    def _moments(self) -> dict[str, Tensor]:
        """The optimiser's state, whole."""
        if zero.in_use(self.accelerator):
            return zero.optimizer_tensors(self.accelerator, self.optimizer, self.parameters)
        return optimizer_tensors(self.optimizer, list(self.parameters))

    def _restore(self) -> None:
        """Takes up the newest sound checkpoint, if there is one."""
        checkpoint = self.checkpoints.load() if self.resume else None
        found = -1 if checkpoint is None else checkpoint.iteration
        check_same_directory(self.accelerator, self.out, found)  # and nobody writes before everybody has read
        if checkpoint is not None:
            if self.accelerator.is_main_process:
                tell_of_other_processes(checkpoint.state.get("processes"), self.accelerator.num_processes)
            try:
                self._take_up(checkpoint)
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                raise EtudeError(
                    f"checkpoint '{checkpoint.path}' does not hold the state that this version of etude goes on from "
                    f"({type(error).__name__}: {brief(error)}): continue with the version that wrote it, or start another run."
                ) from error

    def _begin_writing(self) -> None:
        """Leaves nothing in the run directory that goes beyond the state of now, and writes the configuration."""
        written = -1 if self.durable < 0 else self.iteration - (self.unevaluated is not None)
        truncate_metrics(self.out / "metrics.jsonl", written)
        self.checkpoints.prune()
        clear_half_written(self.out)
        atomic_write_text(self.out / "config.yaml", self.config.to_yaml())

    def _take_up(self, checkpoint: Checkpoint) -> None:
        assign(self.parameters, _under("weights/", checkpoint.tensors))
        moments = _under("optimizer/", checkpoint.tensors)
        if zero.in_use(self.accelerator):
            zero.take_up(self.optimizer, self.parameters, moments)
        else:
            load_optimizer_tensors(self.optimizer, list(self.parameters), moments)
        if self.ema is not None:
            for name, average in _under("ema/", checkpoint.tensors).items():
                self.ema[name].copy_(part(average, self.ema[name]))
        self.iteration = self.durable = checkpoint.iteration
        self.evaluation.base_scores = checkpoint.state["base_scores"]
        self.evaluation.last = checkpoint.state["last_evaluation"]
        self.unevaluated = checkpoint.state.get("unevaluated")
        if self.best.reward is not None:
            self.best.load_state(_under("best/", checkpoint.tensors), checkpoint.state["best"])
        for name, statistics in self.prompt_statistics.items():
            statistics.load_state(checkpoint.state["prompt_statistics"][name])

    def _finish(self, started: float) -> dict[str, Any]:
        """Writes what the user came for: the adapter, its card, the summary and the report."""
        confirmation = self._confirm_best()
        self._export(self.ema)
        if self.best.weights:
            self._export(self.best.weights, BEST)
        if not self.accelerator.is_main_process:
            return {}
        return finish.finish(
            self.out, self.config, self.policy, self.evaluation.last, started, self.iteration, self.best, confirmation
        )

    def _export(self, weights: dict[str, Tensor] | None, suffix: str = "") -> None:
        """Writes weights, by default the present ones, from the first process."""
        with swapped(self.parameters, weights), assembled(self.policy.network):
            if self.accelerator.is_main_process:
                finish.export(self.policy, self.out, suffix)

    def _confirm_best(self) -> dict[str, Any]:
        """What the best weights are worth from fresh noise, beside the last ones and the base model; empty if none were kept."""
        if not self.best.weights:
            return {}
        states: dict[str, Any] = {"best": swapped(self.parameters, self.best.weights)}
        if self.best.iteration != self.iteration:
            states["last"] = swapped(self.parameters, self.ema)
        if self.config.lora.rank or self.config.objective.kl_coef > 0:  # else no base model was kept
            states["base"] = self.policy.reference()
        with self._phase("confirmation", len(states) * self.evaluation.work // 2):
            scores = self.evaluation.again(states, self._advance)
        return confirmation(scores, self.evaluation.protocol.clusters)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
