"""The settings of the sampler that draws training images: kernel, eta and its schedule, and MixGRPO's window."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.functional_validators import AfterValidator, field_validator, model_validator

from etude.config.section import Section, check_truth
from etude.registry import KERNELS, WINDOWS
from etude.sampling.etas import Etas, setting_text
from etude.sampling.windows import make_window

_ETA: TypeAdapter[float] = TypeAdapter(Annotated[float, Field(ge=0, allow_inf_nan=False)])


class WindowConfig(Section):
    """MixGRPO (arXiv 2507.21802): a moving window of steps under the kernel, the ODE elsewhere.

    Only the steps inside the window are trained.
    """

    strategy: Annotated[str, AfterValidator(WINDOWS.check)] = Field(
        "progressive", description=f"Movement of the window: a name, or module:Class of your own. {WINDOWS.about()}."
    )
    size: int = Field(4, ge=1)
    """Consecutive stochastic steps, all of them trained. The paper's default."""
    iters_per_shift: int = Field(25, ge=1)
    """Iterations before a progressive window moves, and before a decay window moves for the first
    time. The paper's default."""
    stride: int = Field(1, ge=1)
    """Steps that the window moves at a time. The paper's default."""
    roll_back: bool = True
    """true: from its last place the window goes back to the first. false: the window stays at its
    last place, so the other steps are no longer trained."""
    start: int | None = Field(None, ge=0)
    """First step that the window can hold. null: the first stochastic step."""
    end: int | None = Field(None, ge=1)
    """Step before which the window ends: the last step that it can hold is end - 1. null: after the
    last stochastic step."""
    decay_rate: float = Field(0.1, ge=0)
    """decay: a window whose first step is l stays for iters_per_shift * exp(-decay_rate * max(0, l
    - decay_threshold)) iterations."""
    decay_threshold: int = Field(13, ge=0)
    """decay: a window that starts after this step stays for fewer and fewer iterations. The default
    is meant for 25 steps."""
    compression: float | None = Field(None, gt=0, le=1)
    """MixGRPO-Flash: second-order DPM-Solver++ replaces the steps after the window by this share of
    their number (0.4 in the paper). null: plain MixGRPO."""
    options: dict[str, Any] = Field({})
    """Arguments of a strategy of your own, by name. Default: none."""

    def settings(self) -> dict[str, Any]:
        """Arguments that the built-in strategies share, by name."""
        return self.model_dump(exclude={"strategy", "start", "end", "compression", "options"})


class EtaScheduleConfig(Section):
    """eta as a function of the iteration or of the step: from `sampling.eta` to `end`."""

    kind: Literal["constant", "linear", "cosine"] = "linear"
    """Course of eta. linear: even. cosine: slow at both ends, half-way in the middle. constant:
    sampling.eta throughout, whatever `end` is."""
    over: Literal["iterations", "steps"] = "iterations"
    """Axis of the schedule. iterations: sampling.eta in the first iteration, `end` in the last.
    steps: sampling.eta at the noisiest step, `end` at the last step, the same in every
    iteration."""
    end: float = Field(0.5, ge=0)
    """eta where the schedule ends, in the kernel's own unit. 0 is possible only over steps, and
    makes the last step an ODE step."""


class SamplingConfig(Section):
    kernel: Annotated[str, AfterValidator(KERNELS.check)] = Field(
        "gddim",
        description=f"Transition kernel of the training sampler: a name, or module:Class of your own. {KERNELS.about()}.",
    )
    eta: float | list[float] = 1.0
    """Stochasticity while training, in the kernel's own unit. gddim: 0 is the ODE, 1 is the DDPM
    posterior, and larger values are valid. flow_sde at 0.7, the usual value elsewhere, equals gddim
    at 0.5 in the limit of short steps, and at more than 0.5 at real step lengths (`etude theory
    peers`). A list of num_steps values gives each step its own eta. A step with eta 0 is an ODE
    step and is not trained."""
    solver: Literal["ddim", "euler", "heun", "dpmsolver++", "unipc"] | None = None
    """Deterministic solver that draws the training images, for objectives on final images (nft,
    awm, elbo_pg, dpo). kernel and eta then describe the SDE side of the gap alone. null: the kernel
    at eta draws them."""
    eta_schedule: EtaScheduleConfig | None = None
    """null: eta stays constant. A section: eta moves to another value, over the iterations or over
    the denoising steps."""
    num_steps: int = Field(50, ge=1, le=10_000)
    """Denoising steps in training; also in evaluation, unless evaluation.num_steps is set."""
    guidance_scale: float = Field(5.0, ge=0)
    """Guidance scale in rollout, replay and evaluation: of classifier-free guidance (1 switches it
    off), or of FLUX's guidance embedding."""
    first_step: Literal["ode", "sde", "capped"] = "ode"
    """Treatment of a step that starts at pure noise (flow models). ode: the step is deterministic
    and not trained. sde: the kernel applies; there gddim redraws all of the noise at any eta above
    0, dance_sde and cps keep some of it, and flow_sde is infinite. capped: as sde, except that
    flow_sde takes the noise of the next level, as Flow-GRPO's code does."""
    shift: float | None = Field(None, gt=0)
    """Flow models: each noise level s becomes shift s / (1 + (shift - 1) s) in training, evaluation
    and deployment. Replaces the model's own shift, fixed or by resolution. DanceGRPO and MixGRPO
    take 3 for FLUX. null: the model's own shift."""
    window: WindowConfig | None = None
    """null: every step is stochastic and trained (DDPO, Flow-GRPO). A section: MixGRPO, with the
    kernel inside a window and the ODE elsewhere; MixGRPO-Flash, if the section sets compression."""

    @field_validator("eta", mode="before")
    @classmethod
    def _a_number_or_one_a_step(cls, value: Any) -> Any:
        check_truth(value, float)
        try:
            if isinstance(value, list | tuple):
                return [_ETA.validate_python(each) for each in value]
            return _ETA.validate_python(value)
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"]) from None

    @property
    def eta_text(self) -> str:
        """eta and its schedule in words: `1.2`, `1.2 to 0.5 over iterations (linear)`."""
        return setting_text(self.eta, self.eta_schedule.model_dump() if self.eta_schedule else None)

    def etas(self, iterations: int) -> Etas:
        """The eta of every step of every iteration of a run."""
        if not isinstance(self.eta, float):
            return Etas(tuple(self.eta))
        if self.eta_schedule is None:
            return Etas(self.eta)
        return Etas(self.eta, self.eta_schedule.end, self.eta_schedule.kind, self.eta_schedule.over, iterations)

    @property
    def all_etas(self) -> list[float]:
        """Every eta that the configuration names. All values of a schedule lie between two of these."""
        etas, schedule = self.eta if isinstance(self.eta, list) else [self.eta], self.eta_schedule
        return etas if schedule is None or schedule.kind == "constant" else [*etas, schedule.end]

    @model_validator(mode="after")
    def _consistent(self) -> SamplingConfig:
        eta, steps, window = self.eta, self.num_steps, self.window
        if self.solver is not None and window is not None:
            raise ValueError(f"solver = {self.solver} draws every step, so there is no window; set one of them to null")
        if isinstance(eta, list) and len(eta) != steps:
            raise ValueError(
                f"eta lists {len(eta)} values for num_steps = {steps}; give one a step, or one number for all"
            )
        if isinstance(eta, list) and self.eta_schedule is not None:
            raise ValueError(
                "eta is a list over the steps, which a schedule cannot move; set eta_schedule to null, or eta to a number"
            )
        if window is not None and (window.end or 0) > steps:
            raise ValueError(f"window.end = {window.end} is beyond num_steps = {steps}")
        if window is not None and window.strategy in WINDOWS.builtin:  # the constructor is the check
            place = {"start": window.start or 0, "stop": window.end or steps}
            make_window(window.strategy, {**window.settings(), **place}, window.options)
        return self
