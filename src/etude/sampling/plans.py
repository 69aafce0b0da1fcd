"""Plans: a sampler as a list of Gaussian transitions.

    plan      = [(kernel_0, trained_0), ..., (kernel_{N-1}, trained_{N-1})]
    plan(grid) = a table of c_x0[i], c_eps[i], std[i]:   x_{i+1} = c_x0[i] x0_hat + c_eps[i] eps_hat + std[i] z

Training and deployment differ only in this list. The sampling loop indexes the table by the integer
step: no level is ever looked up from a timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from etude.errors import EtudeError
from etude.sampling.kernels import GDDIM, Coefficients, Kernel, Level, Transition, apply
from etude.sampling.paths import Grid, whole_steps

ODE = GDDIM(eta=0.0)
FIRST_STEPS = ("ode", "sde", "capped")


@dataclass(frozen=True)
class Step:
    """One step: its kernel, and whether it is trained (only a stochastic step can be)."""

    kernel: Kernel
    trained: bool = False


@dataclass(frozen=True)
class SamplingPlan:
    """The list of steps from noise to data, at least one.

    At a step from pure noise (a = 0: zero terminal SNR) any eta > 0 redraws all the noise at once,
    discontinuously in eta. `first_step` "ode" makes it an ODE step that is not trained; "sde" keeps
    its kernel; "capped" keeps it too, except where its noise is infinite (`Kernel.capped`).

    `tail_steps` of DPM-Solver++(2M) follow down to the last level, on levels of the plan's grid
    (MixGRPO-Flash, arXiv 2507.21802). The grid has `grid_steps` steps. Default: steps and tail.
    """

    steps: tuple[Step, ...]
    first_step: str = "ode"
    tail_steps: int = 0
    grid_steps: int | None = None

    def __post_init__(self) -> None:
        if not self.steps:
            raise EtudeError("a sampling plan of 0 steps makes no image: give at least 1 step.")
        if self.first_step not in FIRST_STEPS:
            raise EtudeError(f"first_step '{self.first_step}' is unknown: use {', '.join(FIRST_STEPS)}.")
        if self.tail_steps < 0:
            raise EtudeError(f"a tail of {self.tail_steps} steps cannot be taken: give 0 or more.")
        if self.tail_steps == 0 and self.grid_steps not in (None, len(self.steps)):
            raise EtudeError(
                f"a plan of {len(self.steps)} steps without a tail ends before the last of {self.grid_steps} levels: "
                "give it a tail, or all the steps."
            )
        if self.grid_size < self.num_steps:
            raise EtudeError(
                f"{len(self.steps)} steps and a tail of {self.tail_steps} do not fit a grid of {self.grid_size}: shorten the tail."
            )

    @classmethod
    def ode(cls, num_steps: int) -> SamplingPlan:
        """A plan for deployment: every step is the probability-flow ODE (DDIM at eta 0)."""
        return cls((Step(ODE),) * whole_steps(num_steps))

    @classmethod
    def sde(cls, num_steps: int, kernel: Kernel, trained: bool = True, first_step: str = "ode") -> SamplingPlan:
        """A plan with one kernel at every step: trained for DDPO, untrained for the reward gap."""
        return cls((Step(kernel, trained),) * whole_steps(num_steps), first_step)

    @classmethod
    def window(
        cls,
        num_steps: int,
        kernel: Kernel | Sequence[Kernel],
        start: int,
        size: int,
        first_step: str = "ode",
        compression: float | None = None,
    ) -> SamplingPlan:
        """The plan of MixGRPO (arXiv 2507.21802): `size` steps from step `start` on, and else the ODE.

        The window has one kernel, or one for each of its steps. A compression c in (0, 1] is
        MixGRPO-Flash's: max(1, round(c K)) steps of DPM-Solver++(2M) replace the K ODE steps after
        the window, if there are any.
        """
        count = whole_steps(num_steps)
        if not (size >= 1 and start >= 0 and start + size <= count):
            raise EtudeError(
                f"a window of {size} steps from step {start} does not fit in {count} steps: it needs a size of at "
                f"least 1, and to start and end within 0..{count - 1}."
            )
        kernels = [kernel] * size if isinstance(kernel, Kernel) else kernel
        if len(kernels) != size:
            raise EtudeError(f"{len(kernels)} kernels for a window of {size} steps: give one, or one for each step.")
        if compression is not None and not 0 < compression <= 1:
            raise EtudeError(
                f"compression = {compression}: the share of the steps after the window that are kept is above 0 and at most 1."
            )
        rest = count - start - size
        steps = (Step(ODE),) * start + tuple(Step(one, True) for one in kernels)
        if compression is None or rest == 0:
            return cls(steps + (Step(ODE),) * rest, first_step)
        return cls(steps, first_step, max(1, round(rest * compression)), count)

    @classmethod
    def from_etas(
        cls,
        etas: Iterable[float],
        kernel: Callable[[float], Kernel] = GDDIM,
        trained: bool = True,
        first_step: str = "ode",
    ) -> SamplingPlan:
        """A plan from one eta per step; with `trained`, the steps of an eta above 0 are trained."""
        etas = tuple(etas)
        kernels = {eta: kernel(eta) for eta in dict.fromkeys(etas)}
        return cls(tuple(Step(kernels[eta], trained and eta > 0) for eta in etas), first_step)

    @property
    def num_steps(self) -> int:
        """Number of network evaluations: the steps and the tail."""
        return len(self.steps) + self.tail_steps

    @property
    def grid_size(self) -> int:
        """N, the number of steps of the plan's grid."""
        return self.num_steps if self.grid_steps is None else self.grid_steps

    def tabulate(self, grid: Grid, dtype: torch.dtype = torch.float32) -> StepTable:
        """The plan's coefficients on the grid: computed in fp64 on the CPU, stored in `dtype`.

        The grid has `grid_size` steps, also where a tail skips some of its levels. The EtudeError
        for an illegal eta names the largest eta that is legal at all steps of its kernel's class.
        """
        if grid.num_steps != self.grid_size:
            raise EtudeError(
                f"a plan of {self.grid_size} steps does not fit a grid of {grid.num_steps}: give both the same number."
            )
        count = len(self.steps)
        tail = _tail(grid, count, self.tail_steps) if self.tail_steps else None
        grid = Grid(grid.timesteps[:count], grid.a[: count + 1], grid.s[: count + 1])
        from_noise = (grid.a[:-1] == 0).tolist()
        kernels = [
            self._out_of_noise(step.kernel) if start else step.kernel
            for step, start in zip(self.steps, from_noise, strict=True)
        ]
        x0, eps, std = (torch.empty(count, dtype=torch.float64) for _ in range(3))
        for kernel in set(kernels):
            at, source, target = _steps_of([other == kernel for other in kernels], grid)
            if kernel.eta > kernel.largest_eta(source, target) * (1 + 1e-12):
                _, source, target = _steps_of([type(other) is type(kernel) for other in kernels], grid)
                where = f"all {type(kernel).__name__} steps of these {self.grid_size}-step samples"
                raise kernel.beyond(kernel.largest_eta(source, target), where)
            coefficients = kernel.coefficients(source, target)
            x0[at], eps[at], std[at] = coefficients.x0, coefficients.eps, coefficients.std
        std = std.to(dtype)
        stochastic = tuple(bool(value > 0) for value in std)
        trained = tuple(
            step.trained and random and not (start and self.first_step == "ode")
            for step, random, start in zip(self.steps, stochastic, from_noise, strict=True)
        )
        levels = grid.timesteps, grid.a.to(dtype), grid.s.to(dtype)
        return StepTable(*levels, x0.to(dtype), eps.to(dtype), std, trained, stochastic, tail)

    def _out_of_noise(self, kernel: Kernel) -> Kernel:
        """The kernel of a step that starts at pure noise."""
        if self.first_step == "ode":
            return ODE
        return kernel.capped() if self.first_step == "capped" else kernel


@dataclass(frozen=True, eq=False)
class StepTable:
    """The tensors that a sampling loop indexes by the integer step, on one device.

    Step i goes from level a[i], s[i] to a[i + 1], s[i + 1] (`[N + 1]` each). It calls the network
    at timesteps[i] and moves with the coefficients x0[i], eps[i] and std[i] (`[N]` each) of x0_hat,
    eps_hat and the noise. It is stochastic if std > 0 as stored; only then can it be trained. The
    tail holds the levels of the DPM-Solver++(2M) steps that follow, from the end of step N - 1.
    """

    timesteps: Tensor
    a: Tensor
    s: Tensor
    x0: Tensor
    eps: Tensor
    std: Tensor
    trained: tuple[bool, ...]
    stochastic: tuple[bool, ...]
    tail: Grid | None = None

    @property
    def num_steps(self) -> int:
        """N, the number of steps before the tail."""
        return len(self.trained)

    @property
    def num_evaluations(self) -> int:
        """Number of network evaluations of an image that shares no step: the steps and the tail."""
        return self.num_steps + (self.tail.num_steps if self.tail else 0)

    @property
    def prefix_steps(self) -> int:
        """Number of steps before the first stochastic one; there equal initial noise gives equal states."""
        return next((i for i, random in enumerate(self.stochastic) if random), self.num_steps)

    @property
    def trained_steps(self) -> tuple[int, ...]:
        """The trained steps' indices, ascending."""
        return tuple(i for i, flag in enumerate(self.trained) if flag)

    def to(self, device: torch.device | str) -> StepTable:
        """The same table on another device; the tail's a and s stay on the CPU, where its solver reads them."""
        names = ("timesteps", "a", "s", "x0", "eps", "std")
        tail = self.tail and replace(self.tail, timesteps=self.tail.timesteps.to(device))
        return replace(self, **{name: getattr(self, name).to(device) for name in names}, tail=tail)

    def transition(self, step: int | Tensor, x0_hat: Tensor, eps_hat: Tensor) -> Transition:
        """The Gaussian of the state after `step`, from a pair `[n, ...]`, without synchronising the device.

        `step` is one for the whole batch, or int64 `[n]` with each sample's; both give the same
        bits. With a `[n]` on the CPU, `log_prob` knows which steps are stochastic without asking
        the device. Avoid a scalar tensor: indexing with it reads its value back from the device.
        """
        if isinstance(step, int) or step.device.type == "cpu":
            indices = {step} if isinstance(step, int) else set(step.reshape(-1).tolist())
            if not all(0 <= i < self.num_steps for i in indices):
                raise EtudeError(f"step {sorted(indices)} is not in this {self.num_steps}-step table: count from 0.")
            stochastic: bool | None = all(self.stochastic[i] for i in indices)
        else:
            stochastic = True if all(self.stochastic) else None
        return apply(Coefficients(self.x0[step], self.eps[step], self.std[step]), x0_hat, eps_hat, stochastic)


def _tail(grid: Grid, start: int, count: int) -> Grid:
    """The grid of `count` steps from level `start` to the last, on its own levels, evenly spaced by index."""
    length = grid.num_steps - start
    at = torch.tensor([start + (2 * i * length + count) // (2 * count) for i in range(count + 1)])
    return Grid(grid.timesteps[at[:-1]], grid.a[at], grid.s[at])


def _steps_of(chosen: list[bool], grid: Grid) -> tuple[Tensor, Level, Level]:
    """The chosen steps, with their source and target levels."""
    at = torch.tensor([i for i, one in enumerate(chosen) if one])
    return at, (grid.a[at], grid.s[at]), (grid.a[at + 1], grid.s[at + 1])
