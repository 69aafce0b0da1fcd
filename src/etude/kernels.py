"""Kernels: one step of a sampler as a Gaussian, linear in what the network says.

From a source level (a_t, s_t) to a less noisy target level (a_u, s_u),

    x_u = c_x0 * x0_hat + c_eps * eps_hat + std * z,        z ~ N(0, I)

A kernel is the three coefficients. With lam = s / a the noise-to-signal ratio and r = lam_u / lam_t in [0, 1]:

    kernel   c_x0   c_eps                    std
    GDDIM    a_u    s_u r^(eta^2)            s_u sqrt(1 - r^(2 eta^2))     any eta >= 0
    DDIM     a_u    sqrt(s_u^2 - std^2)      eta s_u sqrt(1 - r^2)         eta <= 1 / sqrt(1 - r^2)

They are equal at eta 0 (the probability-flow ODE) and eta 1 (the DDPM posterior), and nowhere else.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from etude.errors import EtudeError
from etude.paths import per_sample

Level = tuple[Tensor | float, Tensor | float]
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True, eq=False)
class Coefficients:
    """x_u = x0 * x0_hat + eps * eps_hat + std * z; fp64, any broadcast shape."""

    x0: Tensor
    eps: Tensor
    std: Tensor


@dataclass(frozen=True, eq=False)
class Transition:
    """The Gaussian N(mean, std^2 I) of the next state.

    Attributes:
        mean: `[n, ...]`.
        std: broadcasts to `mean`.
        stochastic: whether every std is above 0, where the maker knows it; None means that `log_prob` looks, which
            synchronises an accelerator.
    """

    mean: Tensor
    std: Tensor
    stochastic: bool | None = None

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise."""
        return self.mean + self.std * noise.to(self.mean.dtype)

    def log_prob(self, x: Tensor, reduction: str = "mean") -> Tensor:
        """log N(x; mean, std^2) = -(x - mean)^2 / (2 std^2) - log std - log(2 pi) / 2, constants kept.

        Args:
            x: the next state, `[n, ...]`; taken to fp32.
            reduction: over all dimensions but the first; "sum" is the density, "mean" the same per dimension.

        Returns:
            `[n]`, differentiable through `mean`.

        Raises:
            EtudeError: if a std is 0 (a deterministic step has no density), or the reduction is unknown.
        """
        if reduction not in REDUCTIONS:
            raise EtudeError(f"log-probability reduction '{reduction}' is unknown: use mean or sum.")
        if not (bool((self.std > 0).all()) if self.stochastic is None else self.stochastic):
            raise EtudeError(
                "a step with std 0 (eta 0, or a target without noise) has no log-probability: take it at stochastic "
                "steps only."
            )
        scaled = (x.to(self.mean.dtype) - self.mean) / self.std
        log_density = -0.5 * scaled * scaled - self.std.log() - 0.5 * math.log(2 * math.pi)
        rows = log_density.reshape(log_density.shape[0], -1)
        return rows.mean(1) if reduction == "mean" else rows.sum(1)


class Kernel(ABC):
    """One step's Gaussian for a given eta; subclasses are frozen dataclasses with `eta` and `coefficients`."""

    eta: float

    @abstractmethod
    def coefficients(self, source: Level, target: Level) -> Coefficients:
        """The step's coefficients in fp64 from the levels (a_t, s_t) and (a_u, s_u), scalars or broadcastable."""

    def largest_eta(self, source: Level, target: Level) -> float:
        """The largest eta this kernel allows over all the given steps."""
        return math.inf

    def transition(self, x0_hat: Tensor, eps_hat: Tensor, source: Level, target: Level) -> Transition:
        """N(c_x0 x0_hat + c_eps eps_hat, std^2 I) in fp32 (fp64 for fp64 inputs); levels are scalars or `[n]`."""
        return apply(self.coefficients(source, target), x0_hat, eps_hat)


def apply(coefficients: Coefficients, x0_hat: Tensor, eps_hat: Tensor, stochastic: bool | None = None) -> Transition:
    """The transition that coefficients (scalars or `[n]`) make of a pair `[n, ...]`."""
    dtype = torch.promote_types(torch.promote_types(x0_hat.dtype, eps_hat.dtype), torch.float32)
    x0_hat, eps_hat = x0_hat.to(dtype), eps_hat.to(dtype)
    mean = per_sample(coefficients.x0, x0_hat) * x0_hat + per_sample(coefficients.eps, x0_hat) * eps_hat
    return Transition(mean, per_sample(coefficients.std, x0_hat), stochastic)


@dataclass(frozen=True)
class GDDIM(Kernel):
    """gDDIM (Zhang, Tao, Chen 2022, arXiv 2206.05564): any eta >= 0.

        rho  = (lam_u / lam_t)^(eta^2)                 the correlation kept with the current noise
        mean = a_u x0_hat + s_u rho eps_hat
        std  = s_u sqrt(1 - rho^2) = s_u sqrt(-expm1(2 eta^2 log(lam_u / lam_t)))

    It is the exact exponential integrator, with x0_hat frozen over the step, of

        dY = [-f Y + (1 + eta^2) / 2 g^2 score] dt + eta g dB,

    whose marginals are the model's for every eta. eta = 0 is DDIM, the probability-flow ODE; eta = 1 the DDPM
    posterior; eta -> infinity redraws all the noise. std <= s_u always, so no eta is illegal. From pure noise
    (a_t = 0) rho is 0 for every eta > 0.

    Args:
        eta: the noise level, finite and >= 0; anything else is an EtudeError.
    """

    eta: float

    def __post_init__(self) -> None:
        _check_eta(self.eta)

    def coefficients(self, source: Level, target: Level) -> Coefficients:
        """See the class; an EtudeError if the target is noisier than the source or has no signal."""
        a_u, s_u, log_ratio = _levels(source, target)
        if self.eta == 0:
            return Coefficients(a_u, s_u, torch.zeros_like(s_u))
        exponent = min(self.eta * self.eta, sys.float_info.max) * log_ratio
        exponent = torch.where(log_ratio.isinf(), log_ratio, exponent)  # the square of a tiny eta is 0, and 0 inf NaN
        return Coefficients(a_u, s_u * exponent.exp(), s_u * torch.expm1(2 * exponent).abs().sqrt())


@dataclass(frozen=True)
class DDIM(Kernel):
    """DDIM with eta (Song, Meng, Ermon 2020, arXiv 2010.02502): std = eta sqrt(posterior variance).

        std  = eta s_u sqrt(1 - (lam_u / lam_t)^2)      on VP: eta (s_u / s_t) sqrt(1 - a_t^2 / a_u^2)
        mean = a_u x0_hat + sqrt(s_u^2 - std^2) eps_hat

    Legal while std <= s_u, that is for eta <= 1 / sqrt(1 - (lam_u / lam_t)^2); steps that end without noise (s_u = 0)
    set no limit.

    Args:
        eta: the multiple of the posterior's std, finite and >= 0; anything else is an EtudeError.
    """

    eta: float

    def __post_init__(self) -> None:
        _check_eta(self.eta)

    def largest_eta(self, source: Level, target: Level) -> float:
        """min over the steps of 1 / sqrt(1 - (lam_u / lam_t)^2); infinity if all of them end without noise."""
        _, s_u, log_ratio = _levels(source, target)
        limit = torch.expm1(2 * log_ratio).abs().rsqrt()  # abs: the root of -0. is -inf
        return float(torch.where(s_u > 0, limit, math.inf).min())

    def coefficients(self, source: Level, target: Level) -> Coefficients:
        """See the class; an EtudeError that names the largest legal eta if this one is above it."""
        a_u, s_u, log_ratio = _levels(source, target)
        limit = self.largest_eta(source, target)
        if self.eta > limit * (1 + 1e-12):  # eta given as exactly the limit is legal despite rounding
            raise illegal_ddim_eta(self.eta, limit, "this step")
        std = self.eta * s_u * torch.expm1(2 * log_ratio).abs().sqrt()
        return Coefficients(a_u, (s_u * s_u - std * std).clamp(min=0).sqrt(), std)


def illegal_ddim_eta(eta: float, limit: float, where: str) -> EtudeError:
    """The error for a DDIM eta above its limit; the limit is rounded down, so that the printed value is legal."""
    return EtudeError(
        f"DDIM with eta {eta:g} takes the root of a negative number: the largest legal eta for {where} is "
        f"{math.floor(limit * 1e6) / 1e6:.6f}; lower eta or use the gddim kernel, which allows any."
    )


def _check_eta(eta: float) -> None:
    if not (isinstance(eta, int | float) and math.isfinite(eta) and eta >= 0):
        raise EtudeError(f"eta {eta} is not a noise level: give a finite number that is at least 0.")


def _levels(source: Level, target: Level) -> tuple[Tensor, Tensor, Tensor]:
    """(a_u, s_u, log(lam_u / lam_t)) in fp64, broadcast together; the log is -inf if s_u = 0 or a_t = 0."""
    a_t, s_t, a_u, s_u = torch.broadcast_tensors(
        *(torch.as_tensor(value, dtype=torch.float64) for value in (*source, *target))
    )
    log_ratio = ((s_u * a_t) / (a_u * s_t)).log()
    # NaN (no noise at the source and none at the target, no signal at either) fails the comparison too.
    if not bool((log_ratio <= 1e-12).all()):
        raise EtudeError(
            "a sampling step must go from a noisy level to a less noisy one (s_u / a_u <= s_t / a_t, with s_t > 0 and "
            "a_u > 0): order the levels from noise to data."
        )
    return a_u, s_u, log_ratio.clamp(max=0)
