"""Gaussian paths: the levels that a sampler visits, and the conversion of a network's output.

    x_t = a_t x0 + s_t eps,        eps ~ N(0, I)

    VP     a_t = sqrt(alphas_cumprod[t]),  s_t = sqrt(1 - alphas_cumprod[t])    Stable Diffusion 1.x, 2.x, XL
    flow   a = 1 - sigma,  s = sigma, on levels sigma of the sampler's choice    Stable Diffusion 3, FLUX

A network predicts eps ("epsilon"), x0 ("sample"), a eps - s x0 ("v_prediction") or, on rectified
flow, eps - x0 ("flow"). `to_x0_eps` turns each into the pair (x0_hat, eps_hat) with
x = a x0_hat + s eps_hat. Nothing downstream knows the parametrisation.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from etude.errors import EtudeError, brief, unknown

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels that a sampler visits, from noise to data: a and s, fp64 `[N + 1]` on the CPU.

    Step i goes from level i to i + 1. The network's timesteps `[N]` are int64 on VP, else float32.
    """

    timesteps: Tensor
    a: Tensor
    s: Tensor

    @property
    def num_steps(self) -> int:
        """N, the number of network evaluations."""
        return len(self.timesteps)


@dataclass(frozen=True, eq=False)
class VPPath:
    """The variance preserving path of a diffusers scheduler: a_t^2 = alphas_cumprod, fp64 `[T]`.

    final_alpha_cumprod is a^2 at the end of the last step: 1 (clean data), or alphas_cumprod[0] for
    schedulers with `set_alpha_to_one=False` or `final_sigmas_type="sigma_min"`. The prediction type
    is "epsilon", "v_prediction" or "sample", and the spacing "leading", "trailing" or "linspace"
    (arXiv 2305.08891, table 2). The offset is added to the timesteps under leading spacing.
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: float
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VPPath:
        """The path of a discrete VP scheduler's config: DDIM, DDPM, PNDM, Euler, DPM-Solver or other.

        A missing key takes the default of the scheduler class that the config names (DDIM's if it
        names none). Settings of a sampler rather than of the model (Karras sigmas, solver orders,
        float timesteps) are ignored. Raises EtudeError for another scheduler, and for an unknown
        schedule or prediction type.
        """
        defaults = scheduler_defaults(config)
        values = {**defaults, **{k: v for k, v in config.items() if v is not None or k not in defaults}}
        if values.get("use_flow_sigmas") or values.get("snr_shift_scale") not in (None, 1.0):
            raise EtudeError(
                f"the scheduler config of {config.get('_class_name', 'this model')} shifts its noise levels "
                "(use_flow_sigmas or snr_shift_scale), so it is not a plain VP schedule: use a DDIM-type config."
            )
        prediction_type = values.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise unknown("prediction_type of a VP scheduler", str(prediction_type), PREDICTION_TYPES)
        spacing = values.get("timestep_spacing", "leading")
        if spacing not in SPACINGS:
            raise unknown("timestep_spacing", str(spacing), SPACINGS)
        alphas_cumprod = _alphas_cumprod(values)
        to_clean = values.get("set_alpha_to_one", True) and values.get("final_sigmas_type", "zero") != "sigma_min"
        final = 1.0 if to_clean else float(alphas_cumprod[0])
        return cls(alphas_cumprod, final, prediction_type, spacing, int(values.get("steps_offset") or 0))

    def scheduler_settings(self) -> dict[str, Any]:
        """Settings that give a VP scheduler of diffusers this path's levels, without clipping.

        They are spelt out, since a scheduler takes its own class's default for what the model's
        config does not say: DDIM would clip latents as if they were pixels.
        """
        return {
            "clip_sample": False,
            "set_alpha_to_one": self.final_alpha_cumprod == 1,
            "timestep_spacing": self.timestep_spacing,
            "steps_offset": self.steps_offset,
        }

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of levels that the network was trained on."""
        return len(self.alphas_cumprod)

    def level(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(a_t, s_t) in fp64 at integer timesteps of any shape."""
        alpha = self.alphas_cumprod[timesteps]
        return alpha.sqrt(), (1 - alpha).sqrt()

    def timesteps(self, num_steps: int, spacing: str | None = None) -> Tensor:
        """The N timesteps (int64, descending) that diffusers' DDIM visits (arXiv 2305.08891).

            leading    i (T // N) + steps_offset
            trailing   round(T - i T / N) - 1
            linspace   round(i (T - 1) / (N - 1))

        One step under linspace starts at T - 1 (diffusers starts it at 0, where the network expects
        clean data). Raises EtudeError if N is not in 1..T, the spacing is unknown, or the offset
        leads past T - 1.
        """
        spacing = self.timestep_spacing if spacing is None else spacing
        total = self.num_train_timesteps
        if isinstance(num_steps, bool) or int(num_steps) != num_steps or not 1 <= num_steps <= total:
            raise EtudeError(
                f"{num_steps} sampling steps cannot be taken: this model needs a whole number from 1 to {total}."
            )
        num_steps = int(num_steps)
        steps: np.ndarray[Any, Any]
        if spacing == "leading":
            steps = np.arange(num_steps)[::-1] * (total // num_steps) + self.steps_offset
        elif spacing == "trailing":
            steps = np.round(total - np.arange(num_steps) * (total / num_steps)) - 1
        elif spacing == "linspace":
            steps = np.linspace(total - 1, 0, num_steps).round()
        else:
            raise unknown("timestep_spacing", str(spacing), SPACINGS)
        if not (steps.max() < total and steps.min() >= 0):
            raise EtudeError(
                f"{num_steps} steps under leading spacing with steps_offset {self.steps_offset} reach timestep "
                f"{int(steps.max())}, past the last one, {total - 1}: take fewer steps or trailing spacing."
            )
        return torch.from_numpy(steps.astype(np.int64).copy())

    def grid(self, num_steps: int, spacing: str | None = None) -> Grid:
        """The levels of an N-step sampler, under the config's spacing or another.

        Every step goes to the **next timestep of the grid**, and the last one to the final level.
        diffusers' DDIM goes to t - T // N instead. The two agree under leading spacing and, where N
        divides T, under trailing spacing. Under linspace (and trailing with another N) diffusers'
        target is not the level from which the next step starts, so the network would read a state
        at a noise level that the state does not have. Raises EtudeError as `timesteps`, for a level
        without noise, and for zero terminal SNR (a = 0) with a network that predicts epsilon, which
        says nothing about x0 there.
        """
        timesteps = self.timesteps(num_steps, spacing)
        alpha = torch.cat(
            [self.alphas_cumprod[timesteps], torch.tensor([self.final_alpha_cumprod], dtype=torch.float32).double()]
        )
        a, s = alpha.sqrt(), (1 - alpha).sqrt()
        if bool((s[:-1] == 0).any()):
            raise EtudeError("the schedule has a training timestep without noise (beta 0): start its betas above 0.")
        if self.prediction_type == "epsilon" and bool((a[:-1] == 0).any()):
            raise EtudeError(
                "the grid starts at zero terminal SNR, where an epsilon-predicting network cannot tell x0: use a "
                "v_prediction or sample model, or set rescale_betas_zero_snr to false."
            )
        return Grid(timesteps, a, s)


@dataclass(frozen=True, eq=False)
class FlowPath:
    """Rectified flow (arXiv 2209.03003): a = 1 - sigma, s = sigma, and a network for eps - x0.

    The levels are those of diffusers' own `FlowMatchEulerDiscreteScheduler`, under any shift;
    `config` holds every option of it.
    """

    config: Mapping[str, Any]
    prediction_type: ClassVar[str] = "flow"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlowPath:
        """The path of a FlowMatch scheduler's config; a missing key takes the default.

        `stochastic_sampling` is ignored: it says how the scheduler steps between the levels, and
        here the kernel does. Another scheduler's config, options that diffusers refuses, and
        `invert_sigmas` (Mochi: levels count the signal, from 0 to 1) raise EtudeError.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        name = config.get("_class_name")
        if (name and not is_flow_config(config)) or "beta_start" in config:
            raise EtudeError(
                f"{name or 'a scheduler with betas'} is not a rectified-flow scheduler: use a model with a "
                "FlowMatchEulerDiscreteScheduler, or VPPath for Stable Diffusion 1.x, 2.x and XL."
            )
        if config.get("invert_sigmas"):
            raise EtudeError(
                "the scheduler config has invert_sigmas, so its levels run from data to noise: set it to false, or use "
                "a model whose levels run from noise to data."
            )
        options = set(inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters) - {"self"}
        settings = {key: value for key, value in config.items() if key in options}
        try:
            scheduler = FlowMatchEulerDiscreteScheduler(**settings)
        except (ValueError, TypeError, ImportError) as error:
            raise EtudeError(f"diffusers refuses the flow scheduler's config ({brief(error)}): mend it.") from error
        return cls({key: scheduler.config[key] for key in sorted(options)})

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None, mu: float | None = None) -> Grid:
        """The levels of an N-step sampler: those of diffusers' `set_timesteps`, then 0.

        diffusers computes sigma in fp32. The grid holds the same values in fp64, with a = 1 - sigma
        exact. Under the usual shift every level is `shift sigma / (1 + (shift - 1) sigma)`. Under a
        dynamic shift it is `exp(mu) / (exp(mu) + 1 / sigma - 1)`, or has mu in place of exp(mu)
        (`time_shift_type` "linear"). Without `use_dynamic_shifting` mu is ignored, because
        pipelines always pass it. `sigmas` are N falling levels before the shift, in (0, 1].
        Default: evenly spaced. Raises EtudeError if N is not a whole number of at least 1, sigmas
        do not fit, mu is missing, or the config's options lead to a level that is not in (0, 1].
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        count = whole_steps(num_steps)
        levels = None if sigmas is None else [float(sigma) for sigma in sigmas]
        if levels is not None and not (
            len(levels) == count and all(1 >= sooner > later for sooner, later in pairwise([*levels, 0.0]))
        ):
            raise EtudeError(
                f"the sigmas {_shorten(levels)} do not give {count} steps: give {count} falling numbers above 0 "
                "and at most 1, without the final 0."
            )
        check_mu(self.config, mu)
        scheduler = FlowMatchEulerDiscreteScheduler(**self.config)
        with np.errstate(all="ignore"):  # flow_grid refuses overflows and divisions by 0
            scheduler.set_timesteps(count, sigmas=levels, mu=mu if self.config["use_dynamic_shifting"] else None)
        return flow_grid(scheduler.timesteps, scheduler.sigmas)


def whole_steps(num_steps: int) -> int:
    """The number of steps as an int; an EtudeError unless it is a whole number of at least 1."""
    if isinstance(num_steps, bool) or int(num_steps) != num_steps or num_steps < 1:
        raise EtudeError(f"{num_steps} sampling steps cannot be taken: give a whole number of at least 1.")
    return int(num_steps)


def is_flow_config(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a rectified-flow (FlowMatch) scheduler."""
    # The config of a scheduler that was built in code has no class name; its options decide then.
    name = config.get("_class_name")
    return str(name).startswith("FlowMatch") if name else "shift" in config and "beta_start" not in config


def check_mu(config: Mapping[str, Any], mu: float | None) -> None:
    """Raises EtudeError unless mu is there if the levels depend on the resolution, and is finite."""
    if config["use_dynamic_shifting"] and mu is None:
        raise EtudeError(
            "the scheduler shifts its levels with the resolution (use_dynamic_shifting), but no mu was given: pass mu, "
            "or set use_dynamic_shifting to false."
        )
    if mu is not None and not math.isfinite(mu):
        raise EtudeError(f"the shift mu is {mu}: give a finite number.")


def flow_grid(timesteps: Tensor, sigmas: Tensor) -> Grid:
    """The grid of a flow scheduler's timesteps `[N]` and sigmas `[N + 1]`, held in fp64 on the CPU.

    A sigma within 1e-6 of 1 becomes exactly 1, pure noise: a shift in fp32 may round 1 to a
    neighbouring number, and a kernel would divide by 1 - sigma. Levels must fall, from (0, 1]; a
    large mu rounds several to pure noise, from which no step leads to pure noise.
    """
    s = sigmas.detach().cpu().double()
    s = torch.where((s - 1).abs() <= 1e-6, 1.0, s)
    # In this form the condition fails for NaN, too.
    if not bool(((s[:-1] > 0) & (s[:-1] <= 1)).all() and (s.diff() <= 0).all() and (s[1:] < 1).all()):
        raise EtudeError(
            f"the flow scheduler's options give the levels {_shorten(s.tolist())}, but they must fall from at most 1 "
            "and stay above 0 until the last: change the shift (shift_terminal needs at least 2 steps), mu, sigmas or the "
            "resolution."
        )
    return Grid(timesteps.detach().cpu().float(), 1 - s, s)


def _shorten(values: list[float]) -> str:
    texts = [f"{value:g}" for value in values]
    return ", ".join(texts if len(texts) <= 6 else [*texts[:3], "...", *texts[-2:]])


def scheduler_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor defaults of the VP scheduler that the config names; DDIM's if diffusers has none such."""
    import diffusers

    name = config.get("_class_name")
    scheduler = getattr(diffusers, name, None) if isinstance(name, str) else None
    signature = inspect.signature((scheduler or diffusers.DDIMScheduler).__init__)
    if "beta_start" not in signature.parameters or is_flow_config(config):
        raise EtudeError(
            f"{name or 'a scheduler with a shift and no betas'} is not a variance preserving scheduler: "
            "use a model with a DDIM, PNDM or Euler one."
        )
    return {k: p.default for k, p in signature.parameters.items() if p.default is not inspect.Parameter.empty}


def _alphas_cumprod(values: Mapping[str, Any]) -> Tensor:
    """diffusers' own alphas_cumprod, computed in fp32 as for the network's training, in fp64."""
    from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler

    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    chosen = {key: values[key] for key in keys if key in values}
    if chosen.get("trained_betas") is not None:
        chosen["trained_betas"] = [float(beta) for beta in chosen["trained_betas"]]
    schedule = chosen.get("beta_schedule", "linear")
    # Some schedules exist in few classes, of which one is named here; the others exist in DDIM's.
    special = {"sigmoid": DDPMScheduler, "laplace": DDPMScheduler, "exp": HeunDiscreteScheduler}
    builder: Any = special.get(schedule, DDIMScheduler)
    if builder is HeunDiscreteScheduler:
        chosen.pop("rescale_betas_zero_snr", None)
    try:
        return builder(**chosen).alphas_cumprod.double()
    except NotImplementedError as error:
        raise EtudeError(
            f"beta_schedule '{schedule}' is not one that diffusers knows: use linear, scaled_linear, squaredcos_cap_v2 or sigmoid."
        ) from error


def per_sample(value: Tensor | float, like: Tensor) -> Tensor:
    """A coefficient in the dtype and on the device of `like`, shaped to broadcast over its samples.

    A scalar becomes `[1, 1, ..]` and a `[n]` vector `[n, 1, ..]`, so that both give the same bits.
    """
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return tensor.reshape(-1, *[1] * (like.ndim - 1)) if tensor.ndim < 2 else tensor


def to_x0_eps(
    model_output: Tensor, x: Tensor, a: Tensor | float, s: Tensor | float, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """(x0_hat, eps_hat) with x = a x0_hat + s eps_hat, from the network's output, shaped like x `[n, ...]`.

        epsilon        x0 = (x - s e) / a        eps = e
        v_prediction   x0 = a x - s v            eps = a v + s x
        sample         x0 = o                    eps = (x - a o) / s
        flow           x0 = (x - s v) / (a + s)  eps = (x + a v) / (a + s)

    Computed and returned in fp32, for any dtype of the network (in fp64 if the latents are fp64).
    The level (a, s) of x is scalars or `[n]`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    output, x = model_output.to(dtype), x.to(dtype)
    a, s = per_sample(a, x), per_sample(s, x)
    if prediction_type == "epsilon":
        return (x - s * output) / a, output
    if prediction_type == "v_prediction":
        return a * x - s * output, a * output + s * x
    if prediction_type == "sample":
        return output, (x - a * output) / s
    if prediction_type == "flow":
        return (x - s * output) / (a + s), (x + a * output) / (a + s)
    raise unknown("prediction_type", str(prediction_type), (*PREDICTION_TYPES, "flow"))
