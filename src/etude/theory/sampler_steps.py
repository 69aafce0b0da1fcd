"""The samplers of the theory: their steps in NumPy float64, or their limit in continuous time.

The coefficients are the sampler's own (`etude.sampling.kernels`), so the theory holds for every
kernel and for every plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from etude.errors import EtudeError
from etude.theory.arrays import Array, Numbers, array, nonnegative
from etude.theory.continuous_paths import Start, as_path, is_path
from etude.theory.levels import Levels, levels

if TYPE_CHECKING:
    from torch import Tensor

    from etude.sampling.kernels import Kernel

KernelChoice: TypeAlias = "str | Kernel"
"""A kernel's name, or a kernel whose other parameters than eta are used at every eta."""
EULER_MARUYAMA = "euler-maruyama"
FORGETFUL = 1e8
"""An infinite eta in continuous time: it forgets every start, and its square is finite."""


@dataclass(frozen=True)
class SamplerSteps:
    """Levels and coefficients of N steps: arrays [N, ...] with the axes of eta and the levels.

        x_u = x0 x0_hat + eps eps_hat + sqrt(variance) z

    A step out of pure noise (a = 0) is the ODE's, as in a plan with `first_step: ode`; the table of
    another plan keeps its own first step.
    """

    levels: Levels
    x0: Array
    eps: Array
    variance: Array

    @property
    def start(self) -> Start:
        """Start of the continuous-time sampler that begins at the first level."""
        return self.levels.start()

    def ode(self) -> SamplerSteps:
        """Return the probability-flow ODE's steps on the same levels: a_u, s_u and no noise."""
        a_u, s_u = np.broadcast_arrays(self.levels.a[1:], self.levels.s[1:])
        return SamplerSteps(self.levels, a_u, s_u, np.zeros_like(s_u))

    def at(self, index: tuple[int, ...]) -> SamplerSteps:
        """Return the steps at one entry of the axes of eta and the levels."""
        every: tuple[Any, ...] = (slice(None), *index)
        return SamplerSteps(self.levels, self.x0[every], self.eps[every], self.variance[every])


@dataclass(frozen=True)
class Limit:
    """A sampler in continuous time: its start, and its etas in gDDIM's unit."""

    start: Start
    eta: Array

    def ode(self) -> Limit:
        """Return the probability-flow ODE from the same start."""
        return Limit(self.start, np.zeros_like(self.eta))

    def at(self, index: tuple[int, ...]) -> Limit:
        """Return the sampler at one of its etas."""
        return Limit(self.start, self.eta[index])


def sampler_of(
    schedule: Any, eta: Numbers | None, steps: int | None, spacing: str, kernel: KernelChoice
) -> SamplerSteps | Limit:
    """Return the limit on a path without `steps`, and the N-step sampler otherwise."""
    if steps is not None or not is_path(schedule):
        return sampler_steps(schedule, eta, steps, spacing, kernel)
    path, eta = as_path(schedule), eta_of(kernel, eta)
    return Limit(path.start(), eta if kernel == "gddim" else continuous_eta(kernel, eta, levels(path, 8)))


def sampler_steps(
    schedule: Any,
    eta: Numbers | None = None,
    steps: int | None = None,
    spacing: str = "trailing",
    kernel: KernelChoice = "gddim",
    prior_variance: Numbers | None = None,
) -> SamplerSteps:
    """Compute the steps of a sampler; arguments and errors as in `finite_step_law`.

    A `StepTable` brings its own coefficients where eta is None. An array of etas broadcasts with
    the levels' trailing axes.
    """
    grid = levels(schedule, steps, spacing, prior_variance)
    if eta is None and kernel == "gddim" and hasattr(schedule, "x0") and hasattr(schedule, "std"):
        x0, eps, std = (array(getattr(schedule, name), f"the table's {name}") for name in ("x0", "eps", "std"))
        return SamplerSteps(grid, x0, eps, std**2)
    eta = eta_of(kernel, eta)
    values, index = np.unique(eta, return_inverse=True)  # the kernel is asked once for each different eta
    kernels = [kernel_at(kernel, float(value)) for value in values]
    limit = largest_eta(grid, kernels[-1])
    if kernels[-1].eta > limit * (1 + 1e-12):
        raise kernels[-1].beyond(limit, "this grid")
    above, source, target = _steps_above_noise(grid)
    a_u, s_u = np.broadcast_arrays(grid.a[1:], grid.s[1:])
    # [part, eta, N, axes of the levels], the ODE's where the kernel is not asked
    table = np.stack([np.stack([a_u, s_u, np.zeros_like(s_u)])] * values.size, axis=1)
    for at, each in enumerate(kernels if above.any() else []):
        step = each.coefficients(source, target)
        for part, value in enumerate((step.x0, step.eps, step.std.square())):
            table[part, at][above] = value.numpy()
    # Pair the axes of eta with those of the levels, as NumPy broadcasts.
    table = table.reshape(3, values.size, grid.steps, -1)
    entry = np.arange(table.shape[-1]).reshape(grid.a.shape[1:])
    pairs = np.broadcast_arrays(index.reshape(eta.shape), entry)
    return SamplerSteps(grid, *np.moveaxis(table[:, pairs[0], :, pairs[1]], (-2, -1), (0, 1)))


def _steps_above_noise(grid: Levels) -> tuple[Any, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return which steps [N, ...] start above a = 0, and their source and target levels."""
    import torch

    above = grid.a[:-1] > 0
    a_t, s_t, a_u, s_u = (torch.from_numpy(x[above]) for x in (grid.a[:-1], grid.s[:-1], grid.a[1:], grid.s[1:]))
    return above, (a_t, s_t), (a_u, s_u)


def kernel_at(kernel: KernelChoice, eta: float) -> Kernel:
    """Return the kernel at an eta; EtudeError if the kernel is unknown or has no such eta."""
    from etude.sampling.kernels import Kernel, make_kernel
    from etude.theory.euler_maruyama import EulerMaruyama

    if isinstance(kernel, Kernel):
        return replace(kernel, eta=eta)
    if not isinstance(kernel, str):
        raise EtudeError(f"the kernel is a {type(kernel).__name__}: pass a name, or a kernel such as GDDIM(1.2).")
    return EulerMaruyama(eta) if kernel == EULER_MARUYAMA else make_kernel(kernel, eta)


def eta_of(kernel: KernelChoice, eta: Numbers | None) -> Array:
    """Return eta as an array, or the kernel's own for None; EtudeError if neither has one."""
    if eta is None:
        eta = getattr(kernel, "eta", None)
    if eta is None:
        raise EtudeError(f"eta is missing: give one, or in place of {kernel!r} a kernel that has one, as GDDIM(1.2).")
    return nonnegative(eta, "eta")


def largest_eta(grid: Levels, kernel: KernelChoice) -> float:
    """Return the largest eta that the kernel has on every step; infinity if there is no limit."""
    _, source, target = _steps_above_noise(grid)
    return kernel_at(kernel, 0.0).largest_eta(source, target) if source[0].numel() else math.inf


def short_step_etas(kernel: KernelChoice, eta: Numbers, grid: Levels) -> Array:
    """Return the gDDIM eta of the kernel's short steps at each level with a, s > 0, [*eta, L]."""
    import torch

    at = (grid.a > 0) & (grid.s > 0)
    level = torch.from_numpy(grid.a[at]), torch.from_numpy(grid.s[at])
    eta = array(eta, "eta")
    each = [kernel_at(kernel, float(value)).small_step_eta(level).numpy() for value in eta.ravel()]
    return np.stack(each).reshape(*eta.shape, -1)


def continuous_eta(kernel: KernelChoice, eta: Numbers | None, grid: Levels) -> Array:
    """Return the gDDIM eta of the continuous-time sampler that short steps of the kernel approach.

    A step out of pure noise has the same law at every eta, so there the kernel's own eta is returned
    (0 for a table of coefficients). EtudeError: the kernel states no eta for short steps, or another
    one at each level (DanceSDE).
    """
    forgets = bool(np.all(grid.a[0] == 0))
    if forgets and eta is None and isinstance(kernel, str):
        return np.zeros(())
    eta = eta_of(kernel, eta)
    if forgets or kernel == "gddim":
        return eta
    by_level = np.minimum(short_step_etas(kernel, eta, grid), FORGETFUL)
    if not np.allclose(by_level, by_level[..., :1], rtol=1e-9, atol=0.0):
        raise EtudeError(
            f"the kernel {kernel!r} amounts to another eta at each level, so its limit of short steps has none: start "
            "from pure noise (delta = 0), where every limit has the same law, or use another kernel."
        )
    return by_level[..., 0]
