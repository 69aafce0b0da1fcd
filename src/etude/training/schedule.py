"""The plan of each iteration: every step stochastic (DDPO, Flow-GRPO), or a moving window (MixGRPO).

`etude.sampling.etas` gives the eta of each step: one number, a list over the steps, or a schedule
over steps or iterations. The steps in a window keep their etas.
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

    Args:
        sampling: settings of the training sampler.
        trains_steps: whether the objective needs the log-probabilities of stochastic steps.

    Raises:
        EtudeError: the kernel does not exist or refuses an eta, some iteration has no stochastic
            step, or there is a window although the objective trains no steps.
    """
    for eta in sampling.all_etas:
        make_kernel(sampling.kernel, eta)
    if not trains_steps:
        if sampling.window is not None:
            raise EtudeError(
                "sampling.window is for objectives that train the steps of the sampler, and this one trains on final images: "
                "set sampling.window to null."
            )
        return
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
    """The training sampler of each iteration.

    The plan depends on the iteration alone, so all processes agree, and so does a resumed run.

    Args:
        sampling: kernel, eta and its schedule, steps, first step and window.
        grid: noise levels of the `num_steps` steps.
        seed: seed of the random window.
        device: device of the tables.
        iterations: number of iterations of the run, over which a schedule of eta may extend.
        trains_steps: whether the stochastic steps are trained. False: the rollout keeps final
            images alone.

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
        """The eta of an iteration's stochastic steps: a number, or a list by step where they differ."""
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
        sampling, window = self.sampling, self.window_at(iteration)
        everywhere = self._everywhere(iteration)
        if window is None or sampling.window is None:
            return everywhere
        kernels = [step.kernel for step in everywhere.steps[window["start"] :][: window["size"]]]
        return SamplingPlan.window(
            sampling.num_steps,
            kernels,
            **window,
            first_step=sampling.first_step,
            compression=sampling.window.compression,
        )

    def _everywhere(self, iteration: int) -> SamplingPlan:
        etas, sampling = self.etas.at(iteration, self.sampling.num_steps), self.sampling
        kernel = partial(make_kernel, sampling.kernel)
        return SamplingPlan.from_etas(etas, kernel, self.trains_steps, sampling.first_step)

    def _check(self) -> StepTable:
        """The table of the first iteration without a window, after a check of all iterations.

        All iterations must train the same steps. Two iterations stand for all: the etas of the
        others lie between theirs, every kernel allows all etas from 0 to its largest, and its noise
        grows with eta.
        """
        tables = {k: self._everywhere(k).tabulate(self.grid) for k in self.etas.extremes}
        steps = {k: table.trained_steps for k, table in tables.items()}
        if not self.trains_steps:
            return tables[1]
        if not steps[1]:
            raise EtudeError(
                f"sampling.num_steps = {self.sampling.num_steps} leaves no stochastic step to train: use more steps."
            )
        if steps[1] != steps[max(steps)]:
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
        start = trainable.start if window.start is None else max(window.start, trainable.start)
        return make_window(window.strategy, {**window.settings(), "start": start, "stop": stop, "seed": seed})
