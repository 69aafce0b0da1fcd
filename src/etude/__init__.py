"""Fine-tune text-to-image models on a reward at any sampler stochasticity; measure the reward gap.

    improvement = E r(ODE samples of the tuned model) - E r(ODE samples of the base model)
    reward gap  = E r(ODE samples of the tuned model) - E r(SDE_eta samples of the tuned model)

after "Understanding Sampler Stochasticity in Training Diffusion Models for RLHF" (arXiv 2510.10767).

    import etude

    policy = etude.load_policy("emoji-sd")
    images = etude.sample(policy, ["red heart"], etude.SDE(eta=1.2, steps=20), seed=0)
    gap = etude.reward_gap(policy, rewards=["colorfulness"], etas=[0.5, 1.2])
    print(gap)
    run = etude.train("emoji-ddpo", "runs/first", {"sampling.eta": 1.2})

Each name is loaded when it is first used. `help(etude.sample)` explains one with an example.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etude.config import TrainConfig, load_config
    from etude.errors import EtudeError
    from etude.measuring.gap import reward_gap
    from etude.measuring.pairs import Measurement
    from etude.measuring.statistics import Estimate
    from etude.policies import load_policy
    from etude.policies.source import ModelSource
    from etude.registry import register_advantage, register_kernel, register_objective, register_policy, register_window
    from etude.rewards import register as register_reward
    from etude.rewards import score
    from etude.sampling.kernels import CPS, DDIM, GDDIM, DanceSDE, FlowSDE
    from etude.sampling.replay import replay
    from etude.sampling.rollout import rollout
    from etude.sampling.sampler import ODE, SDE, Window, sample
    from etude.sampling.schedulers import FlowMatchGDDIMScheduler, GDDIMScheduler
    from etude.sampling.solvers import Solver
    from etude.training.run import train
    from etude.training.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "CPS", "DDIM", "GDDIM", "ODE", "SDE", "DanceSDE", "Estimate", "EtudeError", "FlowMatchGDDIMScheduler", "FlowSDE",
    "GDDIMScheduler", "Measurement", "ModelSource", "Solver", "TrainConfig", "Trainer", "Window", "__version__", "load_config",
    "load_policy", "register_advantage", "register_kernel", "register_objective", "register_policy", "register_reward",
    "register_window", "replay", "reward_gap", "rollout", "sample", "score", "train",
]  # fmt: skip

_HOMES = {
    "etude.config": "TrainConfig load_config",
    "etude.errors": "EtudeError",
    "etude.measuring.gap": "reward_gap",
    "etude.measuring.pairs": "Measurement",
    "etude.measuring.statistics": "Estimate",
    "etude.policies": "load_policy",
    "etude.policies.source": "ModelSource",
    "etude.registry": "register_advantage register_kernel register_objective register_policy register_window",
    "etude.rewards": "register_reward=register score",
    "etude.sampling.kernels": "CPS DDIM DanceSDE FlowSDE GDDIM",
    "etude.sampling.replay": "replay",
    "etude.sampling.rollout": "rollout",
    "etude.sampling.sampler": "ODE SDE Window sample",
    "etude.sampling.schedulers": "FlowMatchGDDIMScheduler GDDIMScheduler",
    "etude.sampling.solvers": "Solver",
    "etude.training.run": "train",
    "etude.training.trainer": "Trainer",
    "diffusers": "SchedulerMixin",  # not public: diffusers looks for it beside the class of a saved scheduler
}
"""The public names of each module; after an equals sign the name there, where that differs."""
_PLACES = {
    public: (module, name or public)
    for module, names in _HOMES.items()
    for public, _, name in (each.partition("=") for each in names.split())
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'etude' has no attribute '{name}'")
    module, attribute = _PLACES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
