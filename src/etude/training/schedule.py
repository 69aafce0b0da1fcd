"""The plan of each iteration: every step stochastic (DDPO, Flow-GRPO), or a moving window (MixGRPO).

The eta of each step is that of `etude.sampling.etas`, inside a window too.
"""

from __future__ import annotations

from functools import partial

import torch

from etude.config import SamplingConfig
from etude.errors import EtudeError
from etude.sampling.etas import compact
from etude.sampling.kernels import make_kernel
from etude.sampling.paths import Grid
from etude.sampling.plans import SamplingPlan, StepTable
from etude.sampling.windows import WindowSchedule, make_window, trainable_range
from etude.undisturbed import undisturbed


def check_sampling(sampling: SamplingConfig, trains_steps: bool) -> None:
    """Refuses kernels, etas and windows that cannot be trained with, before a model is loaded.

    `trains_steps`: whether the objective needs the log-probabilities of stochastic steps.
    """
    for eta in sampling.all_etas:
        make_kernel(sampling.kernel, eta)
    if not trains_steps and sampling.window is not None:
        raise EtudeError(
            "sampling.window is for objectives that train the steps of the sampler, and this one trains on final images: "
            "set sampling.window to null."
        )
    if not trains_steps:
        return
    if sampling.solver is not None:
        raise EtudeError(
            f"sampling.solver = {sampling.solver} is deterministic, and this objective trains the sampler's stochastic steps: set "
            "sampling.solver to null, or objective.kind to nft, awm, elbo_pg or dpo."
        )
    if max(sampling.all_etas) == 0:
        raise EtudeError(
            "sampling.eta = 0 is the ODE, which has no log-probability to train; use an eta above 0 (0.5 is mild, 1 is DDPM)."
        )
    schedule = sampling.eta_schedule
    if schedule is not None and schedule.over == "iterations" and min(sampling.all_etas) == 0:
        key = "eta" if sampling.eta == 0 else "eta_schedule.end"
        raise EtudeError(
            f"sampling.{key} = 0 is the ODE, which has no log-probability to train in that iteration; use a value above 0, "
            "for example 0.1."
        )


class PlanSchedule:
    """The training sampler of each iteration, a function of the iteration alone: all processes agree.

    Args:
        seed: seed of the random window.
        iterations: number of iterations over which a schedule of eta may extend.
        trains_steps: whether the stochastic steps are trained, or final images alone.

    Raises:
        EtudeError: the kernel refuses eta at some level in some iteration, no step is stochastic,
            or the window does not fit the stochastic steps.
    """

    @undisturbed()
    def __init__(
        self,
        sampling: SamplingConfig,
        grid: Grid,
        seed: int,
        device: torch.device | str = "cpu",
        iterations: int = 1,
        trains_steps: bool = True,
    ) -> None:
        check_sampling(sampling, trains_steps)
        self.sampling, self.grid, self.device, self.trains_steps = sampling, grid, device, trains_steps
        self.etas = sampling.etas(iterations)
        self.schedule = self._window_schedule(self._check(), seed)
        self._last: tuple[SamplingPlan, StepTable] | None = None

    def eta_at(self, iteration: int) -> float | list[float]:
        """The eta of an iteration's steps, 0 under a solver: a number, or a list by step where they differ."""
        if self.sampling.solver is not None:
            return 0.0
        return compact(self.etas.at(iteration, self.sampling.num_steps))

    def window_at(self, iteration: int) -> dict[str, int] | None:
        """First step (from 0) and size of the window in an iteration. None: every step is stochastic."""
        if self.schedule is None:
            return None
        if iteration < 1:
            raise EtudeError(f"iteration {iteration} has no window: training counts its iterations from 1.")
        return {"start": self.schedule.start_at(iteration), "size": self.schedule.size}

    @undisturbed()
    def table_at(self, iteration: int) -> StepTable:
        """The coefficients of an iteration's plan, on the device."""
        plan = self._plan(iteration)
        if self._last is None or self._last[0] != plan:
            self._last = plan, plan.tabulate(self.grid).to(self.device)
        return self._last[1]

    def _plan(self, iteration: int) -> SamplingPlan:
        """The plan of an iteration: the kernels of `_everywhere` inside the window, the ODE outside."""
        sampling, plan, window = self.sampling, self._everywhere(iteration), self.window_at(iteration)
        if window is None or sampling.window is None:
            return plan
        start, size, compression = window["start"], window["size"], sampling.window.compression
        kernels = [step.kernel for step in plan.steps[start : start + size]]
        return SamplingPlan.window(sampling.num_steps, kernels, start, size, sampling.first_step, compression)

    def _everywhere(self, iteration: int) -> SamplingPlan:
        """The plan of an iteration without a window."""
        etas, kernel = self.etas.at(iteration, self.sampling.num_steps), partial(make_kernel, self.sampling.kernel)
        return SamplingPlan.from_etas(etas, kernel, self.trains_steps, self.sampling.first_step)

    def _check(self) -> StepTable:
        """The table of the first iteration without a window, after a check that all train the same steps.

        Two iterations stand for all: the etas of the others lie between theirs, every kernel allows
        all etas from 0 to its largest, and its noise grows with eta.
        """
        tables = {k: self._everywhere(k).tabulate(self.grid) for k in self.etas.extremes}
        steps = {k: table.trained_steps for k, table in tables.items()}
        if self.trains_steps and not steps[1]:
            raise EtudeError(
                f"sampling.num_steps = {self.sampling.num_steps} leaves no stochastic step to train: use more steps."
            )
        if self.trains_steps and steps[1] != steps[max(steps)]:
            fewest = min(steps, key=lambda k: len(steps[k]))
            raise EtudeError(
                f"eta = {self.etas.at(fewest, 1)[0]:g} in iteration {fewest} is so small that its noise rounds to 0: begin and end "
                "sampling.eta_schedule higher."
            )
        return tables[1]

    def _window_schedule(self, everywhere: StepTable, seed: int) -> WindowSchedule | None:
        """The window's schedule within the stochastic steps: all steps of a window are trained."""
        window = self.sampling.window
        if window is None:
            return None
        trainable = trainable_range(everywhere)
        stop = trainable.stop if window.end is None else min(window.end, trainable.stop)
        start = max(window.start or 0, trainable.start)
        place = {"start": start, "stop": stop, "seed": seed}
        return make_window(window.strategy, {**window.settings(), **place}, window.options)
