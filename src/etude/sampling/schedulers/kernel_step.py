"""The part that the schedulers share: one step by a table of coefficients."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from etude.errors import EtudeError
from etude.sampling.kernels import Kernel, make_kernel
from etude.sampling.paths import to_x0_eps
from etude.sampling.plans import SamplingPlan, StepTable

Generators = torch.Generator | list[torch.Generator] | None


class KernelStep:
    """One step of a scheduler by its table, in fp32."""

    config: Any
    _table: StepTable | None
    _prediction_type: str

    @property
    def eta(self) -> float:
        """The config's noise level."""
        return float(self.config.eta)

    @property
    def kernel(self) -> Kernel:
        """The config's kernel at the config's eta."""
        return make_kernel(self.config.kernel, self.config.eta)

    def _plan(self, num_steps: int) -> SamplingPlan:
        return SamplingPlan.sde(num_steps, self.kernel, first_step=self.config.first_step)

    def _limit(self, x0_hat: Tensor) -> Tensor:
        """x0_hat as the step uses it; a subclass may clip it."""
        return x0_hat

    def _table_on(self, device: torch.device) -> StepTable:
        """The table on the latents' device, moved there once."""
        if self._table is None:
            raise EtudeError("the scheduler has no timesteps yet: call set_timesteps before step.")
        if self._table.a.device != device:
            self._table = self._table.to(device)
        return self._table

    def _move(
        self, index: int | Tensor, model_output: Tensor, sample: Tensor, generator: Generators, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(x_u, x0_hat) in fp32; if eta > 0, deterministic steps draw noise, too."""
        if generator is not None and noise is not None:
            raise EtudeError("both a generator and variance_noise were given: give one of the two.")
        table = self._table_on(sample.device)
        x0_hat, eps_hat = to_x0_eps(model_output, sample, table.a[index], table.s[index], self._prediction_type)
        x0_hat = self._limit(x0_hat)
        transition = table.transition(index, x0_hat, eps_hat)
        if self.eta == 0:
            return transition.mean, x0_hat
        if noise is None:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
        return transition.sample(noise), x0_hat
