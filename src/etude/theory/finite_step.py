"""The exact law of an N-step sampler of a Gaussian target, for every kernel and every plan.

A step is linear in the two predictions, `x_u = c0 x0_hat + c1 eps_hat + std z`. For a Gaussian
target N(m, C) the predictions are linear in x_t: `x0_hat = m + G (x_t - a m)` with
`G = a c / (a^2 c + s^2)`, and `eps_hat = s (x_t - a m) / (a^2 c + s^2)`. Each eigen-direction is
then a scalar recursion

    A = (c0 a c + c1 s) / (a^2 c + s^2),     E x_u = c0 m + A (E x_t - a m),     Var x_u = A^2 Var x_t + std^2,

exact at every step size and at a = 0. `sampler_steps` gives c0, c1 and std.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from etude.errors import EtudeError, unknown
from etude.theory.arrays import Array, Numbers
from etude.theory.sampler_steps import KernelChoice, SamplerSteps, sampler_steps
from etude.theory.score_error import ScoreError, as_score_error
from etude.theory.targets import Gaussian
from etude.theory.terminal_law import gaussian


def finite_step_law(
    target: Gaussian,
    schedule: Any,
    eta: Numbers | None = None,
    steps: int | None = None,
    spacing: str = "trailing",
    kernel: KernelChoice = "gddim",
    *,
    start: str = "prior",
    score_error: ScoreError | None = None,
    prior_variance: Numbers | None = None,
) -> Gaussian:
    """Compute the exact law of the sampler's last state, in x units.

    The result is a batch of laws where eta (or T) is an array.

    Args:
        target: one Gaussian.
        schedule: a path, a named schedule, a grid, or the `StepTable` of a plan (`sampler_steps`).
        eta: the stochasticity in the kernel's unit. Default: that of the kernel or of the table.
        steps: N, on a path.
        spacing: as in `levels`.
        kernel: a name of `etude.registry.KERNELS`, "euler-maruyama", an import path, or a `Kernel`.
        start: "prior", or "exact" for the law of x_T itself.
        score_error: error of the noise prediction. Default: none.
        prior_variance: as in `levels`.

    Raises:
        EtudeError: as `sampler_steps`; the target is not one Gaussian, the start is unknown, or a
            score error meets a grid that starts at a = 0.
    """
    target = gaussian(target, "finite_step_law")
    sampler = sampler_steps(schedule, eta, steps, spacing, kernel, prior_variance)
    return law_of_steps(target, sampler, start, score_error)


def transfer(
    target: Gaussian, sampler: SamplerSteps, score_error: ScoreError | None = None
) -> tuple[Array, Array, Array]:
    """Compute (A, shift, noise) of every step in the eigenbasis, each [N, ..., d].

    The deviation `e = x - a m` of a state from the path's mean goes by `e <- A e + shift` in the
    mean and `Var <- A^2 Var + noise` in the variance.
    """
    grid = sampler.levels
    x0, eps, noise = (x[..., None] for x in (sampler.x0, sampler.eps, sampler.variance))
    extra = (1,) * (x0.ndim - 1 - grid.a.ndim)
    a, s = (x[:-1].reshape((x.shape[0] - 1, *extra, *x.shape[1:], 1)) for x in (grid.a, grid.s))
    spread = a**2 * target.spectrum + s**2
    A = (x0 * a * target.spectrum + eps * s) / spread
    score_error = as_score_error(score_error)
    if not score_error:
        return A, np.zeros_like(A), np.broadcast_to(noise, A.shape)
    if np.any(a == 0):
        raise EtudeError(
            "a noise-prediction error is not defined at a = 0, where x0_hat = (x - s eps_hat)/a: start above it."
        )
    lever = eps - x0 * s / a
    bias = target.to_eigen(score_error.bias_in(target.d))
    return (
        A + lever * score_error.gain * s / spread,
        np.broadcast_to(lever * bias, A.shape),
        np.broadcast_to(noise + (lever * score_error.white) ** 2, A.shape),
    )


def law_of_steps(
    target: Gaussian, sampler: SamplerSteps, start: str = "prior", score_error: ScoreError | None = None
) -> Gaussian:
    """Compute the law after the sampler's steps, as `finite_step_law`."""
    if start not in ("prior", "exact"):
        raise unknown("start", str(start), ("prior", "exact"))
    grid = sampler.levels
    A, shift, noise = transfer(target, sampler, score_error)
    m = target.to_eigen(target.mu)
    a, s = grid.a[0][..., None], grid.s[0][..., None]
    if start == "prior":
        error, variance = -a * m, np.asarray(grid.prior_variance)[..., None]
    else:
        error, variance = np.zeros_like(m), a**2 * target.spectrum + s**2
    squared = A * A
    for i in range(grid.steps):
        error, variance = A[i] * error + shift[i], squared[i] * variance + noise[i]
    mean = grid.a[-1][..., None] * target.mu + target.from_eigen(error)
    return Gaussian.from_spectrum(mean, variance, target)
