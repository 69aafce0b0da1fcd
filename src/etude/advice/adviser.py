"""Suggest an eta to train with and a sampler to deploy, from pilot runs within a budget of time.

1. The base model draws held-out images under the ODE. Pilots are compared with these images, and
   their latents' moments make the Gaussian for which `etude.theory.recommended_eta` is asked.
2. One iteration is timed, and the pilots are sized so that all of them end within the budget.
3. First round: a short run at every eta. Second round: the better half again with another seed, so
   that a lucky run does not win.
4. Every pilot is measured under the ODE on the same prompts and the same noise, which its training
   never saw. The suggested eta is the smallest that is not significantly worse than the best: less
   noise means a smaller gap to the ODE, and nothing speaks for more. If no pilot surely improved on
   the base model, nothing tells etas apart, and the eta nearest to 1 is suggested.
5. The pilot at that eta is drawn with several solvers and step counts. The suggestion is the
   cheapest that surely keeps most of the improvement.

A pilot is an ordinary run of the trainer in a directory of its own. Given the same directory again,
advice continues where it was stopped.
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
from etude.measuring.gap import Measurement, Scores
from etude.measuring.statistics import Estimate, estimate_mean
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.policies.trainable import swapped
from etude.prompts import load_prompts
from etude.rewards import WEIGHTED_SUM, WeightedRewards
from etude.runs.layout import holds_something
from etude.sampling.sampler import ODE
from etude.sampling.solvers import Solver
from etude.theory import Gaussian, ScoreError, recommended_eta
from etude.training.progress import Display, SilentDisplay
from etude.training.trainer import Trainer

ETAS = (0.5, 1.0, 1.5, 2.0)
"""Default etas of the pilots in gDDIM's unit; the theory's recommendation is added."""
STREAM = "advice"
"""Stream of the noise that pilots are compared on."""
DIMENSIONS = 256
"""Largest number of latent dimensions in the theory's Gaussian."""


class Watcher(Protocol):
    """Receiver of the progress."""

    def note(self, text: str) -> None:
        """Show a sentence."""

    def pilot(self, label: str, done: int, total: int, iterations: int) -> Display:
        """Return the display of pilot `done + 1` of `total`, which begins."""


class SilentWatcher:
    """A receiver that shows nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def pilot(self, label: str, done: int, total: int, iterations: int) -> Display:
        """Return a display that shows nothing."""
        return SilentDisplay()


def base_config(
    model: str, rewards: dict[str, float], recipe: str | None = None, overrides: Sequence[str] = ()
) -> TrainConfig:
    """The settings that all pilots share, taken from a recipe.

    Default: the first built-in recipe for that model with gDDIM.

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
        config: settings of all pilots (`base_config`), which differ in eta and seed.
        minutes: budget.
        out: directory of the pilots; advice that it holds already is continued.
        etas: stochasticities to try. Default: ETAS and the theory's.
        watcher: receiver of the progress. Default: nobody.

    Raises:
        EtudeError: the etas do not suit the kernel, or the directory holds advice on something
            else.
    """

    def __init__(
        self,
        config: TrainConfig,
        minutes: float,
        out: Path,
        etas: Sequence[float] | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        if config.sampling.solver is not None:
            raise EtudeError(
                f"advice chooses the eta of the training sampler, and sampling.solver = {config.sampling.solver} draws without noise: "
                "take a recipe that trains the steps of its sampler."
            )
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
        self.measurement = Measurement(
            load_prompts(config.prompts.evaluation),
            self.rewards.evaluate,
            config.evaluation.num_images,
            config.seed,
            STREAM,
            config.rollout.batch_size,
        )
        self.ode = ODE(config.evaluation.num_steps or config.sampling.num_steps, config.sampling.guidance_scale)

    def advise(self) -> dict[str, Any]:
        """Run what is not done yet; return the advice, which is also written to `advice.json`."""
        started = time.monotonic()
        self.rewards.load()  # first: a reward that cannot be used leaves nothing to clear away
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
        """Make the directory, or check that it holds the same request."""
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
            # Before the pilots are sized nothing depends on the budget, so it may be raised.
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
        """Read a file of the directory; where there is none, write the result of `make` first."""
        file = self.out / name
        if not file.is_file():
            started = time.monotonic()
            result = make()
            result["seconds_spent"] = time.monotonic() - started
            atomic_write_text(file, json.dumps(result, indent=2) + "\n")
        stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return stored

    def _measure_base(self) -> dict[str, Any]:
        """The base model's scores under the ODE, their cost, and the theory's advice."""
        policy, of = load_source(ModelSource.of(self.config)), self.measurement
        texts = of.shown().texts
        policy.encode_ahead(texts)  # which is not part of the time
        started = time.monotonic()
        latents = self.ode.latents(policy, texts, of.seed, stream=of.stream, batch_size=of.batch_size)
        scores = of.scores(policy.decode(latents))
        seconds = time.monotonic() - started
        flat = latents.double().cpu().numpy().reshape(of.num_images, -1)
        training = policy.grid(self.config.sampling.num_steps)
        theory = (
            _theory(flat, training.a.numpy(), training.s.numpy()) if self.config.sampling.kernel == "gddim" else None
        )
        return {"seconds": seconds, "theory": theory, "scores": {name: v.tolist() for name, v in scores.items()}}

    def _size(self, base: dict[str, Any], started: float) -> dict[str, Any]:
        """Time a run of one iteration, and size the pilots by it."""
        etas = sorted(set(self.etas if self.etas is not None else _with_theory(ETAS, base["theory"])))
        timing = self._kept("timing.json", lambda: self._time(min(etas, key=lambda eta: abs(math.log(eta)))))
        iteration, fixed = timing["iteration"], timing["fixed"] + base["seconds"]
        left = self.minutes * 60 - (time.monotonic() - started)
        self.watcher.note(f"one iteration takes {iteration:.1f} s, all else of a pilot {fixed:.1f} s")
        sizes = size_pilots(etas, left * PILOTS_SHARE, iteration, fixed, self.config.iterations)
        return {"iterations": sizes.iterations, "etas": list(sizes.etas)}

    def _time(self, eta: float) -> dict[str, Any]:
        """Seconds of an iteration, and of the rest: loading, evaluations, exports, report."""
        run = self.out / "timing"
        shutil.rmtree(run, ignore_errors=True)
        begun = time.monotonic()
        Trainer(self._config(eta, self.config.seed, 1), run).train()
        whole = time.monotonic() - begun
        row = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        iteration = row["seconds"]["total"] - row["seconds"]["evaluation"]
        return {"iteration": iteration, "fixed": whole - iteration}

    def _config(self, eta: float, seed: int, iterations: int) -> TrainConfig:
        """A pilot's configuration, with evaluations at its beginning and end."""
        tree = self.config.model_dump(mode="json")
        tree |= {"seed": seed, "iterations": iterations}
        tree["sampling"] |= {"eta": eta, "eta_schedule": None}
        tree["evaluation"] |= {"every": iterations, "stop_on_fall": {}}
        tree["checkpoint"]["best"] = None
        return parse_config(tree, f"the pilot at eta = {eta:g}")

    def _pilot(self, eta: float, seed: int, iterations: int, done: int, total: int) -> dict[str, Any]:
        """A pilot's scores under the ODE, image by image, and its gap; train it if need be."""
        run = self.out / f"eta-{eta:g}-seed-{seed}"
        label = f"eta {eta:g}, seed {seed}"

        def train() -> dict[str, Any]:
            display = self.watcher.pilot(label, done, total, iterations)
            trainer = Trainer(self._config(eta, seed, iterations), run, resume=True, display=display)
            summary = trainer.train()
            with swapped(trainer.parameters, trainer.ema):
                scores = self.measurement.scores(self.measurement.images(trainer.policy, self.ode))
            return {"gap": summary["final"]["gap"], "scores": {name: v.tolist() for name, v in scores.items()}}

        run.mkdir(exist_ok=True)
        return self._kept(f"{run.name}/scores.json", train)

    def _mean(self, runs: dict[tuple[float, int], dict[str, Any]], eta: float) -> float:
        return float(_array(runs[eta, self.config.seed], self.reward).mean())

    def _row(
        self, eta: float, runs: dict[tuple[float, int], dict[str, Any]], base: dict[str, Any], behind: Estimate | None
    ) -> dict[str, Any]:
        """The figures of an eta, over both seeds where there are two."""
        own = {seed: run for (at, seed), run in runs.items() if at == eta}
        clusters, before = self.measurement.clusters, _array(base, self.reward)
        values = {seed: _array(run, self.reward) for seed, run in own.items()}
        mean = np.mean(list(values.values()), axis=0)
        return {
            "eta": eta,
            "seeds": list(own),
            "ode": estimate_mean(mean, clusters).to_dict(),
            "improvement": estimate_mean(mean - before, clusters).to_dict(),
            "improvement_by_seed": [estimate_mean(v - before, clusters).to_dict() for v in values.values()],
            "gap": own[self.config.seed]["gap"][self.reward],
            "behind_best": behind.to_dict() if behind is not None else None,
        }

    def _deployment(
        self, eta: float, base: dict[str, Any], seconds: float, rows: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Measure solvers and step counts on the pilot at that eta, as many as the time allows."""
        run = self.out / f"eta-{eta:g}-seed-{self.config.seed}"
        policy = load_source(ModelSource.tuned(self.config, run))
        per_evaluation = base["seconds"] / self.ode.steps
        scores: dict[tuple[str, int], Scores] = {}
        for name, steps in deployment_cells(self.ode.steps):
            solver = Solver(name, steps, self.ode.guidance)
            if len(scores) >= 2 and solver.evaluations * per_evaluation > seconds:
                continue
            self.watcher.note(f"drawing with {name}, {steps} steps")
            begun = time.monotonic()
            scores[name, steps] = self.measurement.scores(self.measurement.images(policy, solver))
            seconds -= time.monotonic() - begun
        improvement = next(row["improvement"]["mean"] for row in rows if row["eta"] == eta)
        rewards = {cell: by_reward[self.reward] for cell, by_reward in scores.items()}
        reference = ("ddim", self.ode.steps)
        return {"cells": rank_samplers(rewards, self.measurement.clusters, reference, improvement)}

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

    An error of the noise prediction is not defined at a = 0, where a rectified flow begins. The eta
    with such an error is therefore for the levels from the next one on.
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
    """The etas, and the theory's unless it is next to one of them."""
    known = list(etas)
    advised = 0.0 if theory is None else round(theory["with_error"], 1)
    return [*known, advised] if advised > 0 and min(abs(advised - eta) for eta in known) > 0.2 else known


def _array(run: dict[str, Any], reward: str) -> np.ndarray:
    return np.asarray(run["scores"][reward])
