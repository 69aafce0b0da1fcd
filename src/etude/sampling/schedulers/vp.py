"""gDDIM as a diffusers scheduler for variance preserving models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from torch import Tensor

from etude.errors import EtudeError
from etude.sampling.paths import VPPath, is_flow_config, per_sample, scheduler_defaults
from etude.sampling.plans import StepTable
from etude.sampling.schedulers.kernel_step import Generators, KernelStep


class GDDIMScheduler(KernelStep, SchedulerMixin, ConfigMixin):
    """gDDIM at any eta >= 0 for variance preserving models (arXiv 2206.05564); drop-in for `DDIMScheduler`.

        x_u = a_u x0_hat + s_u rho eps_hat + s_u sqrt(1 - rho^2) z,      rho = (lam_u / lam_t)^(eta^2),  lam = s / a

    eta 0 is diffusers' DDIM at eta 0, eta 1 its DDIM at eta 1 (the DDPM posterior). A step goes to
    the next timestep of the grid (`VPPath.grid` says where diffusers' DDIM goes elsewhere).
    `from_config` takes any discrete VP scheduler's config, its own defaults included, so the grid
    does not change with the class. Arguments that are not listed are those of `DDIMScheduler`.

    Args:
        eta: the noise level, finite and >= 0, in the kernel's own unit.
        kernel: "gddim", "ddim" or "cps"; see `etude.sampling.kernels`.
        first_step: at a step that starts from pure noise (zero terminal SNR), "ode" takes the ODE
            step, "sde" redraws.
        clip_sample: clamps x0_hat to +-clip_sample_range, eps_hat unchanged, as diffusers' DDIM
            does. False by default, because latents are not pixels (diffusers' default is True).
        thresholding: dynamic thresholding of x0_hat (arXiv 2205.11487), instead of clipping.

    Example:
        >>> import etude
        >>> pipe = etude.load_policy("emoji-sd").pipeline  # any Stable Diffusion pipeline of diffusers
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe.scheduler = etude.GDDIMScheduler.from_config(pipe.scheduler.config, eta=1.2)
        >>> pipe("red heart", num_inference_steps=2).images[0].size
        (64, 64)
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]  # noqa: RUF012 (diffusers' own form)
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        eta: float = 0.0,
        first_step: str = "ode",
        kernel: str = "gddim",
    ) -> None:
        self._plan(1)  # refuses a bad eta, kernel or first_step now, not at set_timesteps
        path = self.path
        self.alphas_cumprod = path.alphas_cumprod.float()
        self.alphas = torch.cat([self.alphas_cumprod[:1], self.alphas_cumprod[1:] / self.alphas_cumprod[:-1]])
        self.betas = 1.0 - self.alphas
        self.final_alpha_cumprod = torch.tensor(path.final_alpha_cumprod, dtype=torch.float32)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(path.num_train_timesteps).flip(0)
        self._table: StepTable | None = None
        self._index_of = self._index_on_device = torch.empty(0, dtype=torch.int64)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler for another VP scheduler's config; keyword arguments (eta=1.2) overrule it."""
        if isinstance(config, Mapping):
            config = _with_defaults(config, inspect.signature(cls.__init__).parameters.keys())
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @property
    def path(self) -> VPPath:
        """The path of the current config, which pipelines may amend in a built scheduler."""
        return VPPath.from_config(dict(self.config))

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """The latents as they are: a VP network takes x_t itself."""
        return sample

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Computes the grid (`VPPath.grid`) and every step's coefficients for N steps, on `device`."""
        path = self.path
        grid, self._prediction_type = path.grid(num_inference_steps), path.prediction_type
        # N, which is out of the table's range, marks timesteps that are not in the grid.
        index_of = torch.full((len(self),), grid.num_steps)
        index_of[grid.timesteps] = torch.arange(grid.num_steps)
        self.num_inference_steps = grid.num_steps
        self.timesteps = grid.timesteps.to(device)
        self._table = self._plan(grid.num_steps).tabulate(grid).to(device or "cpu")
        self._index_of, self._index_on_device = index_of, index_of.to(device or "cpu")

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
    ) -> Any:
        """One step of gDDIM, from `timestep` to the next of the grid: (prev_sample, pred_original_sample).

        The step is stateless: the place in the grid of the timestep (an int, a scalar tensor or
        `[n]`) comes from a table, and an accelerator is never synchronised. The arithmetic is in
        fp32; the result has the latents' dtype. The noise is `variance_noise`, or comes in fp32
        from the generator. If eta > 0, it is drawn at every step, also at deterministic ones: so
        does diffusers' DDIM, and both consume a generator alike. `eta` is what pipelines pass: 0, or
        the config's; another number is an EtudeError.
        """
        if eta not in (0, self.eta):
            raise EtudeError(
                f"eta = {eta:g} was given to the pipeline, but the scheduler's own is {self.eta:g}: give it to "
                f"GDDIMScheduler.from_config(pipe.scheduler.config, eta={eta:g})."
            )
        index = self._locate(timestep, self._table_on(sample.device))
        previous, x0_hat = self._move(index, model_output, sample, generator, variance_noise)
        previous, x0_hat = previous.to(sample.dtype), x0_hat.to(sample.dtype)
        return DDIMSchedulerOutput(previous, x0_hat) if return_dict else (previous, x0_hat)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = a_t x0 + s_t noise at integer timesteps `[n]`."""
        a, s = self._levels(timesteps, original_samples)
        return a * original_samples + s * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = a_t noise - s_t x0 at integer timesteps `[n]`."""
        a, s = self._levels(timesteps, sample)
        return a * noise - s * sample

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        self.alphas_cumprod = self.alphas_cumprod.to(like.device)
        alpha = self.alphas_cumprod[timesteps.to(like.device)]
        return per_sample(alpha.sqrt(), like), per_sample((1 - alpha).sqrt(), like)

    def _locate(self, timestep: Tensor | int, table: StepTable) -> int | Tensor:
        """The timestep's index in the table."""
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            self._index_on_device = self._index_on_device.to(timestep.device)
            # Shape [1] and not a scalar: indexing with a scalar reads its value back from the device.
            return self._index_on_device[timestep.long().reshape(-1)]
        wanted = torch.as_tensor(timestep).long()
        known = (wanted >= 0) & (wanted < len(self._index_of))
        index = self._index_of[wanted.clamp(0, len(self._index_of) - 1)]
        if not bool((known & (index < table.num_steps)).all()):
            raise EtudeError(
                f"timestep {wanted.tolist()} is not among the {self.num_inference_steps} of this run: pass the values "
                "of scheduler.timesteps."
            )
        return int(index) if index.ndim == 0 else index

    def _limit(self, x0_hat: Tensor) -> Tensor:
        """x0_hat after dynamic thresholding or clipping, if the config asks for one."""
        if self.config.thresholding:
            magnitudes = x0_hat.abs().reshape(x0_hat.shape[0], -1)
            bound = torch.quantile(magnitudes, self.config.dynamic_thresholding_ratio, dim=1)
            bound = per_sample(bound.clamp(min=1, max=self.config.sample_max_value), x0_hat)
            return x0_hat.clamp(-bound, bound) / bound
        if self.config.clip_sample:
            return x0_hat.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x0_hat


def _with_defaults(config: Mapping[str, Any], wanted: Any) -> dict[str, Any]:
    """A config with the wanted keys' defaults filled in, if its scheduler is one of diffusers'."""
    # diffusers drops the values that a scheduler left at its defaults, and takes the new class's
    # defaults instead: an Euler config would turn from linspace to leading spacing.
    values = {key: value for key, value in config.items() if key != "_use_default_values"}
    name = config.get("_class_name")
    if not is_flow_config(config) and not (isinstance(name, str) and hasattr(diffusers, name)):
        return values
    defaults = scheduler_defaults(config)
    return {**{key: value for key, value in defaults.items() if key in wanted}, **values}
