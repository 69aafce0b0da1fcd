"""A sampler as a user writes it down: solver, eta, steps, guidance and size.

{solver: heun, steps: 10, guidance: 4, size: 512}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from pydantic.functional_validators import AfterValidator, model_validator

from etude.config.section import Section
from etude.registry import KERNELS

if TYPE_CHECKING:
    from etude.sampling.sampler import Sampler

SolverChoice = Literal["ode", "ddim", "euler", "heun", "dpmsolver++", "unipc"]
STEPS, GUIDANCE = 20, 5.0
"""Steps and guidance where neither a setting nor a run says another number, those of `etude gap`."""


class SamplerSettings(Section):
    """The settings of drawing from a model: the sampler and the side of the images."""

    solver: SolverChoice = "ode"
    """ode: the probability-flow ODE on the model's own levels. The others: solvers of diffusers."""
    eta: float = Field(0.0, ge=0)
    """Stochasticity in the kernel's own unit, in every step. 0: no noise."""
    kernel: Annotated[str, AfterValidator(KERNELS.check)] = "gddim"
    """Kernel of the stochastic steps. It needs an eta above 0."""
    first_step: Literal["ode", "sde", "capped"] = "ode"
    """Treatment of a stochastic step out of pure noise, as sampling.first_step."""
    steps: int | None = Field(None, ge=1, le=10_000)
    """Denoising steps. null: those of the sampler beside it, else 20."""
    guidance: float | None = Field(None, ge=0)
    """Guidance scale; 1 switches classifier-free guidance off. null: that of the sampler beside it,
    else 5."""
    size: int | None = Field(None, ge=8, le=65_536)
    """Side of the images in pixels. null: that of the sampler beside it, else the pipeline's own."""

    @model_validator(mode="after")
    def _one_sampler(self) -> SamplerSettings:
        if self.eta and self.solver != "ode":
            raise ValueError(f"solver {self.solver} is deterministic; leave out eta, or the solver to draw with noise")
        if not self.eta and (self.kernel, self.first_step) != ("gddim", "ode"):
            raise ValueError("kernel and first_step are of stochastic steps; give an eta above 0, or leave them out")
        return self

    def filled(self, beside: SamplerSettings | None = None) -> SamplerSettings:
        """The settings with steps, guidance and size of another one, or the defaults, in place of null."""
        other = beside or SamplerSettings()
        steps = self.steps or other.steps or STEPS
        guidance = next((g for g in (self.guidance, other.guidance) if g is not None), GUIDANCE)
        return self.model_copy(update={"steps": steps, "guidance": guidance, "size": self.size or other.size})

    def sampler(self) -> Sampler:
        """The sampler, `etude.ODE`, `etude.SDE` or `etude.Solver`. The size is the model's to take."""
        from etude.sampling.sampler import ODE, SDE
        from etude.sampling.solvers import Solver

        steps, guidance = self.steps or STEPS, GUIDANCE if self.guidance is None else self.guidance
        if self.eta:
            return SDE(self.eta, steps, self.kernel, self.first_step, guidance)
        return ODE(steps, guidance) if self.solver == "ode" else Solver(self.solver, steps, guidance)

    @property
    def label(self) -> str:
        """`ODE, 20 steps, guidance 5`, `cps at eta 0.5, 10 steps, guidance 1, 512 px`."""
        kernel = "" if self.kernel == "gddim" else f"{self.kernel} at "
        name = f"{kernel}eta {self.eta:g}" if self.eta else "ODE" if self.solver == "ode" else self.solver
        first = f", first step {self.first_step}" if self.first_step != "ode" else ""
        parts = [f"{name}{first}", f"{self.steps} steps" if self.steps else ""]
        parts += [f"guidance {self.guidance:g}" if self.guidance is not None else ""]
        return ", ".join(part for part in [*parts, f"{self.size} px" if self.size else ""] if part)
