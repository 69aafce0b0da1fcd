"""Suggest an eta to train with and a sampler to deploy, from pilot runs within a budget of time."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from etude.advice import rules
from etude.config import TrainConfig, difference, load_config, parse_config, recipe_names
from etude.errors import EtudeError
from etude.files import atomic_write_text
from etude.measuring.pairs import Measurement
from etude.measuring.statistics import Estimate, estimate_mean
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.policies.trainable import TrainablePolicy, swapped
from etude.prompts import load_prompts
from etude.rewards import WEIGHTED_SUM, WeightedRewards
from etude.runs.layout import holds_something
from etude.sampling.sampler import ODE
from etude.sampling.solvers import Solver
from etude.theory import Gaussian, ScoreError, recommended_eta
from etude.training.dry_run import outlined
from etude.training.progress import Display, SilentDisplay
from etude.training.trainer import Trainer

Row = dict[str, Any]
REQUEST = "request.json"
"""The file that says what a directory holds advice on."""
ETAS = (0.5, 1.0, 1.5, 2.0)
"""Default etas of the pilots in gDDIM's unit; the theory's recommendation is added."""
STREAM = "advice"
"""Stream of the noise that pilots are compared on."""
DIMENSIONS = 256
"""Largest number of latent dimensions in the theory's Gaussian."""


class Watcher(Protocol):
    """Receiver of the progress."""

    def note(self, text: str) -> None:
        """Show a sentence. Default: nothing."""
        return

    def pilot(self, label: str, done: int, total: int, iterations: int) -> Display:
        """Return the display of pilot `done + 1` of `total`. Default: a silent one."""
        return SilentDisplay()


class SilentWatcher(Watcher):
    """A receiver that shows nothing."""


def base_config(
    model: str, rewards: dict[str, float], recipe: str | None = None, overrides: Sequence[str] = ()
) -> TrainConfig:
    """The settings of all pilots: a recipe's. Default: the model's first one with gDDIM.

    Raises:
        EtudeError: no recipe is for the model, and none was given.
    """
    if recipe is None:
        fitting = {name: config for name in recipe_names() if (config := load_config(name)).model == model}
        gddim = [name for name, config in fitting.items() if config.sampling.kernel == "gddim"]
        recipe = next(iter([*gddim, *fitting]), None)
    if recipe is None:
        raise EtudeError(
            f"no built-in recipe is for model '{model}': give --recipe, the one whose settings the pilots should train with "
            "(`etude recipes` lists them)."
        )
    return load_config(recipe, [*overrides, f"model={json.dumps(model)}"], rewards)


class Adviser:
    """Advice on one model and reward, within a budget of `minutes`.

    1. The base model draws held-out images under the ODE. Pilots are compared with these images,
       and their latents' moments make the Gaussian of `etude.theory.recommended_eta`.
    2. One iteration is timed, and the pilots are sized so that all of them end within the budget.
    3. First round: a short run at every eta. Second round: the better half again with another seed,
       so that a lucky run does not win.
    4. Every pilot is measured under the ODE on the same prompts and the same noise, which its
       training never saw. `rules.choose_eta` suggests an eta.
    5. The pilot at that eta is drawn with several solvers and step counts, of which
       `rules.rank_samplers` suggests one.

    A pilot is an ordinary run of the trainer in a directory of its own.

    Args:
        config: settings of all pilots (`base_config`), which differ in eta and seed.
        out: directory of the pilots; advice that it holds already is continued.
        etas: stochasticities to try. Default: ETAS and the theory's.

    Raises:
        EtudeError: the etas do not suit the kernel, or the directory holds something else.
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
        prompts, images = load_prompts(config.prompts.evaluation), config.evaluation.num_images
        shared = (images, config.seed, STREAM, config.rollout.batch_size)
        self.measurement = Measurement(prompts, self.rewards.evaluate, *shared)
        self.ode = ODE(config.evaluation.num_steps or config.sampling.num_steps, config.sampling.guidance_scale)

    def advise(self) -> Row:
        """Run what is not done yet; return the advice, which is also written to `advice.json`."""
        started = time.monotonic()
        self.rewards.load()  # first: a reward that cannot be used leaves nothing to clear away
        request = self._check_directory()
        # Before anything is computed, too: a pilot that would be refused, by its model or its adapter, leaves nothing.
        measured = (self.out / "base.json").is_file()
        if not measured:
            outlined(self.config, self.out / "pilot")
        policy = None if measured else load_source(ModelSource.of(self.config))
        self.out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.out / REQUEST, request)
        config, clusters, seed = self.config, self.measurement.clusters, self.config.seed
        base = self._kept("base.json", lambda: self._measure_base(policy))
        policy = None
        sized = self._kept("sizes.json", lambda: self._size(base, started))
        iterations, etas = sized["iterations"], [float(eta) for eta in sized["etas"]]
        total = rules.pilots(len(etas))
        tried = ", ".join(f"{eta:g}" for eta in etas)
        self.watcher.note(f"{total} pilots of {iterations} iterations: eta {tried}, then the better half again")
        runs = {(eta, seed): self._pilot(eta, seed, iterations, i, total) for i, eta in enumerate(etas)}
        ranking = sorted(etas, key=lambda eta: -float(self._scores(runs[eta, seed]).mean()))
        second = sorted(ranking[: rules.finalists(len(etas))])
        for i, eta in enumerate(second, start=len(etas)):
            runs[eta, seed + 1] = self._pilot(eta, seed + 1, iterations, i, total)
        pooled = {eta: np.mean([self._scores(runs[eta, s]) for s in (seed, seed + 1)], axis=0) for eta in second}
        before = self._scores(base)
        suggested, behind = rules.choose_eta(pooled, before, clusters)
        learnt = any(rules.improved(values, before, clusters) for values in pooled.values())
        rows = [self._row(eta, runs, before, behind.get(eta)) for eta in etas]
        row = rows[etas.index(suggested)]
        left = self.minutes * 60 - (time.monotonic() - started)
        deployment = self._kept("deployment.json", lambda: self._deployment(row, base, left))
        cell = next(cell for cell in deployment["cells"] if cell["suggested"])
        trained = {"kernel": config.sampling.kernel, "training_steps": config.sampling.num_steps}
        advice = {
            "model": config.model,
            "reward": self.reward,
            "rewards": config.rewards,
            "suggestion": {"eta": suggested, **trained, "solver": cell["solver"], "steps": cell["steps"]},
            "reasons": rules.reasons(row, behind, learnt, base["theory"], cell, self.reward),
            "pilots": rows,
            "deployment": deployment["cells"],
            "theory": base["theory"],
            "iterations": iterations,
            "images": self.measurement.num_images,
            "prompts": len(set(self.measurement.clusters)),
            "budget_minutes": self.minutes,
            "minutes": sum(part["seconds_spent"] for part in (base, sized, deployment, *runs.values())) / 60,
        }
        atomic_write_text(self.out / "advice.json", json.dumps(advice, indent=2) + "\n")
        return advice

    def _check_directory(self) -> str:
        """Check that the directory is empty or holds the same request; returns the request's text."""
        etas, config = self.etas and list(self.etas), self.config.model_dump(mode="json")
        asked = {"config": config, "etas": etas, "minutes": self.minutes}
        file = self.out / REQUEST
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            stored = parse_config(before["config"], f"the configuration in '{file}'")
            # Before the pilots are sized nothing depends on the budget, so it may be raised.
            resized = before["minutes"] != self.minutes and (self.out / "sizes.json").is_file()
            if difference(stored, self.config) is not None or before["etas"] != etas or resized:
                raise EtudeError(
                    f"--out '{self.out}' holds advice on something else: repeat that command, or give a new directory."
                )
        elif holds_something(self.out):
            raise EtudeError(f"--out '{self.out}' holds something else: give a new or empty directory.")
        return json.dumps(asked, indent=2) + "\n"

    def _kept(self, name: str, make: Any) -> Row:
        """Read a file of the directory; where there is none, write the result of `make` first."""
        file = self.out / name
        if not file.is_file():
            started = time.monotonic()
            result = make()
            result["seconds_spent"] = time.monotonic() - started
            atomic_write_text(file, json.dumps(result, indent=2) + "\n")
        return json.loads(file.read_text(encoding="utf-8"))

    def _measure_base(self, policy: TrainablePolicy | None) -> Row:
        """The base model's scores under the ODE, their cost, and the theory's advice."""
        assert policy is not None
        of = self.measurement
        theory, texts = None, of.shown().texts
        policy.encode_ahead(texts)  # which is not part of the time
        started = time.monotonic()
        latents = self.ode.draw(policy, texts, of.seed, stream=of.stream, batch_size=of.batch_size, decode=False)
        scores = of.scores(policy.decode(latents))
        seconds = time.monotonic() - started
        if self.config.sampling.kernel == "gddim":
            grid = policy.grid(self.config.sampling.num_steps)
            flat = latents.double().cpu().numpy().reshape(of.num_images, -1)
            theory = _theory(flat, grid.a.numpy(), grid.s.numpy())
        return {"seconds": seconds, "theory": theory, "scores": {name: v.tolist() for name, v in scores.items()}}

    def _size(self, base: Row, started: float) -> Row:
        """Time a run of one iteration, and size the pilots by it."""
        etas = sorted(set(self.etas or ETAS))
        if self.etas is None and base["theory"] is not None:
            advised = round(base["theory"]["with_error"], 1)
            if advised > 0 and min(abs(advised - eta) for eta in etas) > 0.2:
                etas = sorted([*etas, advised])
        timing = self._kept("timing.json", lambda: self._time(min(etas, key=lambda eta: abs(math.log(eta)))))
        iteration, fixed = timing["iteration"], timing["fixed"] + base["seconds"]
        left = self.minutes * 60 - (time.monotonic() - started)
        self.watcher.note(f"one iteration takes {iteration:.1f} s, all else of a pilot {fixed:.1f} s")
        sizes = rules.size_pilots(etas, left * rules.PILOTS_SHARE, iteration, fixed, self.config.iterations)
        return {"iterations": sizes.iterations, "etas": list(sizes.etas)}

    def _time(self, eta: float) -> Row:
        """Time an iteration, and the rest of a run: loading, evaluations, exports, report."""
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
        tree = self.config.model_dump(mode="json") | {"seed": seed, "iterations": iterations}
        tree["sampling"] |= {"eta": eta, "eta_schedule": None}
        tree["evaluation"] |= {"every": iterations, "stop_on_fall": {}}
        tree["checkpoint"]["best"] = None
        return parse_config(tree, f"the pilot at eta = {eta:g}")

    def _pilot(self, eta: float, seed: int, iterations: int, done: int, total: int) -> Row:
        """A pilot's scores under the ODE, image by image, and its gap; train it if need be."""
        run = self.out / f"eta-{eta:g}-seed-{seed}"

        def train() -> Row:
            display = self.watcher.pilot(f"eta {eta:g}, seed {seed}", done, total, iterations)
            trainer = Trainer(self._config(eta, seed, iterations), run, resume=True, display=display)
            summary = trainer.train()
            with swapped(trainer.parameters, trainer.ema):
                scores = self.measurement.scores(self.measurement.images(trainer.policy, self.ode))
            return {"gap": summary["final"]["gap"], "scores": {name: v.tolist() for name, v in scores.items()}}

        run.mkdir(exist_ok=True)
        return self._kept(f"{run.name}/scores.json", train)

    def _scores(self, run: Row) -> np.ndarray:
        return np.asarray(run["scores"][self.reward])

    def _row(self, eta: float, runs: dict[tuple[float, int], Row], before: np.ndarray, behind: Estimate | None) -> Row:
        """The figures of an eta, over both seeds where there are two."""
        own, clusters = {seed: run for (at, seed), run in runs.items() if at == eta}, self.measurement.clusters
        values = [self._scores(run) for run in own.values()]
        mean = np.mean(values, axis=0)
        return {
            "eta": eta,
            "seeds": list(own),
            "ode": estimate_mean(mean, clusters).to_dict(),
            "improvement": estimate_mean(mean - before, clusters).to_dict(),
            "improvement_by_seed": [estimate_mean(each - before, clusters).to_dict() for each in values],
            "gap": own[self.config.seed]["gap"][self.reward],
            "behind_best": behind.to_dict() if behind is not None else None,
        }

    def _deployment(self, row: Row, base: Row, seconds: float) -> Row:
        """Measure solvers and step counts on the suggested pilot, as many as the time allows."""
        run = self.out / f"eta-{row['eta']:g}-seed-{self.config.seed}"
        policy = load_source(ModelSource.tuned(self.config, run))
        per_evaluation = base["seconds"] / self.ode.steps
        scores: dict[tuple[str, int], np.ndarray] = {}
        for name, steps in rules.deployment_cells(self.ode.steps):
            solver = Solver(name, steps, self.ode.guidance)
            if len(scores) >= 2 and solver.evaluations * per_evaluation > seconds:
                continue
            self.watcher.note(f"drawing with {name}, {steps} steps")
            begun = time.monotonic()
            scores[name, steps] = self.measurement.scores(self.measurement.images(policy, solver))[self.reward]
            seconds -= time.monotonic() - begun
        reference, improvement = ("ddim", self.ode.steps), row["improvement"]["mean"]
        return {"cells": rules.rank_samplers(scores, self.measurement.clusters, reference, improvement)}


def _theory(latents: np.ndarray, a: np.ndarray, s: np.ndarray) -> dict[str, float]:
    """The recommended eta on these levels for independent Gaussians with the latents' moments."""
    chosen = np.linspace(0, latents.shape[1] - 1, min(DIMENSIONS, latents.shape[1])).astype(int)
    law = Gaussian(latents[:, chosen].mean(0), latents[:, chosen].var(0, ddof=1))
    exact = recommended_eta(law, (a, s))
    # An error of the noise prediction is not defined at a = 0, where a rectified flow begins.
    first, error = int(a[0] == 0), ScoreError(bias=rules.SCORE_ERROR, gain=rules.SCORE_ERROR)
    wrong = recommended_eta(law, (a[first:], s[first:]), score_error=error, known_sign=False)
    return {"exact": exact.eta, "with_error": wrong.eta, "mean_variance": float(latents.var(0, ddof=1).mean())}
