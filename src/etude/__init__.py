"""Fine-tune text-to-image diffusion models on a reward with any sampler stochasticity, and measure the reward gap.

`improvement = E r(ODE, tuned) - E r(ODE, base)` and `reward gap = E r(ODE, tuned) - E r(SDE_eta, tuned)`, after
"Understanding Sampler Stochasticity in Training Diffusion Models for RLHF" (arXiv 2510.10767).

The names below are loaded when they are first used, so that `import etude` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etude.config import TrainConfig
    from etude.measuring.gap import reward_gap
    from etude.policies import load_policy
    from etude.training.trainer import Trainer

__version__ = "0.1.0"

__all__ = ["TrainConfig", "Trainer", "__version__", "load_policy", "reward_gap"]

_HOMES = {
    "TrainConfig": "etude.config",
    "Trainer": "etude.training.trainer",
    "load_policy": "etude.policies",
    "reward_gap": "etude.measuring.gap",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'etude' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
