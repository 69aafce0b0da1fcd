"""Kernels of published work that keep the noise of the target level, as gDDIM does.

    kernel         rho, the correlation kept with the current noise         gDDIM's eta
    Precise        (lam_u / lam_t)^(n^2 / 2)                                n / sqrt(2)
    DancePrecise   exp(-n^2 / 2 (1 / sigma_u - 1 / sigma_t))                that of n in short steps: n sqrt((1 - sigma) / (2 sigma))
    Churn          1 / (1 + gamma)                                          sqrt(ln(1 + gamma) / ln(lam_t / lam_u))

In all of them `c_x0 = a_u`, `c_eps = s_u rho` and `std = s_u sqrt(1 - rho^2)`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from etude.sampling.kernels import GDDIM, Coefficients, DanceSDE, Kernel, Level, _broadcast, _flow_levels, _levels


@dataclass(frozen=True)
class Precise(Kernel):
    """Precise's kernel (arXiv 2605.23522): gDDIM at `eta / sqrt(2)`. The authors' default is 1.5."""

    def coefficients(self, source: Level, target: Level) -> Coefficients:
        return GDDIM(self.eta / math.sqrt(2)).coefficients(source, target)

    def small_step_eta(self, level: Level) -> Tensor:
        return torch.full_like(_broadcast(*level)[0], self.eta / math.sqrt(2))


@dataclass(frozen=True)
class DancePrecise(Kernel):
    """The exact form of DanceGRPO's SDE (arXiv 2605.23522); rectified flow only.

        rho = exp(-eta^2 / 2 (1 / sigma_u - 1 / sigma_t)),        std = sigma_u sqrt(1 - rho^2)

    `DanceSDE` takes the Euler-Maruyama step of the same SDE, and leaves more noise than the level
    has.
    """

    def coefficients(self, source: Level, target: Level) -> Coefficients:
        sigma, sigma_u = _flow_levels(source, target, "DancePrecise")
        time = torch.where(sigma_u > 0, 1 / sigma_u - 1 / sigma, 0.0)
        return _kept(1 - sigma_u, sigma_u, -min(self.eta * self.eta, sys.float_info.max) / 2 * time)

    def small_step_eta(self, level: Level) -> Tensor:
        return DanceSDE(self.eta).small_step_eta(level)


@dataclass(frozen=True)
class Churn(Kernel):
    """The churn of EDM (arXiv 2206.00364) as FDFO trains with it (arXiv 2603.12893).

    A step first raises the noise by the factor 1 + gamma and then follows the ODE. With x0_hat
    frozen over the step it keeps `rho = 1 / (1 + gamma)` of the noise, however long it is. eta is
    gamma; the authors' default is 0.0025.
    """

    def coefficients(self, source: Level, target: Level) -> Coefficients:
        a_u, s_u, _ = _levels(source, target)
        return _kept(a_u, s_u, torch.full_like(s_u, -math.log1p(self.eta)))

    def small_step_eta(self, level: Level) -> Tensor:
        return torch.full_like(_broadcast(*level)[0], math.inf if self.eta > 0 else 0.0)


def _kept(a_u: Tensor, s_u: Tensor, log_rho: Tensor) -> Coefficients:
    """The coefficients that keep `rho` of the noise and redraw the rest."""
    return Coefficients(a_u, s_u * log_rho.exp(), s_u * torch.expm1(2 * log_rho).abs().sqrt())
