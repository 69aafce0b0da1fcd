"""Kernels as drop-in diffusers schedulers.

    pipe.scheduler = GDDIMScheduler.from_config(pipe.scheduler.config, eta=1.2)             Stable Diffusion 1.x, 2.x, XL
    pipe.scheduler = FlowMatchGDDIMScheduler.from_config(pipe.scheduler.config, eta=1.2)    Stable Diffusion 3, FLUX

**eta lives in the config.** It is saved and loaded with the pipeline. The Stable Diffusion pipelines
pass `step` an eta of their own, 0 where the caller gives none, so 0 leaves the config's as it is;
any other number is refused unless it is the config's (`pipe(..., eta=0.7)` would otherwise do
nothing).
"""

from etude.sampling.schedulers.flow_match import FlowMatchGDDIMScheduler
from etude.sampling.schedulers.vp import GDDIMScheduler

__all__ = ["FlowMatchGDDIMScheduler", "GDDIMScheduler"]

for _scheduler in (GDDIMScheduler, FlowMatchGDDIMScheduler):
    _scheduler.__module__ = "etude"  # what a saved pipeline names, and imports when it is loaded
