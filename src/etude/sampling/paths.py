"""Gaussian paths: the levels that a sampler visits, and the conversion of a network's output.

    x_t = a_t x0 + s_t eps,        eps ~ N(0, I)

Variance preserving (VP), the path of Stable Diffusion 1.x, 2.x and XL:

    a_t = sqrt(alphas_cumprod[t]),        s_t = sqrt(1 - alphas_cumprod[t])

Rectified flow, the path of Stable Diffusion 3 and FLUX, on levels sigma that the sampler is free to
choose:

    a = 1 - sigma,        s = sigma

A network predicts one of these quantities (`flow` on rectified flow):

    epsilon        eps
    sample         x0
    v_prediction   a eps - s x0
    flow           eps - x0

and `to_x0_eps` turns any of them into the pair (x0_hat, eps_hat) with x = a x0_hat + s eps_hat.
Nothing downstream knows the parametrisation.
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
    """The levels that a sampler visits, from noise to data; step i goes from level i to level
    i + 1.

    Attributes:
        timesteps: `[N]`, the network's timestep at each step: int64 on VP, float32 on rectified
            flow.
        a: fp64 `[N + 1]` on the CPU, the signal's coefficient at each level.
        s: fp64 `[N + 1]` on the CPU, the noise's coefficient at each level.
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
    """The variance preserving path of a diffusers scheduler.

    Attributes:
        alphas_cumprod: fp64 `[T]`, a_t^2 at the T training timesteps.
        final_alpha_cumprod: a^2 at the end of the last step: 1 (clean data), or alphas_cumprod[0]
            for schedulers with `set_alpha_to_one=False` or `final_sigmas_type="sigma_min"`.
        prediction_type: "epsilon", "v_prediction" or "sample".
        timestep_spacing: "leading", "trailing" or "linspace" (arXiv 2305.08891, table 2).
        steps_offset: added to the timesteps under leading spacing.
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: float
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VPPath:
        """Builds the path from the config of a DDIM, DDPM, PNDM, Euler, DPM-Solver or other
        discrete VP scheduler.

        A key that is missing in the config takes the default of the scheduler class that the config
        names (DDIM's if it names none). Settings of a sampler rather than of the model (Karras
        sigmas, solver orders, float timesteps) are ignored.

        Raises:
            EtudeError: the scheduler is not a discrete VP one, or its schedule or prediction type
                is unknown.
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

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of levels that the network was trained on."""
        return len(self.alphas_cumprod)

    def level(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(a_t, s_t) in fp64 at integer timesteps of any shape."""
        alpha = self.alphas_cumprod[timesteps]
        return alpha.sqrt(), (1 - alpha).sqrt()

    def timesteps(self, num_steps: int, spacing: str | None = None) -> Tensor:
        """The N timesteps (int64, descending) that diffusers' DDIM visits under the spacing (arXiv
        2305.08891).

            leading    i (T // N) + steps_offset
            trailing   round(T - i T / N) - 1
            linspace   round(i (T - 1) / (N - 1))

        One step under linspace starts at T - 1 (diffusers starts it at 0, where the network expects
        clean data).

        Raises:
            EtudeError: N is not in 1..T, the spacing is unknown, or the offset leads past T - 1.
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
        """The levels of an N-step sampler.

        Every step goes to the **next timestep of the grid**, and the last one to the final level.
        diffusers' DDIM goes to t - T // N instead. The two agree under leading spacing and, where N
        divides T, under trailing spacing. Under linspace (and trailing with another N) diffusers'
        target is not the level from which the next step starts, so the network would read a state
        at a noise level that the state does not have.

        Args:
            num_steps: N.
            spacing: as in `timesteps`. Default: the config's own.

        Raises:
            EtudeError: as in `timesteps`; the grid starts at zero terminal SNR (a = 0) with an
                epsilon-predicting network, whose output says nothing about x0 there; or it passes a
                level without noise (s = 0).
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
    """Rectified flow (arXiv 2209.03003) as Stable Diffusion 3 and FLUX are trained: a = 1 - sigma,
    s = sigma.

    The network predicts the velocity eps - x0. The scheduler chooses the levels that a sampler
    visits, so the levels come from diffusers' own `FlowMatchEulerDiscreteScheduler`, under any
    shift of its config.

    Attributes:
        config: every option of that scheduler; make it with `from_config`, which fills in the
            defaults.
    """

    config: Mapping[str, Any]
    prediction_type: ClassVar[str] = "flow"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlowPath:
        """Builds the path from a FlowMatch scheduler's config; a missing key takes the default.

        `stochastic_sampling` is ignored: it says how the scheduler steps between the levels, and
        here the kernel does.

        Raises:
            EtudeError: the config is another scheduler's; diffusers refuses its options; or it sets
                `invert_sigmas` (Mochi), where the levels and the network's timesteps count the
                signal, from 0 to 1.
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

    @property
    def num_train_timesteps(self) -> int:
        """The network's timestep at a level divided by the level, sigma."""
        return int(self.config["num_train_timesteps"])

    @property
    def needs_mu(self) -> bool:
        """Whether the levels depend on the resolution; `grid` then needs a mu."""
        return bool(self.config["use_dynamic_shifting"])

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None, mu: float | None = None) -> Grid:
        """The levels of an N-step sampler: those of diffusers' `set_timesteps`, then 0.

        diffusers computes sigma in fp32. The grid holds the same values in fp64, with a = 1 - sigma
        exact. Under the usual shift every level is `shift sigma / (1 + (shift - 1) sigma)`. Under a
        dynamic shift it is `exp(mu) / (exp(mu) + 1 / sigma - 1)`, or has mu in place of exp(mu)
        (`time_shift_type` "linear").

        Args:
            num_steps: N.
            sigmas: N levels before the shift, in (0, 1], from noise to data. Default: evenly
                spaced.
            mu: the shift for the resolution. Required with `use_dynamic_shifting`, and otherwise
                ignored, because pipelines always pass it.

        Raises:
            EtudeError: N is not a whole number of at least 1; sigmas are not N falling levels; mu
                is missing; or the config's options lead to a level that is not in (0, 1].
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        if isinstance(num_steps, bool) or int(num_steps) != num_steps or num_steps < 1:
            raise EtudeError(f"{num_steps} sampling steps cannot be taken: give a whole number of at least 1.")
        levels = None if sigmas is None else _checked_sigmas(sigmas, int(num_steps))
        check_mu(self.config, mu)
        scheduler = FlowMatchEulerDiscreteScheduler(**self.config)
        with np.errstate(all="ignore"):  # flow_grid refuses overflows and divisions by 0
            scheduler.set_timesteps(int(num_steps), sigmas=levels, mu=mu if self.needs_mu else None)
        return flow_grid(scheduler.timesteps, scheduler.sigmas)


Path = VPPath | FlowPath


def path_from_config(config: Mapping[str, Any]) -> Path:
    """The path of a model by the class of its scheduler: rectified flow for a FlowMatch one, else
    VP.

    Raises:
        EtudeError: as in `FlowPath.from_config` and `VPPath.from_config`.
    """
    return FlowPath.from_config(config) if is_flow_config(config) else VPPath.from_config(config)


def is_flow_config(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a rectified-flow (FlowMatch) scheduler.

    The config of a scheduler that was built in code has no class name; its options decide then.
    """
    name = config.get("_class_name")
    return str(name).startswith("FlowMatch") if name else "shift" in config and "beta_start" not in config


def check_mu(config: Mapping[str, Any], mu: float | None) -> None:
    """Checks that mu is there if the levels depend on the resolution, and that it is finite.

    Raises:
        EtudeError: mu is missing, or is not a finite number.
    """
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
    neighbouring number, and a kernel would divide by 1 - sigma.

    Raises:
        EtudeError: a step starts from a level that is not in (0, 1], or the levels do not fall.
    """
    s = sigmas.detach().cpu().double()
    s = torch.where((s - 1).abs() <= 1e-6, 1.0, s)
    # In this form the condition fails for NaN, too.
    if not bool(((s[:-1] > 0) & (s[:-1] <= 1)).all() and (s.diff() <= 0).all()):
        raise EtudeError(
            f"the flow scheduler's options give the levels {_shorten(s.tolist())}, but they must fall from at most 1 "
            "and stay above 0 until the last: change the shift (shift_terminal needs at least 2 steps), mu or sigmas."
        )
    return Grid(timesteps.detach().cpu().float(), 1 - s, s)


def _checked_sigmas(sigmas: Sequence[float], num_steps: int) -> list[float]:
    levels = [float(sigma) for sigma in sigmas]
    falling = all(later < sooner for sooner, later in pairwise(levels))
    if len(levels) != num_steps or not falling or not all(0 < level <= 1 for level in levels):
        raise EtudeError(
            f"the sigmas {_shorten(levels)} do not give {num_steps} steps: give {num_steps} falling numbers above 0 "
            "and at most 1, without the final 0."
        )
    return levels


def _shorten(values: list[float]) -> str:
    texts = [f"{value:g}" for value in values]
    return ", ".join(texts if len(texts) <= 6 else [*texts[:3], "...", *texts[-2:]])


def scheduler_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor defaults of the diffusers scheduler that the config names.

    DDIM's defaults are taken if the config names no class, or one that diffusers does not have.

    Raises:
        EtudeError: the scheduler is not a variance preserving one.
    """
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
    builder: Any = {"sigmoid": DDPMScheduler, "laplace": DDPMScheduler, "exp": HeunDiscreteScheduler}.get(
        schedule, DDIMScheduler
    )
    if builder is HeunDiscreteScheduler:
        chosen.pop("rescale_betas_zero_snr", None)
    try:
        return builder(**chosen).alphas_cumprod.double()
    except NotImplementedError as error:
        raise EtudeError(
            f"beta_schedule '{schedule}' is not one that diffusers knows: use linear, scaled_linear, "
            "squaredcos_cap_v2 or sigmoid."
        ) from error


def per_sample(value: Tensor | float, like: Tensor) -> Tensor:
    """A coefficient as a tensor of `like`'s dtype and device that broadcasts over its samples.

    A scalar becomes `[1, 1, ..]` and a `[n]` vector `[n, 1, ..]`, so that both go through the same
    arithmetic and give the same bits. A tensor of more dimensions stays as it is. A tensor that is
    on the device already causes no synchronisation.
    """
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return tensor.reshape(-1, *[1] * (like.ndim - 1)) if tensor.ndim < 2 else tensor


def to_x0_eps(
    model_output: Tensor, x: Tensor, a: Tensor | float, s: Tensor | float, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """(x0_hat, eps_hat) with x = a x0_hat + s eps_hat, from the network's prediction.

        epsilon        x0 = (x - s e) / a        eps = e
        v_prediction   x0 = a x - s v            eps = a v + s x
        sample         x0 = o                    eps = (x - a o) / s
        flow           x0 = (x - s v) / (a + s)  eps = (x + a v) / (a + s)

    Computed and returned in fp32, for any dtype of the network (in fp64 if the latents are fp64).

    Args:
        model_output: the network's output, `[n, ...]`, any floating dtype.
        x: the latents, same shape.
        a: signal coefficient at the level of `x`, a scalar or `[n]`.
        s: noise coefficient, likewise.
        prediction_type: one of the four above.

    Raises:
        EtudeError: the prediction type is unknown.
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
