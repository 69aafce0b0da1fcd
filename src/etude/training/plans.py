"""Which plan each iteration trains under: every step stochastic (DDPO, Flow-GRPO), or a window that moves (MixGRPO, MixGRPO-Flash)."""

from __future__ import annotations

import torch

from etude.config import SamplingConfig
from etude.errors import EtudeError
from etude.paths import Grid
from etude.plans import SamplingPlan, StepTable
from etude.sampling import make_kernel
from etude.windows import WindowSchedule, trainable_range


class TrainingPlans:
    """The training sampler of each iteration: a function of the iteration alone, so that processes agree and a resumed run too.

    Args:
        sampling: kernel, eta, steps, first step and window.
        grid: the levels of its `num_steps` steps.
        seed: of the random window.
        device: where the tables are needed.

    Raises:
        EtudeError: eta is illegal for the kernel at some level, no step is stochastic, or the window does not fit those that are.
    """

    def __init__(self, sampling: SamplingConfig, grid: Grid, seed: int, device: torch.device | str = "cpu") -> None:
        self.sampling, self.grid, self.device = sampling, grid, device
        self.kernel = make_kernel(sampling.kernel, sampling.eta)
        everywhere = SamplingPlan.sde(sampling.num_steps, self.kernel, first_step=sampling.first_step).tabulate(grid)
        if not everywhere.trained_steps:
            raise EtudeError(
                f"sampling.num_steps = {sampling.num_steps} leaves no stochastic step to train: use more steps."
            )
        self.schedule = self._schedule(everywhere, seed)
        self._start: int | None = None
        self._table = everywhere.to(device)

    def window_at(self, iteration: int) -> dict[str, int] | None:
        """First step and size of the window in an iteration (they count from 1); None where every step is stochastic."""
        if self.schedule is None:
            return None
        return {"start": self.schedule.start_at(iteration), "size": self.schedule.size}

    def table_at(self, iteration: int) -> StepTable:
        """The coefficients of the iteration's plan on the device."""
        sampling, window = self.sampling, self.window_at(iteration)
        if window is not None and sampling.window is not None and window["start"] != self._start:
            plan = SamplingPlan.window(
                sampling.num_steps,
                self.kernel,
                **window,
                first_step=sampling.first_step,
                compression=sampling.window.compression,
            )
            self._start, self._table = window["start"], plan.tabulate(self.grid).to(self.device)
        return self._table

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
