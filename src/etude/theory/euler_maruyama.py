"""Euler-Maruyama in the noise level: a kernel for comparison in the theory, not of the sampler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etude.errors import EtudeError
from etude.sampling.kernels import Coefficients, Kernel, Level


@dataclass(frozen=True)
class EulerMaruyama(Kernel):
    """One Euler-Maruyama step of the eta-family in `y = x/a`; the step is in v = s/a.

        mean = a_u x0_hat + a_u (v_t - (1 + eta^2) (v_t - v_u)) eps_hat
        std  = a_u eta sqrt(v_t^2 - v_u^2)

    It freezes eps_hat over the step, where gDDIM freezes x0_hat. At eta = 0 it is the
    probability-flow ODE's step; above, the state keeps more noise than its level has.

    Args:
        eta: gDDIM's eta, finite and >= 0; EtudeError otherwise.
    """

    def coefficients(self, source: Level, target: Level) -> Coefficients:
        """Compute the class's formula; EtudeError from a = 0, where v is infinite."""
        levels = (torch.as_tensor(value, dtype=torch.float64) for value in (*source, *target))
        a_t, s_t, a_u, s_u = torch.broadcast_tensors(*levels)
        if bool((a_t == 0).any()):
            raise EtudeError("Euler-Maruyama cannot step from a = 0 (infinite noise): start the grid at an a above 0.")
        ratio, scale = s_u * a_t / (s_t * a_u), a_u * s_t / a_t  # v_u / v_t, and a_u v_t
        eps = scale * (1 - (1 + self.eta**2) * (1 - ratio))
        return Coefficients(a_u, eps, self.eta * scale * (1 - ratio**2).sqrt())

    def small_step_eta(self, level: Level) -> Tensor:
        """Return the kernel's own eta, at every level."""
        a, _ = torch.broadcast_tensors(*(torch.as_tensor(value, dtype=torch.float64) for value in level))
        return torch.full_like(a, self.eta)
