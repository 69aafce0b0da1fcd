"""Kernels as drop-in diffusers schedulers.

    pipe.scheduler = GDDIMScheduler.from_config(pipe.scheduler.config, eta=1.2)             Stable Diffusion 1.x, 2.x, XL
    pipe.scheduler = FlowMatchGDDIMScheduler.from_config(pipe.scheduler.config, eta=1.2)    Stable Diffusion 3, FLUX

**eta lives in the config, and `step` has no eta argument.** The Stable Diffusion pipelines inspect
the signature of `scheduler.step`. If it has an `eta`, they pass their own, 0 by default, so a
scheduler with that argument would silently sample the ODE. An eta in the config is also saved and
loaded with the pipeline.
"""

from etude.sampling.schedulers.flow_match import FlowMatchGDDIMScheduler
from etude.sampling.schedulers.vp import GDDIMScheduler

__all__ = ["FlowMatchGDDIMScheduler", "GDDIMScheduler"]

for _scheduler in (GDDIMScheduler, FlowMatchGDDIMScheduler):
    _scheduler.__module__ = "etude"  # what a saved pipeline names, and imports when it is loaded
