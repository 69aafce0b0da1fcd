"""Levels of models that ship with a multistep solver on flow levels: SANA's DPM-Solver++, Wan's UniPC.

Their levels are not those of `FlowMatchEulerDiscreteScheduler` at the same shift: at 4 steps and
shift 3 SANA's visits 999, 899, 749 and 499, the other 1000, 858, 602 and 9. So they are taken from
the class itself. Euler's method on them is the solver at order 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etude.errors import EtudeError, brief
from etude.sampling.paths import FlowPath, Grid, flow_grid, whole_steps


@dataclass(frozen=True, eq=False)
class SolverPath(FlowPath):
    """Rectified flow on the levels of a multistep solver with `use_flow_sigmas`; `config` is the solver's."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlowPath:
        """The path of a solver's config, or of a FlowMatch scheduler's, as `FlowPath.from_config`.

        Raises:
            EtudeError: the config belongs to no flow scheduler, or the solver's network does not
                predict a flow.
        """
        if config.get("solver"):  # etude's own scheduler, which visits the levels of another
            return cls.from_config(config["solver"])
        if not config.get("use_flow_sigmas"):
            return FlowPath.from_config(config)
        name, predicts = config.get("_class_name"), config.get("prediction_type")
        if predicts != "flow_prediction":
            raise EtudeError(
                f"the {name} of this model is on flow levels (use_flow_sigmas) and its prediction_type is {predicts}: give a model "
                "whose scheduler says flow_prediction."
            )
        return cls(dict(config))

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None, mu: float | None = None) -> Grid:
        """The levels that the solver's class visits in N steps, then 0; mu as the class takes it.

        Raises:
            EtudeError: N is not a whole number of at least 1, or the class refuses it or the sigmas.
        """
        import diffusers

        scheduler = getattr(diffusers, self.config["_class_name"]).from_config(self.config)
        given = {"sigmas": sigmas, "mu": mu if self.config.get("use_dynamic_shifting") else None}
        try:
            scheduler.set_timesteps(
                whole_steps(num_steps), **{name: value for name, value in given.items() if value is not None}
            )
        except (ValueError, IndexError, TypeError) as error:
            raise EtudeError(f"diffusers refuses {num_steps} steps ({brief(error)}): take another number.") from error
        return flow_grid(scheduler.timesteps, scheduler.sigmas)


def first_order(name: str, num_steps: int) -> dict[str, Any]:
    """Settings that make Euler's method of a solver's class: the ODE on its levels.

    Args:
        name: `DPMSolverMultistepScheduler` or `UniPCMultistepScheduler`, whose corrector is switched off.
        num_steps: the number of steps.
    """
    if name == "UniPCMultistepScheduler":
        return {"solver_order": 1, "disable_corrector": list(range(num_steps))}
    return {"solver_order": 1}
