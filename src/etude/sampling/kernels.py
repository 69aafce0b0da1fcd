"""Kernels: one step of a sampler as a Gaussian that is linear in the network's prediction.

From a source level (a_t, s_t) to a less noisy target level (a_u, s_u),

    x_u = c_x0 * x0_hat + c_eps * eps_hat + std * z,        z ~ N(0, I)

A kernel is the three coefficients, with c_x0 = a_u in all of them. With lam = s / a the
noise-to-signal ratio and r = lam_u / lam_t in [0, 1]; on rectified flow (a = 1 - sigma, s = sigma)
with h = sigma_t - sigma_u:

    kernel     c_eps                                     std                                    eta
    GDDIM      s_u r^(eta^2)                             s_u sqrt(1 - r^(2 eta^2))              any
    DDIM       sqrt(s_u^2 - std^2)                       eta s_u sqrt(1 - r^2)                  to 1 / sqrt(1 - r^2)
    CPS        s_u cos(eta pi / 2)                       s_u sin(eta pi / 2)                    to 1
    FlowSDE    sigma_u - eta^2 h / (2 (1 - sigma_t))     eta sqrt(h sigma_t / (1 - sigma_t))    any; flow only
    DanceSDE   sigma_u - eta^2 h / (2 sigma_t)           eta sqrt(h)                            any; flow only

At eta = 0 every kernel is the probability-flow ODE. GDDIM and DDIM also agree at eta = 1 (the DDPM
posterior), and nowhere else. The first three keep the target level's noise, c_eps^2 + std^2 = s_u^2.
The last two are Euler-Maruyama steps and leave more noise, by terms of the order h^2. Each kernel
has its own unit of eta: `equivalent_eta` and `Kernel.small_step_eta` convert it to GDDIM's.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from etude.errors import EtudeError
from etude.registry import KERNELS
from etude.sampling.paths import per_sample

Level = tuple[Tensor | float, Tensor | float]
REDUCTIONS = ("mean", "sum")
FLOW_TOLERANCE = 1e-6  # largest |a + s - 1|, for levels that were once in fp32


@dataclass(frozen=True, eq=False)
class Coefficients:
    """x_u = x0 * x0_hat + eps * eps_hat + std * z; fp64, any broadcast shape."""

    x0: Tensor
    eps: Tensor
    std: Tensor


@dataclass(frozen=True, eq=False)
class Transition:
    """The Gaussian N(mean, std^2 I) of the next state: mean `[n, ...]`, and a std that broadcasts to it.

    `stochastic` says whether every std is above 0. None: unknown; `log_prob` then looks at `std`,
    which synchronises an accelerator.
    """

    mean: Tensor
    std: Tensor
    stochastic: bool | None = None

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise."""
        return self.mean + self.std * noise.to(self.mean.dtype)

    def log_prob(self, x: Tensor, reduction: str = "mean") -> Tensor:
        """The log-density `[n]` of the next state `x` `[n, ...]`, differentiable through `mean`.

            log N(x; mean, std^2) = -(x - mean)^2 / (2 std^2) - log std - log(2 pi) / 2

        Reduction "sum" adds the dimensions of an image, "mean" averages them. It is an EtudeError
        if a std is 0: a deterministic step has no density.
        """
        if reduction not in REDUCTIONS:
            raise EtudeError(f"log-probability reduction '{reduction}' is unknown: use mean or sum.")
        if not (bool((self.std > 0).all()) if self.stochastic is None else self.stochastic):
            raise EtudeError(
                "a step with std 0 (eta 0, or a target without noise) has no log-probability: take it at stochastic steps only."
            )
        scaled = (x.to(self.mean.dtype) - self.mean) / self.std
        log_density = -0.5 * scaled * scaled - self.std.log() - 0.5 * math.log(2 * math.pi)
        rows = log_density.reshape(log_density.shape[0], -1)
        return rows.mean(1) if reduction == "mean" else rows.sum(1)


@dataclass(frozen=True)
class Kernel(ABC):
    """One step's Gaussian for an eta, finite and >= 0 (0 is the ODE); subclasses are frozen dataclasses."""

    eta: float

    def __post_init__(self) -> None:
        if not (isinstance(self.eta, int | float) and math.isfinite(self.eta) and self.eta >= 0):
            raise EtudeError(f"eta {self.eta} is not a noise level: give a finite number that is at least 0.")

    @abstractmethod
    def coefficients(self, source: Level, target: Level) -> Coefficients:
        """The step's coefficients in fp64, from level (a_t, s_t) to (a_u, s_u).

        Levels are scalars or tensors that broadcast. Raises EtudeError if the target is the
        noisier level or has no signal, or if the kernel is not defined on the levels at its eta.
        """

    def largest_eta(self, source: Level, target: Level) -> float:
        """The largest eta that this kernel allows at all the given steps."""
        return math.inf

    def beyond(self, limit: float, where: str) -> EtudeError:
        """The error for an eta above `limit`, which is rounded down, so that the printed value is legal."""
        return EtudeError(
            f"{type(self).__name__} with eta {self.eta:g} {self._beyond}: the largest legal eta for {where} is "
            f"{math.floor(limit * 1e6) / 1e6:.6f}; lower eta or use the gddim kernel, which allows any."
        )

    _beyond: ClassVar[str] = "is beyond what its steps allow"

    def capped(self) -> Kernel:
        """The kernel with finite noise on a step out of pure noise: itself, but for `FlowSDE`."""
        return self

    def small_step_eta(self, level: Level) -> Tensor:
        """The GDDIM eta of the kernel in short steps, if it states one: `equivalent_eta`'s limit, fp64, by level."""
        raise EtudeError(
            f"{type(self).__name__} states no eta for small steps: give it a small_step_eta method, or compare whole "
            "steps with equivalent_eta."
        )

    def transition(self, x0_hat: Tensor, eps_hat: Tensor, source: Level, target: Level) -> Transition:
        """The coefficients' `apply`; levels are scalars or `[n]`."""
        return apply(self.coefficients(source, target), x0_hat, eps_hat)


def apply(coefficients: Coefficients, x0_hat: Tensor, eps_hat: Tensor, stochastic: bool | None = None) -> Transition:
    """N(c_x0 x0_hat + c_eps eps_hat, std^2 I) of a pair `[n, ...]`, in fp32 (in fp64 for an fp64 pair)."""
    dtype = torch.promote_types(torch.promote_types(x0_hat.dtype, eps_hat.dtype), torch.float32)
    x0_hat, eps_hat = x0_hat.to(dtype), eps_hat.to(dtype)
    mean = per_sample(coefficients.x0, x0_hat) * x0_hat + per_sample(coefficients.eps, x0_hat) * eps_hat
    return Transition(mean, per_sample(coefficients.std, x0_hat), stochastic)


@dataclass(frozen=True)
class GDDIM(Kernel):
    """gDDIM (Zhang, Tao, Chen 2022, arXiv 2206.05564), for any finite eta >= 0.

        rho  = (lam_u / lam_t)^(eta^2)                 the correlation kept with the current noise
        mean = a_u x0_hat + s_u rho eps_hat
        std  = s_u sqrt(1 - rho^2) = s_u sqrt(-expm1(2 eta^2 log(lam_u / lam_t)))

    It is the exact exponential integrator, with x0_hat frozen over the step, of

        dY = [-f Y + (1 + eta^2) / 2 g^2 score] dt + eta g dB,

    whose marginals are the model's for every eta. eta = 0 is DDIM, the probability-flow ODE;
    eta = 1 the DDPM posterior; eta -> infinity redraws all the noise. std <= s_u always, so no eta
    is illegal. From pure noise (a_t = 0) rho is 0 for every eta > 0.

    Example:
        >>> import etude, torch
        >>> x0_hat, eps_hat, noise = torch.randn(3, 2, 4, 8, 8)
        >>> step = etude.GDDIM(eta=1.2).transition(x0_hat, eps_hat, source=(0.6, 0.8), target=(0.8, 0.6))
        >>> step.log_prob(step.sample(noise)).shape
        torch.Size([2])
    """

    def coefficients(self, source: Level, target: Level) -> Coefficients:
        a_u, s_u, log_ratio = _levels(source, target)
        if self.eta == 0:
            return Coefficients(a_u, s_u, torch.zeros_like(s_u))
        exponent = min(self.eta * self.eta, sys.float_info.max) * log_ratio
        exponent = torch.where(log_ratio.isinf(), log_ratio, exponent)  # a tiny eta squares to 0: 0 * inf is NaN
        return Coefficients(a_u, s_u * exponent.exp(), s_u * torch.expm1(2 * exponent).abs().sqrt())

    def small_step_eta(self, level: Level) -> Tensor:
        return torch.full_like(_broadcast(*level)[0], self.eta)


@dataclass(frozen=True)
class DDIM(Kernel):
    """DDIM with eta (Song, Meng, Ermon 2020, arXiv 2010.02502): std = eta sqrt(posterior variance).

        std  = eta s_u sqrt(1 - (lam_u / lam_t)^2)      on VP: eta (s_u / s_t) sqrt(1 - a_t^2 / a_u^2)
        mean = a_u x0_hat + sqrt(s_u^2 - std^2) eps_hat

    Legal while std <= s_u, that is for eta <= 1 / sqrt(1 - (lam_u / lam_t)^2); steps that end
    without noise (s_u = 0) set no limit. In short steps it is GDDIM.

    Example:
        >>> import etude
        >>> round(etude.DDIM(eta=1.0).largest_eta(source=(0.6, 0.8), target=(0.8, 0.6)), 3)
        1.209
    """

    _beyond = "takes the root of a negative number"

    def largest_eta(self, source: Level, target: Level) -> float:
        _, s_u, log_ratio = _levels(source, target)
        limit = torch.expm1(2 * log_ratio).abs().rsqrt()  # abs: the root of -0. is -inf
        return float(torch.where(s_u > 0, limit, math.inf).min())

    def coefficients(self, source: Level, target: Level) -> Coefficients:
        a_u, s_u, log_ratio = _levels(source, target)
        limit = self.largest_eta(source, target)
        if self.eta > limit * (1 + 1e-12):  # an eta of exactly the limit is legal despite rounding
            raise self.beyond(limit, "this step")
        std = self.eta * s_u * torch.expm1(2 * log_ratio).abs().sqrt()
        return Coefficients(a_u, (s_u * s_u - std * std).clamp(min=0).sqrt(), std)

    def small_step_eta(self, level: Level) -> Tensor:
        return torch.full_like(_broadcast(*level)[0], self.eta)


@dataclass(frozen=True)
class CPS(Kernel):
    """Coefficients-preserving sampling, CPS (arXiv 2509.05952).

        mean = a_u x0_hat + s_u cos(eta pi / 2) eps_hat
        std  = s_u sin(eta pi / 2)

    eta goes from 0, the ODE, to 1, which keeps nothing of the current noise; beyond 1 the sine
    falls again. Every step redraws the same share of the noise, however long it is. CPS discretises
    no SDE: in the limit of many steps any eta > 0 redraws all the noise at once. In that limit a
    Gaussian target keeps (1 + cos(eta pi / 2)) / 2 of its variance; with the other kernels it keeps
    all of it.

    Example:
        >>> import etude
        >>> round(float(etude.CPS(eta=0.5).coefficients(source=(0.6, 0.8), target=(0.8, 0.6)).std), 3)
        0.424
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta > 1:
            raise EtudeError(
                f"CPS with eta {self.eta:g} folds back, to less noise than at 1: give at most 1 (all the noise redrawn)."
            )

    def largest_eta(self, source: Level, target: Level) -> float:
        return 1.0

    def coefficients(self, source: Level, target: Level) -> Coefficients:
        a_u, s_u, _ = _levels(source, target)
        angle = self.eta * math.pi / 2
        share = math.cos(angle) if self.eta < 1 else 0.0
        return Coefficients(a_u, s_u * share, s_u * math.sin(angle))

    def small_step_eta(self, level: Level) -> Tensor:
        return torch.full_like(_broadcast(*level)[0], math.inf if self.eta > 0 else 0.0)


@dataclass(frozen=True)
class FlowSDE(Kernel):
    """The Euler-Maruyama step of Flow-GRPO and MixGRPO (arXiv 2505.05470, 2507.21802); flow only.

        dx   = (v + g^2 / (2 sigma) (x + (1 - sigma) v)) dt + g dB,      g = eta sqrt(sigma / (1 - sigma))
        mean = (1 - sigma_u) x0_hat + (sigma_u - eta^2 h / (2 (1 - sigma_t))) eps_hat,      h = sigma_t - sigma_u
        std  = eta sqrt(h sigma_t / (1 - sigma_t))

    (v = eps_hat - x0_hat and x + (1 - sigma) v = eps_hat.) Its eta, the authors' noise level, is
    sqrt(2) times GDDIM's. A step that ends without noise (sigma_u = 0) is the Euler step, because
    the formula would leave noise in the image. A step from sigma = 1 has infinite noise, an
    EtudeError, unless `cap` is set. The cap is that of the authors' public code (flow_grpo,
    `sde_step_with_logprob`): at sigma = 1, and only there, the next level, sigma_1 = sigma_u,
    replaces sigma in the denominator alone:

        g    = eta sqrt(1 / (1 - sigma_u)),    so with h = 1 - sigma_u and eps_hat = x
        mean = (1 - sigma_u) x0_hat + (sigma_u - eta^2 / 2) eps_hat
        std  = eta

    Example:
        >>> import etude
        >>> round(float(etude.FlowSDE(eta=0.7).coefficients(source=(0.4, 0.6), target=(0.5, 0.5)).std), 3)
        0.271
    """

    cap: bool = False

    def capped(self) -> FlowSDE:
        return replace(self, cap=True)

    def coefficients(self, source: Level, target: Level) -> Coefficients:
        sigma, sigma_u = _flow_levels(source, target, "FlowSDE")
        if self.eta > 0 and not self.cap and bool(((sigma == 1) & (sigma_u > 0)).any()):
            raise EtudeError(
                "FlowSDE has infinite noise at sigma = 1: set first_step to capped, as its authors do, or to ode, "
                "or use gddim, which redraws there."
            )
        # From sigma = 1 to sigma_u = 0 the step is the Euler step, whatever g is.
        a = 1 - torch.where(sigma < 1, sigma, sigma_u)
        return _euler_maruyama(self.eta * self.eta * sigma / a, sigma, sigma_u)

    def small_step_eta(self, level: Level) -> Tensor:
        return torch.full_like(_broadcast(*level)[0], self.eta / math.sqrt(2))


@dataclass(frozen=True)
class DanceSDE(Kernel):
    """The Euler-Maruyama step of DanceGRPO (arXiv 2505.07818); rectified flow only.

        dx   = (v - eta^2 / 2 score) dt + eta dB,      score = -eps_hat / sigma
        mean = (1 - sigma_u) x0_hat + (sigma_u - eta^2 h / (2 sigma_t)) eps_hat,      h = sigma_t - sigma_u
        std  = eta sqrt(h)

    eta is the noise of a unit of time; in short steps it is a GDDIM eta of
    eta sqrt((1 - sigma) / (2 sigma)), little early and much late. A step that ends without noise
    (sigma_u = 0) is the Euler step, because the formula would leave noise in the image.

    Example:
        >>> import etude
        >>> round(float(etude.DanceSDE(eta=0.3).coefficients(source=(0.4, 0.6), target=(0.5, 0.5)).std), 3)
        0.095
    """

    def coefficients(self, source: Level, target: Level) -> Coefficients:
        sigma, sigma_u = _flow_levels(source, target, "DanceSDE")
        return _euler_maruyama(torch.full_like(sigma, self.eta * self.eta), sigma, sigma_u)

    def small_step_eta(self, level: Level) -> Tensor:
        a, s = _broadcast(*level)
        return self.eta * (a / (2 * s)).sqrt()


def equivalent_eta(kernel: Kernel, source: Level, target: Level) -> Tensor:
    """The GDDIM eta whose std at a step is the kernel's: fp64, in the broadcast shape of the levels.

        eta = sqrt(log(1 - std^2 / s_u^2) / (2 log(lam_u / lam_t)))

    Infinite where the kernel's std is s_u or more: GDDIM reaches s_u by redrawing all the noise,
    and never exceeds it. 0 where the step is deterministic. From pure noise (a_t = 0) GDDIM's std
    is 0 or s_u; a std between the two counts as 0. Errors are those of the kernel's `coefficients`.
    """
    _, s_u, log_ratio = _levels(source, target)
    std = kernel.coefficients(source, target).std
    still = std == 0
    share = torch.where(still, 0.0, std / s_u)
    eta = (torch.log1p(-(share * share).clamp(max=1)) / (2 * log_ratio)).sqrt()
    return torch.where(still, 0.0, torch.where(share >= 1, math.inf, eta))


def _broadcast(*values: Tensor | float) -> list[Tensor]:
    """The values in fp64, broadcast together."""
    return list(torch.broadcast_tensors(*(torch.as_tensor(value, dtype=torch.float64) for value in values)))


def _levels(source: Level, target: Level) -> tuple[Tensor, Tensor, Tensor]:
    """(a_u, s_u, log(lam_u / lam_t)) in fp64; the logarithm is -inf if s_u = 0 or a_t = 0."""
    a_t, s_t, a_u, s_u = _broadcast(*source, *target)
    log_ratio = ((s_u * a_t) / (a_u * s_t)).log()
    # NaN (no noise at source and target, or no signal at both) fails the comparison, too.
    if not bool((log_ratio <= 1e-12).all()):
        raise EtudeError(
            "a sampling step must go from a noisy level to a less noisy one (s_u / a_u <= s_t / a_t, with s_t > 0 and "
            "a_u > 0): order the levels from noise to data."
        )
    return a_u, s_u, log_ratio.clamp(max=0)


def _flow_levels(source: Level, target: Level, kernel: str) -> tuple[Tensor, Tensor]:
    """(sigma_t, sigma_u) in fp64, broadcast together."""
    _levels(source, target)  # refuses a noisier target
    a_t, s_t, a_u, s_u = _broadcast(*source, *target)
    if any(bool(((a + s - 1).abs() > FLOW_TOLERANCE).any()) for a, s in ((a_t, s_t), (a_u, s_u))):
        raise EtudeError(
            f"{kernel} is defined on rectified flow (a + s = 1) only: use gddim, ddim or cps with this model."
        )
    return s_t, s_u


def _euler_maruyama(g2: Tensor, sigma: Tensor, sigma_u: Tensor) -> Coefficients:
    """One step of dx = (v + g^2 eps_hat / (2 sigma)) dt + g dB; where sigma_u = 0, the Euler step."""
    g2 = torch.where(sigma_u > 0, g2, 0.0)
    h = (sigma - sigma_u).clamp(min=0)
    if not bool((g2 * h).isfinite().all()):
        raise EtudeError("the noise of this eta is beyond float64: lower eta.")
    return Coefficients(1 - sigma_u, sigma_u - g2 * h / (2 * sigma), (g2 * h).sqrt())


def make_kernel(kernel: str, eta: float) -> Kernel:
    """The kernel of a name in `etude.registry.KERNELS`, or of `module:Class`, at an eta that it allows."""
    kind = KERNELS.get(kernel)
    if not (isinstance(kind, type) and issubclass(kind, Kernel)):
        raise EtudeError(f"kernel '{kernel}' is {kind!r}: give {KERNELS.wanted}.")
    return kind(eta)
