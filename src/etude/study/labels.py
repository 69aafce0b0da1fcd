"""Labels of settings and samplers in the tables and figures of a study."""

from __future__ import annotations

from typing import Any

from etude.config import TrainConfig
from etude.config.sections import PromptsConfig
from etude.sampling.etas import eta_text
from etude.study.study_file import number_text

_SOLVERS = {"dpmsolver++": "DPM-Solver++ 2M", "unipc": "UniPC", "heun": "Heun", "ddim": "DDIM", "euler": "Euler"}


def setting_label(key: str, value: Any, config: TrainConfig) -> str:
    """A setting in words, as `η = 1.2`; empty where labels need not mention the value."""
    if key == "rewards":
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in value.items())
    if key == "sampling.eta":
        return f"η = {config.sampling.eta_text}"
    if key.startswith("sampling.eta_schedule"):
        return ""  # stands beside eta
    if key == "sampling.kernel":
        return "" if value == "gddim" else str(value)
    if key == "sampling.window":
        if value is None:
            return "every step"
        tail = "" if value["compression"] is None else f", Flash {value['compression']:g}"
        return f"{value['strategy']} window of {value['size']}{tail}"
    if key == "objective.timestep_fraction":
        return "" if value == 1 else f"{100 * value:.0f} % of them trained"
    if key == "checkpoint.best":
        return "" if value is None else "best checkpoint kept"
    if key == "prompts.train":
        return "" if value == PromptsConfig().train else f"prompts {value}"
    if key == "sampling.num_steps":
        return f"{value} steps"
    name = "rate" if key == "optimizer.learning_rate" else key.rpartition(".")[2]
    return f"{name} {number_text(value)}"


def training_label(kernel: str, eta: str) -> str:
    """The sampler of training, as `cps η = 0.8`. gDDIM's kernel is not named: `η = 1.2`."""
    return f"{'' if kernel == 'gddim' else f'{kernel} '}η = {eta}"


def sampler_label(row: dict[str, Any]) -> str:
    """A sampler of `scores.json`: `ODE`, `Heun`, `SDE η = 1.2`."""
    if row["kind"] == "ode":
        return "ODE"
    if row["kind"] == "solver":
        return _SOLVERS[row["sampler"]]
    return f"{'SDE' if row['sampler'] == 'gddim' else row['sampler']} η = {eta_text(row['eta'])}"
