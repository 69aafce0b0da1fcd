"""gDDIM and the peers' kernels as a diffusers scheduler for rectified-flow models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from etude.errors import EtudeError, brief
from etude.sampling.paths import FlowPath, check_mu, flow_grid
from etude.sampling.plans import StepTable
from etude.sampling.schedulers.kernel_step import Generators, KernelStep
from etude.sampling.solver_path import SolverPath


class FlowMatchGDDIMScheduler(KernelStep, FlowMatchEulerDiscreteScheduler):
    """gDDIM, or another kernel, at any eta >= 0 for Stable Diffusion 3, FLUX and other flows (arXiv 2206.05564).

        x_u = (1 - sigma_u) x0_hat + sigma_u rho eps_hat + sigma_u sqrt(1 - rho^2) z
        rho = (lam_u / lam_t)^(eta^2),      lam = sigma / (1 - sigma)

    Drop-in for `FlowMatchEulerDiscreteScheduler`, and equal to it at eta 0. It is a subclass, so
    the levels under every shift, the place among them (`set_begin_index`, `index_for_timestep`) and
    `scale_noise` are diffusers' own: text to image, image to image and inpainting all work.
    Arguments that are not listed below are its own, too.

    **The pipelines of these models give `step` no generator.** Set `scheduler.generator` to one, or
    to a list with one per sample. Without it, noise comes from torch's global generator.

    Args:
        eta: the kernel's noise level, finite and >= 0, in the kernel's own unit.
        kernel: "gddim", "ddim", "flow_sde", "dance_sde" or "cps"; see `etude.sampling.kernels`.
        first_step: the step from pure noise (sigma = 1, where the pipelines start). "ode" takes the
            Euler step; "sde" the kernel's: gDDIM redraws all the noise, and flow_sde is not defined
            there; "capped" the same, but flow_sde takes the next level's noise (`FlowSDE`).
        invert_sigmas: must be false.
        stochastic_sampling: ignored; it would redraw all the noise at every step.
        solver: configuration of a multistep solver on flow levels (SANA, Wan), whose levels are
            visited; `from_config` takes it from such a pipeline's scheduler.

    Example:
        >>> import etude
        >>> pipe = etude.load_policy("emoji-flux").pipeline  # any FLUX or Stable Diffusion 3 pipeline of diffusers
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe.scheduler = etude.FlowMatchGDDIMScheduler.from_config(pipe.scheduler.config, eta=1.2)
        >>> pipe("red heart", height=64, width=64, num_inference_steps=2).images[0].size
        (64, 64)
    """

    timesteps: Tensor
    sigmas: Tensor
    _prediction_type = "flow"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        eta: float = 0.0,
        kernel: str = "gddim",
        first_step: str = "ode",
        solver: dict[str, Any] | None = None,
    ) -> None:
        self._plan(1)  # refuses a bad eta, kernel or first_step now, not at set_timesteps
        super().__init__(**self.path.config)
        self.generator: Generators = None
        self.num_inference_steps: int | None = None
        self._table: StepTable | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler for a flow scheduler's config; keyword arguments (eta=1.2) overrule it."""
        if isinstance(config, Mapping) and config.get("use_flow_sigmas"):
            named = {name: kwargs.pop(name) for name in ("flow_shift", "use_dynamic_shifting") if name in kwargs}
            kwargs["solver"] = {**SolverPath.from_config(config).config, **named}
            config = {}
        elif isinstance(config, Mapping):
            FlowPath.from_config({**config, **kwargs})
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @property
    def path(self) -> FlowPath:
        """The path of the current config."""
        return FlowPath.from_config(dict(self.config))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Computes the levels, as diffusers does, and every step's coefficients, on `device`.

        N is given, or is the number of sigmas (levels before the shift, evenly spaced by default)
        or timesteps (1000 sigma by default). mu is the shift for the resolution, required with
        `use_dynamic_shifting` and otherwise ignored. Raises EtudeError if mu or N is missing, two
        numbers of steps differ, a level is outside (0, 1], or eta is illegal at one of the steps.
        """
        check_mu(self.config, mu)
        if num_inference_steps is None and sigmas is None and timesteps is None:
            raise EtudeError(
                "set_timesteps was given no number of steps: pass num_inference_steps, sigmas or timesteps."
            )
        try:
            with np.errstate(all="ignore"):  # flow_grid refuses overflows and divisions by 0
                super().set_timesteps(num_inference_steps, "cpu", sigmas=sigmas, mu=mu, timesteps=timesteps)
        except (ValueError, IndexError) as error:
            raise EtudeError(f"diffusers refuses these timesteps ({brief(error)}): mend them.") from error
        grid = flow_grid(self.timesteps, self.sigmas)
        if self.config.solver is not None:
            grid = SolverPath.from_config(self.config.solver).grid(grid.num_steps, mu=mu)
            self.timesteps, self.sigmas = grid.timesteps, grid.s.float()
        self._table = self._plan(grid.num_steps).tabulate(grid).to(device or "cpu")
        self.timesteps, self.sigmas = self.timesteps.to(device), self.sigmas.to(device)

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step of the kernel, from the current level to the next: (prev_sample, pred_original_sample).

        diffusers keeps the place in the schedule: the first call takes it from `set_begin_index` or
        the timestep, one of `self.timesteps`, and every call moves on by one. The latents `[n,
        ...]` may be packed. The noise is `variance_noise`, or comes in fp32 from the generator
        (Default: `self.generator`). The arithmetic is in fp32. As in diffusers, the result has the
        network's dtype. Without `set_timesteps`, or a further step, it is an EtudeError.
        """
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise EtudeError("the timestep is a whole number, not one of scheduler.timesteps: pass those as they are.")
        table = self._table_on(sample.device)
        if self.step_index is None:
            try:
                self._init_step_index(timestep)
            except IndexError as error:
                raise EtudeError(
                    f"timestep {float(timestep):g} is not among the {table.num_steps} of this run: pass the values of scheduler.timesteps."
                ) from error
        if self.step_index >= table.num_steps:
            raise EtudeError(f"all {table.num_steps} steps were taken: call set_timesteps to start over.")
        if generator is None and variance_noise is None:
            generator = self.generator
        previous, x0_hat = self._move(self.step_index, model_output, sample, generator, variance_noise)
        self._step_index += 1
        previous, x0_hat = previous.to(model_output.dtype), x0_hat.to(model_output.dtype)
        return DDIMSchedulerOutput(previous, x0_hat) if return_dict else (previous, x0_hat)
