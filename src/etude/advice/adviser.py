"""Which eta to train with, and what to deploy, from short pilot runs and the theory: evidence with intervals, within a budget of time.

1. The base model draws held-out images under the ODE. They are what pilots are compared with, and their latents' moments make the Gaussian
   for which `etude.theory.recommended_eta` is asked.
2. One iteration is timed, and the pilots are sized so that all of them end within the budget.
3. First round: a short run at every eta. Second round: the better half again with another seed, so that a lucky run does not win.
4. Every pilot is measured under the ODE on the same prompts and the same noise, which its training never saw. The suggested eta is the smallest
   that is not significantly worse than the best: less noise means a smaller gap to the ODE, and nothing speaks for more. If no pilot surely
   improved on the base model, nothing tells etas apart, and it is the one nearest to 1.
5. The pilot at that eta is drawn with several solvers and step counts. The suggestion is the cheapest that surely keeps
   most of the improvement.

A pilot is an ordinary run of the trainer in a directory of its own. Given the same directory again, advice goes on where it was stopped.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from etude.advice.rules import (
    PILOTS_SHARE,
    SCORE_ERROR,
    Sizes,
    choose_eta,
    deployment_cells,
    finalists,
    improved,
    pilots,
    rank_samplers,
    reasons,
    size_pilots,
)
from etude.config import TrainConfig, difference, load_config, parse_config, recipe_names
from etude.errors import EtudeError
from etude.files import atomic_write_text
from etude.measuring.gap import Protocol as Measurement
from etude.measuring.gap import Scores
from etude.measuring.statistics import Estimate, mean_summary, paired_summary
from etude.policies import TrainablePolicy
from etude.policies.loading import policy_of
from etude.policies.trainable import swapped
from etude.prompts import load_prompts
from etude.rewards import WEIGHTED_SUM, WeightedRewards
from etude.runs.layout import holds_something
from etude.sampling.noise import NoiseSource
from etude.sampling.plans import SamplingPlan
from etude.sampling.rollout import rollout
from etude.sampling.solvers import SOLVERS, sample_with_solver
from etude.theory import Gaussian, ScoreError, recommended_eta
from etude.training.progress import Display, SilentDisplay
from etude.training.trainer import Trainer

ETAS = (0.5, 1.0, 1.5, 2.0)
"""What is tried by default, beside what the theory recommends; in gDDIM's unit."""
STREAM = "advice"
"""Of the noise that pilots are compared on."""
DIMENSIONS = 256
"""Of the latents, at most, that the theory's Gaussian is made of."""


class Watcher(Protocol):
    """What is told about the progress."""

    def note(self, text: str) -> None:
        """Something is known, in a sentence."""

    def pilot(self, label: str, done: int, total: int, iterations: int) -> Display:
        """Pilot `done + 1` of `total` begins; what it tells is shown by the display."""


class SilentWatcher:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """Shows nothing."""

    def pilot(self, label: str, done: int, total: int, iterations: int) -> Display:
        """Shows nothing."""
        return SilentDisplay()


def base_config(
    model: str, rewards: dict[str, float], recipe: str | None = None, overrides: Sequence[str] = ()
) -> TrainConfig:
    """The settings that all pilots share: those of a recipe, by default the first built-in one for that model with gDDIM.

    Raises:
        EtudeError: no recipe is for the model, and none was given.
    """
    if recipe is None:
        configs = {name: load_config(name) for name in recipe_names()}
        fitting = [name for name, config in configs.items() if config.model == model]
        recipe = next((n for n in fitting if configs[n].sampling.kernel == "gddim"), fitting[0] if fitting else None)
    if recipe is None:
        raise EtudeError(
            f"no built-in recipe is for model '{model}': give --recipe, the one whose settings the pilots should train with "
            "(`etude recipes` lists them)."
        )
    return load_config(recipe, [*overrides, f"model={json.dumps(model)}"], rewards)


class Adviser:
    """Advice on one model and reward.

    Args:
        config: what all pilots share (`base_config`); its eta and seed are where they differ.
        minutes: the budget.
        out: directory of the pilots; advice that it holds already is continued.
        etas: to try; default: ETAS and the theory's.
        watcher: shows the progress.

    Raises:
        EtudeError: the etas do not suit the kernel, or the directory is of another advice.
    """

    def __init__(
        self,
        config: TrainConfig,
        minutes: float,
        out: Path,
        etas: Sequence[float] | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        if etas is None and config.sampling.kernel != "gddim":
            raise EtudeError(
                f"the recipe's kernel is {config.sampling.kernel}, whose eta has a unit of its own: give --eta several times, or "
                "--set sampling.kernel=gddim."
            )
        if etas is not None and len(set(etas)) < 2:
            raise EtudeError("advice compares etas: give --eta at least twice, with different values.")
        if etas is not None and min(etas) <= 0:
            raise EtudeError("eta = 0 is the ODE, which cannot be trained with: every --eta must be above 0.")
        self.config, self.minutes, self.out, self.etas = config, minutes, out, etas
        self.watcher = watcher or SilentWatcher()
        self.rewards = WeightedRewards(config.rewards, held_out=config.evaluation.held_out_rewards)
        self.reward = next(iter(config.rewards)) if len(config.rewards) == 1 else WEIGHTED_SUM
        count = config.evaluation.num_images
        self.measurement = Measurement(
            prompts=load_prompts(config.prompts.evaluation).head(count),
            score=self.rewards.evaluate,
            num_images=count,
            guidance_scale=config.sampling.guidance_scale,
            kernel=config.sampling.kernel,
            seed=config.seed,
            batch_size=config.rollout.batch_size,
            first_step=config.sampling.first_step,
            stream=STREAM,
        )
        self.steps = config.evaluation.num_steps or config.sampling.num_steps

    def advise(self) -> dict[str, Any]:
        """Runs what is not done yet; returns the advice, which is also written to `advice.json`."""
        started = time.monotonic()
        self.rewards.load()  # before anything is written: a reward that cannot be used leaves nothing to clear away
        self._check_directory()
        base = self._kept("base.json", self._measure_base)
        sized = self._kept("sizes.json", lambda: self._size(base, started))
        sizes = Sizes(sized["iterations"], tuple(sized["etas"]))
        etas, seed = [float(eta) for eta in sizes.etas], self.config.seed
        total = pilots(len(etas))
        self.watcher.note(
            f"{total} pilots of {sizes.iterations} iterations: eta {', '.join(f'{e:g}' for e in etas)}, then the better half again"
        )
        runs = {(eta, seed): self._pilot(eta, seed, sizes.iterations, i, total) for i, eta in enumerate(etas)}
        ranking = sorted(etas, key=lambda eta: -self._mean(runs, eta))
        second = sorted(ranking[: finalists(len(etas))])
        for i, eta in enumerate(second):
            runs[eta, seed + 1] = self._pilot(eta, seed + 1, sizes.iterations, len(etas) + i, total)
        clusters = self.measurement.clusters
        pooled = {eta: np.mean([_array(runs[eta, s], self.reward) for s in (seed, seed + 1)], axis=0) for eta in second}
        before = _array(base, self.reward)
        suggested, behind = choose_eta(pooled, before, clusters)
        learnt = any(improved(values, before, clusters) for values in pooled.values())
        rows = [self._row(eta, runs, base, behind.get(eta)) for eta in etas]
        left = self.minutes * 60 - (time.monotonic() - started)
        deployment = self._kept("deployment.json", lambda: self._deployment(suggested, base, left, rows))
        spent = sum(part["seconds_spent"] for part in (base, sized, deployment, *runs.values()))
        advice = self._advice(base, sizes, rows, suggested, behind, learnt, deployment, spent / 60)
        atomic_write_text(self.out / "advice.json", json.dumps(advice, indent=2) + "\n")
        return advice

    def _check_directory(self) -> None:
        """Makes the directory, or finds in it what was asked for here."""
        asked = {
            "config": self.config.model_dump(mode="json"),
            "etas": self.etas and list(self.etas),
            "minutes": self.minutes,
        }
        file = self.out / "request.json"
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            other = (
                difference(parse_config(before["config"], f"the configuration in '{file}'"), self.config) is not None
            )
            # Nothing rests on the budget before the pilots are sized: one that proved too small may be raised.
            resized = before["minutes"] != self.minutes and (self.out / "sizes.json").is_file()
            if other or before["etas"] != asked["etas"] or resized:
                raise EtudeError(
                    f"--out '{self.out}' holds advice on something else: repeat that command, or give a new directory."
                )
        elif holds_something(self.out):
            raise EtudeError(f"--out '{self.out}' holds something else: give a new or empty directory.")
        self.out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json.dumps(asked, indent=2) + "\n")

    def _kept(self, name: str, make: Any) -> dict[str, Any]:
        """What a file of the directory holds; made and written first if there is none."""
        file = self.out / name
        if not file.is_file():
            started = time.monotonic()
            made = make()
            made["seconds_spent"] = time.monotonic() - started
            atomic_write_text(file, json.dumps(made, indent=2) + "\n")
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return kept

    def _measure_base(self) -> dict[str, Any]:
        """The base model's scores under the ODE, how long they took, and what the theory makes of its latents."""
        policy, count = policy_of(self.config), self.measurement.num_images
        grid, texts = policy.grid(self.steps), self.measurement.shown().texts
        conditioning = policy.encode(texts)
        started = time.monotonic()
        latents = rollout(
            policy,
            SamplingPlan.ode(self.steps).tabulate(grid).to(policy.device),
            conditioning,
            NoiseSource(self.config.seed, STREAM),
            list(range(count)),
            self.measurement.guidance_scale,
            self.config.rollout.batch_size,
        ).latents
        scores = self.measurement.scores(policy.decode(latents))
        seconds = time.monotonic() - started
        flat = latents.double().cpu().numpy().reshape(count, -1)
        training = policy.grid(self.config.sampling.num_steps)
        theory = (
            _theory(flat, training.a.numpy(), training.s.numpy()) if self.config.sampling.kernel == "gddim" else None
        )
        return {"seconds": seconds, "theory": theory, "scores": {name: v.tolist() for name, v in scores.items()}}

    def _size(self, base: dict[str, Any], started: float) -> dict[str, Any]:
        """Times a run of one iteration, and sizes the pilots by it."""
        etas = sorted(set(self.etas if self.etas is not None else _with_theory(ETAS, base["theory"])))
        timing = self._kept("timing.json", lambda: self._time(min(etas, key=lambda eta: abs(math.log(eta)))))
        iteration, fixed = timing["iteration"], timing["fixed"] + base["seconds"]
        left = self.minutes * 60 - (time.monotonic() - started)
        self.watcher.note(f"one iteration takes {iteration:.1f} s, all else of a pilot {fixed:.1f} s")
        sizes = size_pilots(etas, left * PILOTS_SHARE, iteration, fixed, self.config.iterations)
        return {"iterations": sizes.iterations, "etas": list(sizes.etas)}

    def _time(self, eta: float) -> dict[str, Any]:
        """Seconds of an iteration, and of all else in a run of one: loading, two evaluations, exports, the report."""
        run = self.out / "timing"
        shutil.rmtree(run, ignore_errors=True)
        begun = time.monotonic()
        Trainer(self._config(eta, self.config.seed, 1), run).train()
        whole = time.monotonic() - begun
        row = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        iteration = row["seconds"]["total"] - row["seconds"]["evaluation"]
        return {"iteration": iteration, "fixed": whole - iteration}

    def _config(self, eta: float, seed: int, iterations: int) -> TrainConfig:
        """A pilot's configuration: evaluated at its begin and end."""
        tree = self.config.model_dump(mode="json")
        tree |= {"seed": seed, "iterations": iterations}
        tree["sampling"] |= {"eta": eta, "eta_schedule": None}
        tree["evaluation"] |= {"every": iterations, "stop_on_fall": {}}
        tree["checkpoint"]["best"] = None
        return parse_config(tree, f"the pilot at eta = {eta:g}")

    def _pilot(self, eta: float, seed: int, iterations: int, done: int, total: int) -> dict[str, Any]:
        """A pilot's scores under the ODE, image by image, and its gap; trained unless that is done."""
        run = self.out / f"eta-{eta:g}-seed-{seed}"
        label = f"eta {eta:g}, seed {seed}"

        def train() -> dict[str, Any]:
            display = self.watcher.pilot(label, done, total, iterations)
            trainer = Trainer(self._config(eta, seed, iterations), run, resume=True, display=display)
            summary = trainer.train()
            with swapped(trainer.parameters, trainer.ema):
                scores = self.measurement.scores(self.measurement.images(trainer.policy, 0.0, self.steps))
            return {"gap": summary["final"]["gap"], "scores": {name: v.tolist() for name, v in scores.items()}}

        run.mkdir(exist_ok=True)
        return self._kept(f"{run.name}/scores.json", train)

    def _mean(self, runs: dict[tuple[float, int], dict[str, Any]], eta: float) -> float:
        return float(_array(runs[eta, self.config.seed], self.reward).mean())

    def _row(
        self, eta: float, runs: dict[tuple[float, int], dict[str, Any]], base: dict[str, Any], behind: Estimate | None
    ) -> dict[str, Any]:
        """What is known of an eta: over both seeds where there are two."""
        own = {seed: run for (at, seed), run in runs.items() if at == eta}
        clusters, before = self.measurement.clusters, _array(base, self.reward)
        values = {seed: _array(run, self.reward) for seed, run in own.items()}
        mean = np.mean(list(values.values()), axis=0)
        return {
            "eta": eta,
            "seeds": list(own),
            "ode": mean_summary(mean, clusters).to_dict(),
            "improvement": paired_summary(mean - before, clusters).to_dict(),
            "improvement_by_seed": [paired_summary(v - before, clusters).to_dict() for v in values.values()],
            "gap": own[self.config.seed]["gap"][self.reward],
            "behind_best": behind.to_dict() if behind is not None else None,
        }

    def _deployment(
        self, eta: float, base: dict[str, Any], seconds: float, rows: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Solvers at several step counts on the pilot at that eta, as many as the time allows, by their cost."""
        policy = self._tuned(self.out / f"eta-{eta:g}-seed-{self.config.seed}")
        texts, clusters = self.measurement.shown().texts, self.measurement.clusters
        per_evaluation = base["seconds"] / self.steps
        scores: dict[tuple[str, int], Scores] = {}
        for solver, steps in deployment_cells(self.steps):
            cost = SOLVERS[solver].evaluations(steps) * per_evaluation
            if len(scores) >= 2 and cost > seconds:
                continue
            self.watcher.note(f"drawing with {solver}, {steps} steps")
            begun = time.monotonic()
            images = sample_with_solver(
                policy,
                texts,
                solver,
                steps,
                self.measurement.guidance_scale,
                self.config.seed,
                self.config.rollout.batch_size,
                STREAM,
            )
            scores[solver, steps] = self.measurement.scores(images)
            seconds -= time.monotonic() - begun
        improvement = next(row["improvement"]["mean"] for row in rows if row["eta"] == eta)
        rewards = {cell: found[self.reward] for cell, found in scores.items()}
        return {"cells": rank_samplers(rewards, clusters, ("ddim", self.steps), improvement)}

    def _tuned(self, run: Path) -> TrainablePolicy:
        """The model as that pilot left it."""
        if not self.config.lora.rank:
            return policy_of(self.config.model_copy(update={"model": str(run / "model"), "pipeline_config": None}))
        policy = policy_of(self.config)
        policy.load_lora(run / "lora")
        return policy

    def _advice(
        self,
        base: dict[str, Any],
        sizes: Sizes,
        rows: list[dict[str, Any]],
        suggested: float,
        behind: dict[float, Estimate],
        learnt: bool,
        deployment: dict[str, Any],
        minutes: float,
    ) -> dict[str, Any]:
        config, row = self.config, next(row for row in rows if row["eta"] == suggested)
        cell = next(cell for cell in deployment["cells"] if cell["suggested"])
        return {
            "model": config.model,
            "reward": self.reward,
            "rewards": config.rewards,
            "suggestion": {
                "eta": suggested,
                "kernel": config.sampling.kernel,
                "training_steps": config.sampling.num_steps,
                "solver": cell["solver"],
                "steps": cell["steps"],
            },
            "reasons": reasons(row, behind, learnt, base["theory"], cell, self.reward),
            "pilots": rows,
            "deployment": deployment["cells"],
            "theory": base["theory"],
            "iterations": sizes.iterations,
            "images": self.measurement.num_images,
            "prompts": len(self.measurement.prompts),
            "budget_minutes": self.minutes,
            "minutes": minutes,
        }


def _theory(latents: np.ndarray, a: np.ndarray, s: np.ndarray) -> dict[str, float]:
    """The recommended eta on these levels for independent Gaussians with the latents' moments.

    An error of the noise prediction is not defined at a = 0, where a rectified flow begins: with it the levels begin one step later.
    """
    chosen = np.linspace(0, latents.shape[1] - 1, min(DIMENSIONS, latents.shape[1])).astype(int)
    law = Gaussian(latents[:, chosen].mean(0), latents[:, chosen].var(0, ddof=1))
    exact = recommended_eta(law, (a, s))
    first = int(a[0] == 0)
    wrong = recommended_eta(
        law, (a[first:], s[first:]), score_error=ScoreError(bias=SCORE_ERROR, gain=SCORE_ERROR), known_sign=False
    )
    return {"exact": exact.eta, "with_error": wrong.eta, "mean_variance": float(latents.var(0, ddof=1).mean())}


def _with_theory(etas: Iterable[float], theory: dict[str, float] | None) -> list[float]:
    """The etas and the theory's, if that is not next to one of them."""
    known = list(etas)
    found = 0.0 if theory is None else round(theory["with_error"], 1)
    return [*known, found] if found > 0 and min(abs(found - eta) for eta in known) > 0.2 else known


def _array(run: dict[str, Any], reward: str) -> np.ndarray:
    return np.asarray(run["scores"][reward])
