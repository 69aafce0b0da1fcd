"""Which plan each iteration trains under: every step stochastic (DDPO, Flow-GRPO), or a window that moves (MixGRPO, MixGRPO-Flash).

The eta of each step is `etude.sampling.etas`' business: one number, a list over the steps, or a schedule over steps or iterations. A window takes
from it the etas of the steps it holds.
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
from etude.sampling.windows import WindowSchedule, trainable_range


class TrainingPlans:
    """The training sampler of each iteration: a function of the iteration alone, so that processes agree and a resumed run too.

    Args:
        sampling: kernel, eta and its schedule, steps, first step and window.
        grid: the levels of its `num_steps` steps.
        seed: of the random window.
        device: where the tables are needed.
        iterations: of the whole run, over which a schedule of eta may stretch.

    Raises:
        EtudeError: eta is illegal for the kernel at some level in some iteration, no step is stochastic, or the window does not fit
            those that are.
    """

    def __init__(
        self,
        sampling: SamplingConfig,
        grid: Grid,
        seed: int,
        device: torch.device | str = "cpu",
        iterations: int = 1,
    ) -> None:
        self.sampling, self.grid, self.device = sampling, grid, device
        self.etas = sampling.etas(iterations)
        everywhere = self._check()
        self.schedule = self._schedule(everywhere, seed)
        self._last: tuple[SamplingPlan, StepTable] | None = None

    def eta_at(self, iteration: int) -> float | list[float]:
        """The eta of an iteration's stochastic steps: a number, or a list by step where they differ."""
        return compact(self.etas.at(iteration, self.sampling.num_steps))

    def window_at(self, iteration: int) -> dict[str, int] | None:
        """First step and size of the window in an iteration, whose steps count from 0; None where every step is stochastic."""
        if self.schedule is None:
            return None
        return {"start": self.schedule.start_at(iteration), "size": self.schedule.size}

    def table_at(self, iteration: int) -> StepTable:
        """The coefficients of the iteration's plan on the device."""
        plan = self._plan(iteration)
        if self._last is None or self._last[0] != plan:
            self._last = plan, plan.tabulate(self.grid).to(self.device)
        return self._last[1]

    def _plan(self, iteration: int) -> SamplingPlan:
        """The steps of the window with the kernels that all steps would have without one, the ODE around them."""
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
        return SamplingPlan.from_etas(etas, partial(make_kernel, sampling.kernel), first_step=sampling.first_step)

    def _check(self) -> StepTable:
        """The table of the first iteration without a window, once every iteration is known to have one that trains the same steps.

        Two iterations stand for all: the etas of the others lie between theirs, every kernel allows the etas from 0 to its largest,
        and its noise grows with eta.
        """
        tables = {k: self._everywhere(k).tabulate(self.grid) for k in self.etas.extremes}
        steps = {k: table.trained_steps for k, table in tables.items()}
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

    def _schedule(self, everywhere: StepTable, seed: int) -> WindowSchedule | None:
        """The window's schedule within the steps that can be stochastic, so that all of a window's steps are trained."""
        window = self.sampling.window
        if window is None:
            return None
        possible = trainable_range(everywhere)
        end = possible.stop if window.end is None else min(window.end, possible.stop)
        return WindowSchedule(
            strategy=window.strategy,
            num_steps=end,
            start=possible.start if window.start is None else max(window.start, possible.start),
            size=window.size,
            iters_per_shift=window.iters_per_shift,
            stride=window.stride,
            roll_back=window.roll_back,
            seed=seed,
            decay_rate=window.decay_rate,
            decay_threshold=window.decay_threshold,
        )
