"""Plans: a sampler is a list of Gaussian transitions, and training and deployment differ only in that list.

    plan      = [(kernel_0, trained_0), ..., (kernel_{N-1}, trained_{N-1})]
    plan(grid) = a table of c_x0[i], c_eps[i], std[i]:   x_{i+1} = c_x0[i] x0_hat + c_eps[i] eps_hat + std[i] z

`SamplingPlan` says what is done, `tabulate` works it out once on a grid's levels, and the sampling loop only
indexes the resulting `StepTable` by the integer step: no level is ever recovered from a timestep.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from etude.errors import EtudeError
from etude.kernels import DDIM, GDDIM, Coefficients, Kernel, Transition, apply, illegal_ddim_eta
from etude.paths import Grid

ODE = GDDIM(eta=0.0)


@dataclass(frozen=True)
class Step:
    """One step: its kernel, and whether the policy gradient is taken there (if the step turns out stochastic)."""

    kernel: Kernel
    trained: bool = False


@dataclass(frozen=True)
class SamplingPlan:
    """The list of steps from noise to data.

    Attributes:
        steps: one entry a step.
        first_step: what becomes of a step that starts at pure noise (a = 0: zero terminal SNR). There any eta > 0
            redraws all the noise at once, discontinuously in eta, so "ode" makes it an ODE step that is not trained;
            "sde" keeps the kernel as it is.
    """

    steps: tuple[Step, ...]
    first_step: str = "ode"

    def __post_init__(self) -> None:
        if not self.steps:
            raise EtudeError("a sampling plan of 0 steps makes no image: give at least 1 step.")
        if self.first_step not in ("ode", "sde"):
            raise EtudeError(f"first_step '{self.first_step}' is unknown: use ode or sde.")

    @classmethod
    def ode(cls, num_steps: int) -> SamplingPlan:
        """Every step the probability-flow ODE (DDIM at eta 0): deployment."""
        return cls((Step(ODE),) * _count(num_steps))

    @classmethod
    def sde(cls, num_steps: int, kernel: Kernel, trained: bool = True, first_step: str = "ode") -> SamplingPlan:
        """Every step the same kernel: DDPO if trained, the SDE side of the reward gap if not."""
        return cls((Step(kernel, trained),) * _count(num_steps), first_step)

    @classmethod
    def window(cls, num_steps: int, kernel: Kernel, start: int, size: int, first_step: str = "ode") -> SamplingPlan:
        """The kernel, trained, at steps start..start + size - 1 and the ODE elsewhere (MixGRPO, arXiv 2507.21802).

        Raises:
            EtudeError: if the window is empty or leaves the N steps.
        """
        count = _count(num_steps)
        if not (size >= 1 and start >= 0 and start + size <= count):
            raise EtudeError(
                f"a window of {size} steps from step {start} does not fit in {count} steps: it needs a size of at "
                f"least 1, and to start and end within 0..{count - 1}."
            )
        inside = range(start, start + size)
        return cls(tuple(Step(kernel, True) if i in inside else Step(ODE) for i in range(count)), first_step)

    @classmethod
    def from_etas(
        cls,
        etas: Iterable[float],
        kernel: type[GDDIM] | type[DDIM] = GDDIM,
        trained: bool = True,
        first_step: str = "ode",
    ) -> SamplingPlan:
        """An eta schedule: step i has eta_i, and is trained if that is above 0."""
        return cls(tuple(Step(kernel(eta=eta), trained and eta > 0) for eta in etas), first_step)

    @property
    def num_steps(self) -> int:
        """N, the number of steps."""
        return len(self.steps)

    def tabulate(self, grid: Grid, dtype: torch.dtype = torch.float32) -> StepTable:
        """The plan's coefficients on the grid: computed in fp64 on the CPU, stored in `dtype`.

        Raises:
            EtudeError: if plan and grid differ in length, or a kernel's eta is illegal on one of its steps; the error
                names the largest eta that is legal on all of them.
        """
        if grid.num_steps != self.num_steps:
            raise EtudeError(
                f"a plan of {self.num_steps} steps does not fit a grid of {grid.num_steps}: give both the same number."
            )
        from_noise = (grid.a[:-1] == 0).tolist()
        kernels = [
            ODE if start and self.first_step == "ode" else step.kernel
            for step, start in zip(self.steps, from_noise, strict=True)
        ]
        self._check_etas(kernels, grid)
        x0, eps, std = (torch.empty(self.num_steps, dtype=torch.float64) for _ in range(3))
        for kernel in set(kernels):
            at, source, target = _steps_of({kernel}, kernels, grid)
            coefficients = kernel.coefficients(source, target)
            x0[at], eps[at], std[at] = coefficients.x0, coefficients.eps, coefficients.std
        std = std.to(dtype)
        stochastic = tuple(bool(value > 0) for value in std)
        trained = tuple(
            step.trained and random and not (start and self.first_step == "ode")
            for step, random, start in zip(self.steps, stochastic, from_noise, strict=True)
        )
        return StepTable(
            grid.timesteps, grid.a.to(dtype), grid.s.to(dtype), x0.to(dtype), eps.to(dtype), std, trained, stochastic
        )

    def _check_etas(self, kernels: list[Kernel], grid: Grid) -> None:
        limited = {kernel for kernel in kernels if isinstance(kernel, DDIM)}
        if not limited:
            return
        worst = max(limited, key=lambda kernel: kernel.eta)
        _, source, target = _steps_of(limited, kernels, grid)
        limit = worst.largest_eta(source, target)
        for kernel in limited:
            _, own_source, own_target = _steps_of({kernel}, kernels, grid)
            if kernel.eta > kernel.largest_eta(own_source, own_target) * (1 + 1e-12):
                raise illegal_ddim_eta(kernel.eta, limit, f"all DDIM steps of these {self.num_steps}-step samples")


@dataclass(frozen=True, eq=False)
class StepTable:
    """Everything that a sampling loop indexes by the integer step, on one device.

    Attributes:
        timesteps: `[N]`, what the network is given.
        a: `[N + 1]`, the levels' signal coefficients; step i goes from a[i], s[i] to a[i + 1], s[i + 1].
        s: `[N + 1]`, the levels' noise coefficients.
        x0: `[N]`, the step's coefficient of x0_hat.
        eps: `[N]`, of eps_hat.
        std: `[N]`, of the noise.
        trained: per step, whether it is trained (only stochastic steps are).
        stochastic: per step, whether std > 0 as stored.
    """

    timesteps: Tensor
    a: Tensor
    s: Tensor
    x0: Tensor
    eps: Tensor
    std: Tensor
    trained: tuple[bool, ...]
    stochastic: tuple[bool, ...]

    @property
    def num_steps(self) -> int:
        """N, the number of steps."""
        return len(self.trained)

    @property
    def trained_steps(self) -> tuple[int, ...]:
        """The trained steps' indices, ascending."""
        return tuple(i for i, flag in enumerate(self.trained) if flag)

    def to(self, device: torch.device | str) -> StepTable:
        """The same table on another device."""
        names = ("timesteps", "a", "s", "x0", "eps", "std")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def transition(self, step: int | Tensor, x0_hat: Tensor, eps_hat: Tensor) -> Transition:
        """The Gaussian of the state after `step`, without synchronising the device.

        Args:
            step: one step for the whole batch, or int64 `[n]`, each sample's own (as in a replay batch). Both give
                the same bits. A `[n]` on the CPU lets `log_prob` know what is stochastic without asking the device.
                Not a scalar tensor: indexing with one reads its value back from the device.
            x0_hat: `[n, ...]`.
            eps_hat: `[n, ...]`.

        Raises:
            EtudeError: if an integer (or CPU tensor) step is not in 0..N-1.
        """
        if isinstance(step, int) or step.device.type == "cpu":
            asked = {step} if isinstance(step, int) else set(step.reshape(-1).tolist())
            if not all(0 <= i < self.num_steps for i in asked):
                raise EtudeError(f"step {sorted(asked)} is not in this {self.num_steps}-step table: count from 0.")
            stochastic: bool | None = all(self.stochastic[i] for i in asked)
        else:
            stochastic = True if all(self.stochastic) else None
        return apply(Coefficients(self.x0[step], self.eps[step], self.std[step]), x0_hat, eps_hat, stochastic)


def _count(num_steps: int) -> int:
    if isinstance(num_steps, bool) or int(num_steps) != num_steps or num_steps < 1:
        raise EtudeError(f"{num_steps} sampling steps cannot be taken: give a whole number of at least 1.")
    return int(num_steps)


def _steps_of(
    chosen: set[Kernel] | set[DDIM], kernels: list[Kernel], grid: Grid
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The steps that use the chosen kernels, and their source and target levels."""
    at = torch.tensor([i for i, kernel in enumerate(kernels) if kernel in chosen])
    return at, (grid.a[at], grid.s[at]), (grid.a[at + 1], grid.s[at + 1])
