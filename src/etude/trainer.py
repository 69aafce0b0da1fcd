"""The loop: prompts, rollout under the training plan, rewards, advantages, replay, clipped policy gradient, evaluation.

State lives at the edges (this file, the accelerator, the run directory); everything it calls in the middle is a pure function on
tensors. All randomness is keyed by (seed, stream, iteration, sample, step), so a run that is killed and resumed ends with the bits
of one that never stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor

from etude import artifacts
from etude.advantages import PromptStatistics, combine, group_advantages, zero_std_ratio
from etude.checkpoint import (
    append_line,
    atomic_write_text,
    load_latest,
    load_optimizer_tensors,
    optimizer_tensors,
    prune,
    save_checkpoint,
    truncate_metrics,
)
from etude.config import TrainConfig, leaves
from etude.display import Display, SilentDisplay
from etude.errors import EtudeError
from etude.gap import Protocol, summarise
from etude.noise import keyed_generator
from etude.objectives import PolicyLoss, gaussian_kl, ppo_loss, reinforce_loss
from etude.plans import SamplingPlan
from etude.policies import Conditioning, Policy, load_policy
from etude.policies.base import assign, swapped
from etude.prompts import load_prompts
from etude.rewards import WeightedRewards
from etude.rollout import NoiseSource, Trajectory, replay, rollout
from etude.sampling import make_kernel


@dataclass
class UpdateStatistics:
    """What the optimiser steps of one iteration saw, one entry per micro-batch or per step."""

    loss: list[float] = field(default_factory=list)
    ratio: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    approx_kl: list[Tensor] = field(default_factory=list)
    reference_kl: list[Tensor] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        ratio = torch.cat(self.ratio)
        row = {
            "loss": float(np.mean(self.loss)),
            "ratio_mean": ratio.mean().item(),
            "ratio_max_deviation": (ratio - 1).abs().max().item(),
            "clipfrac": torch.cat(self.clipped).float().mean().item(),
            "approx_kl": torch.stack(self.approx_kl).mean().item(),
            "grad_norm": float(np.mean(self.grad_norm)),
        }
        if self.reference_kl:
            row["reference_kl"] = torch.cat(self.reference_kl).mean().item()
        return row


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
    """

    def __init__(
        self,
        config: TrainConfig,
        out: str | Path,
        resume: bool = False,
        display: Display | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.config, self.out, self.resume = config, Path(out), resume
        self.display: Display = display or SilentDisplay()
        _check_directory(self.out, resume)
        self.rewards = WeightedRewards(config.rewards, held_out=config.evaluation.held_out_rewards)
        self.train_prompts = load_prompts(config.prompts.train)
        eval_prompts = load_prompts(config.prompts.evaluation)[: config.evaluation.num_images]
        # Explicit, so that no environment variable of a launcher scales the loss or changes the precision.
        self.accelerator = Accelerator(
            log_with=list(config.trackers) or None,
            project_dir=self.out,
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        if config.rollout.images_per_iteration % self.accelerator.num_processes:
            raise EtudeError(
                f"rollout.images_per_iteration = {config.rollout.images_per_iteration} is not a multiple of "
                f"the {self.accelerator.num_processes} processes."
            )
        self.policy = policy or load_policy(config.model, dtype=config.dtype, device=self.accelerator.device)
        if config.lora.rank:
            self.policy.add_lora(config.lora, config.seed)
        else:
            self.policy.train_everything()
        self.parameters = self.policy.trainable()
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            eps=optimizer.epsilon,
        )
        self.policy.network, self.prepared = self.accelerator.prepare(self.policy.network, self.optimizer)
        self.ema = {n: p.detach().clone() for n, p in self.parameters.items()} if config.ema.decay else None
        self.prompt_statistics = {
            name: PromptStatistics(config.advantage.buffer_size, config.advantage.min_count) for name in config.rewards
        }
        sampling = config.sampling
        plan = SamplingPlan.sde(sampling.num_steps, make_kernel(sampling.kernel, sampling.eta))
        self.table = plan.tabulate(self.policy.path.grid(sampling.num_steps)).to(self.policy.device)
        if not any(self.table.trained):
            raise EtudeError(
                f"sampling.num_steps = {sampling.num_steps} leaves no stochastic step to train; use at least 2."
            )
        self.protocol = Protocol(
            eval_prompts,
            self.rewards.evaluate,
            config.evaluation.num_images,
            sampling.guidance_scale,
            sampling.kernel,
            config.seed,
            config.rollout.batch_size,
        )
        self.iteration = 0
        self.base_scores: dict[str, list[float]] | None = None
        self.last_evaluation: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}

    @property
    def clip_range(self) -> float:
        """The PPO clip range on the ratio, from `clip_range` or from `clip_nats`."""
        objective = self.config.objective
        if objective.clip_range is not None:
            return objective.clip_range
        assert objective.clip_nats is not None
        return objective.clip_nats / (self.policy.dimensions if objective.logprob_reduction == "mean" else 1)

    def train(self) -> dict[str, Any]:
        """Runs to the end and returns the summary that is also written to `summary.json`."""
        started = time.time()
        self.out.mkdir(parents=True, exist_ok=True)
        self._restore()
        if self.accelerator.is_main_process:
            atomic_write_text(self.out / "config.yaml", self.config.to_yaml())
        if self.config.trackers:
            self.accelerator.init_trackers("etude", config={"config": self.config.to_yaml()})
        with self.display:
            if self.base_scores is None:
                self._finish_iteration({"iteration": 0})
            while self.iteration < self.config.iterations:
                self.iteration += 1
                self._finish_iteration(self._iterate())
            summary = self._finish(started)
        self.display.summary_table(summary)
        self.accelerator.end_training()
        return summary

    def _iterate(self) -> dict[str, Any]:
        """One rollout and its updates; returns the row of metrics."""
        config, objective = self.config, self.config.objective
        self.seconds = {}
        captions, groups = self._draw_prompts()
        samples = self._local_samples()
        local_captions = [captions[i] for i in samples]
        with self._phase("rollout", len(samples) * config.sampling.num_steps):
            conditioning = self.policy.encode(local_captions)
            trajectory = rollout(
                self.policy,
                self.table,
                conditioning,
                NoiseSource(config.seed, "training", self.iteration),
                samples,
                config.sampling.guidance_scale,
                config.rollout.batch_size,
                objective.logprob_reduction,
                with_reference=objective.kl_coef > 0,
                on_step=self.display.advance,
            )
            images = self.policy.decode(trajectory.latents)
        with self._phase("rewards"):
            local_scores = self.rewards(images, local_captions)
            scores = {name: self._gather(values) for name, values in local_scores.items()}
            advantages = self._advantages(scores, captions, groups)[samples]
        with self._phase("update", len(samples) * len(trajectory.steps) * objective.num_inner_epochs):
            statistics = self._update(trajectory, conditioning, advantages)
        alone = config.rollout.images_per_prompt == 1
        return {
            "iteration": self.iteration,
            "reward": {n: {"mean": v.mean().item(), "std": v.std(correction=0).item()} for n, v in scores.items()},
            **({} if alone else {"zero_std_ratio": zero_std_ratio(self.rewards.combine(scores), groups)}),
            **statistics.row(),
        }

    def _draw_prompts(self) -> tuple[list[str], Tensor]:
        """The prompt of each sample of this iteration, and which group each belongs to."""
        rollout_config = self.config.rollout
        count = rollout_config.images_per_iteration // rollout_config.images_per_prompt
        generator = keyed_generator(self.config.seed, "prompts", self.iteration)
        chosen: list[int] = []
        while len(chosen) < count:
            chosen += generator.permutation(len(self.train_prompts)).tolist()
        groups = torch.arange(count).repeat_interleave(rollout_config.images_per_prompt)
        return [self.train_prompts[chosen[g]] for g in groups.tolist()], groups

    def _local_samples(self) -> list[int]:
        """Global indices of the samples that this process makes: a contiguous, equal share."""
        share = self.config.rollout.images_per_iteration // self.accelerator.num_processes
        start = self.accelerator.process_index * share
        return list(range(start, start + share))

    def _gather(self, values: Tensor) -> Tensor:
        """All processes' values in the order of the global sample index, on the CPU."""
        gathered: Tensor = self.accelerator.gather(values.to(self.accelerator.device))
        return gathered.cpu()

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

    def _update(self, trajectory: Trajectory, conditioning: Conditioning, advantages: Tensor) -> UpdateStatistics:
        """The optimiser steps of one iteration."""
        objective, statistics = self.config.objective, UpdateStatistics()
        advantages = advantages.to(self.policy.device)
        generator = keyed_generator(self.config.seed, "update", self.iteration)
        for _ in range(objective.num_inner_epochs):
            order = torch.from_numpy(generator.permutation(len(advantages)))
            for chunk in order.tensor_split(min(objective.updates_per_epoch, len(order))):
                rows, columns = self._pairs(chunk, len(trajectory.steps), generator)
                self._accumulate(trajectory, conditioning, advantages, rows, columns, statistics)
                norm = self.accelerator.clip_grad_norm_(self.parameters.values(), self.config.optimizer.max_grad_norm)
                statistics.grad_norm.append(float(norm))
                if not np.isfinite(statistics.grad_norm[-1]):
                    raise EtudeError(
                        f"training diverged in iteration {self.iteration}: the gradient norm is {float(norm)}; "
                        f"the last good checkpoint is in '{self.out / 'checkpoints'}'. Lower optimizer.learning_rate or the clip range."
                    )
                self.prepared.step()
                self.prepared.zero_grad()
                self._update_ema()
        return statistics

    def _pairs(self, samples: Tensor, num_steps: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(sample, trained step) pairs of one optimiser step, step by step: int64 `[m]` each."""
        kept = max(1, round(self.config.objective.timestep_fraction * num_steps))
        drawn = torch.from_numpy(generator.random((len(samples), num_steps)))
        columns = drawn.argsort(dim=1)[:, :kept].sort(dim=1).values
        rows = samples[:, None].expand_as(columns)
        return rows.T.flatten().to(self.policy.device), columns.T.flatten().to(self.policy.device)

    def _accumulate(
        self,
        trajectory: Trajectory,
        conditioning: Conditioning,
        advantages: Tensor,
        rows: Tensor,
        columns: Tensor,
        statistics: UpdateStatistics,
    ) -> None:
        """Gradients of the mean loss over the pairs, micro-batch by micro-batch."""
        size, total = self.config.objective.batch_size, 0.0
        starts = range(0, len(rows), size)
        for start in starts:
            row, column = rows[start : start + size], columns[start : start + size]
            last = start == starts[-1]
            with self._synchronise_gradients(last):
                result, kl = self._loss(trajectory, conditioning, advantages, row, column)
                loss = result.loss if kl is None else result.loss + self.config.objective.kl_coef * kl.mean()
                weighted = loss * (len(row) / len(rows))
                self.accelerator.backward(weighted)
            total += weighted.item()
            statistics.ratio.append(result.ratio)
            statistics.clipped.append(result.clipped)
            statistics.approx_kl.append(result.approx_kl)
            if kl is not None:
                statistics.reference_kl.append(kl.detach())
            self.display.advance(len(row))
        statistics.loss.append(total)

    @contextmanager
    def _synchronise_gradients(self, now: bool) -> Iterator[None]:
        """Processes exchange gradients only after the last micro-batch of an optimiser step."""
        if now:
            yield
        else:
            with self.accelerator.no_sync(self.policy.network):
                yield

    def _loss(
        self, trajectory: Trajectory, conditioning: Conditioning, advantages: Tensor, rows: Tensor, columns: Tensor
    ) -> tuple[PolicyLoss, Tensor | None]:
        objective = self.config.objective
        transition, target = replay(
            self.policy, self.table, trajectory, rows, columns, conditioning, self.config.sampling.guidance_scale
        )
        log_prob, reduction = transition.log_prob(target, objective.logprob_reduction), objective.logprob_reduction
        if objective.kind == "reinforce":
            result = reinforce_loss(log_prob, advantages[rows], objective.adv_clip_max)
        else:
            old = trajectory.log_prob[rows, columns]
            result = ppo_loss(log_prob, old, advantages[rows], self.clip_range, objective.adv_clip_max)
        if trajectory.reference_mean is None:
            return result, None
        return result, gaussian_kl(transition.mean, trajectory.reference_mean[rows, columns], transition.std, reduction)

    def _update_ema(self) -> None:
        if self.ema is not None:
            for name, parameter in self.parameters.items():
                self.ema[name].lerp_(parameter.detach(), 1 - self.config.ema.decay)

    def _finish_iteration(self, row: dict[str, Any]) -> None:
        """Evaluates when due, then makes the iteration durable: metrics first, checkpoint second."""
        config = self.config
        last = self.iteration == config.iterations
        if self.iteration % config.evaluation.every == 0 or last:
            row["evaluation"] = self._evaluate(last)
        row["seconds"] = {**self.seconds, "total": sum(self.seconds.values())}
        row["memory_mb"] = artifacts.peak_memory_mb()
        if self.accelerator.is_main_process:
            append_line(self.out / "metrics.jsonl", json.dumps(row))
            if self.iteration % config.checkpoint.every == 0 or last:
                self._save()
        if config.trackers:
            self.accelerator.log(artifacts.flatten(row), step=self.iteration)
        self.display.iteration(row)

    def _evaluate(self, last: bool) -> dict[str, Any]:
        """ODE and SDE rewards of the current weights from the same noise, with the base model's ODE as the reference."""
        eta, num_steps = self.config.sampling.eta, self.config.sampling.num_steps
        with self._phase("evaluation", 2 * self.protocol.num_images * num_steps), swapped(self.parameters, self.ema):
            ode_images = self.protocol.images(self.policy, 0.0, num_steps, self.display.advance)
            sde_images = self.protocol.images(self.policy, eta, num_steps, self.display.advance)
            ode, sde = self.protocol.scores(ode_images), self.protocol.scores(sde_images)
        if self.base_scores is None:
            self.base_scores = {name: values.tolist() for name, values in ode.items()}
        base = {name: np.array(values) for name, values in self.base_scores.items()}
        self.last_evaluation = {"eta": eta, "num_steps": num_steps, **summarise(ode, sde, base, self.protocol.clusters)}
        if self.accelerator.is_main_process and (last or self.iteration == 0):
            when, count = ("after" if last else "before"), self.config.evaluation.grid_images
            artifacts.write_grids(
                self.out, when, ode_images[:count], sde_images[:count], self.protocol.captions[:count]
            )
        return self.last_evaluation

    @contextmanager
    def _phase(self, name: str, total: int | None = None) -> Iterator[None]:
        self.display.phase(name, total)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def _save(self) -> None:
        tensors = {f"weights/{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {
            f"optimizer/{name}": t for name, t in optimizer_tensors(self.optimizer, list(self.parameters)).items()
        }
        tensors |= {f"ema/{name}": t for name, t in (self.ema or {}).items()}
        state = {
            "config": self.config.model_dump(mode="json"),
            "base_scores": self.base_scores,
            "last_evaluation": self.last_evaluation,
            "prompt_statistics": {name: s.state() for name, s in self.prompt_statistics.items()},
        }
        root = self.out / "checkpoints"
        save_checkpoint(root, self.iteration, tensors, state)
        prune(root, self.config.checkpoint.keep)

    def _restore(self) -> None:
        """Takes up the newest sound checkpoint, and drops metrics of iterations that it does not hold."""
        root = self.out / "checkpoints"
        checkpoint = load_latest(root) if self.resume else None
        if self.resume and checkpoint is None and root.is_dir() and any(root.glob("iteration-*")):
            raise EtudeError(
                f"no checkpoint in '{root}' is sound, so the run cannot be resumed: start it again in another directory."
            )
        if checkpoint is not None:
            self._check_same_run(checkpoint.state["config"])
            assign(self.parameters, _under("weights/", checkpoint.tensors))
            load_optimizer_tensors(self.optimizer, list(self.parameters), _under("optimizer/", checkpoint.tensors))
            if self.ema is not None:
                for name, average in _under("ema/", checkpoint.tensors).items():
                    self.ema[name].copy_(average)
            self.iteration = checkpoint.iteration
            self.base_scores = checkpoint.state["base_scores"]
            self.last_evaluation = checkpoint.state["last_evaluation"]
            for name, statistics in self.prompt_statistics.items():
                statistics.load_state(checkpoint.state["prompt_statistics"][name])
        if self.accelerator.is_main_process:
            truncate_metrics(self.out / "metrics.jsonl", self.iteration if checkpoint is not None else -1)

    def _check_same_run(self, stored: dict[str, Any]) -> None:
        """A checkpoint continues only the run that wrote it."""
        for (key, old), (_, new) in zip(leaves(stored), leaves(self.config.model_dump(mode="json")), strict=True):
            if old != new:
                raise EtudeError(
                    f"the run in '{self.out}' has {key} = {old!r}, but {new!r} was given: resume it with its own "
                    "config.yaml, or start another run in another directory."
                )

    def _finish(self, started: float) -> dict[str, Any]:
        """Writes what the user came for: the adapter, its card, the summary and the report."""
        if not self.accelerator.is_main_process:
            return {}
        with swapped(self.parameters, self.ema):
            artifacts.export(self.policy, self.out)
        return artifacts.finish(self.out, self.config, self.policy, self.last_evaluation, started)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_directory(out: Path, resume: bool) -> None:
    """Refuses to mix two runs. The directory is made when the run starts, so that a refused one leaves nothing."""
    if out.exists() and not out.is_dir():
        raise EtudeError(f"--out '{out}' is a file; give a directory.")
    if out.is_dir() and any(out.iterdir()) and not resume:
        raise EtudeError(
            f"--out '{out}' is not empty: give --resume to continue the run it holds, or another directory."
        )
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise EtudeError(
            f"--out '{out}' cannot be written: check the permissions of '{parent}', or give another directory."
        )
