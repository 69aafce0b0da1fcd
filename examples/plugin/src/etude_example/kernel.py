"""A kernel that redraws the same share of the noise at every step, however long the step is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from etude.errors import EtudeError
from etude.sampling.kernels import Coefficients, Kernel, Level


@dataclass(frozen=True)
class KeptNoise(Kernel):
    """`x_u = a_u x0_hat + s_u sqrt(1 - eta^2) eps_hat + s_u eta z`.

    The target level keeps its noise, `c_eps^2 + std^2 = s_u^2`, so the kernel fits any model and
    any schedule. eta = 0 is the ODE.

    Args:
        eta: std of the new noise, as a share of the noise of the target level; from 0 to 1.

    Raises:
        EtudeError: eta is not in [0, 1].
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta > 1:
            raise EtudeError(
                f"kept_noise with eta {self.eta:g} would add more noise than the level has: give at most 1."
            )

    def coefficients(self, source: Level, target: Level) -> Coefficients:
        a_u, s_u = torch.broadcast_tensors(*(torch.as_tensor(value, dtype=torch.float64) for value in target))
        return Coefficients(a_u, s_u * (1 - self.eta**2) ** 0.5, s_u * self.eta)
