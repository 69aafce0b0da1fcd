"""Kernels as drop-in diffusers schedulers.

    pipe.scheduler = GDDIMScheduler.from_config(pipe.scheduler.config, eta=1.2)             Stable Diffusion 1.x, 2.x, XL
    pipe.scheduler = FlowMatchGDDIMScheduler.from_config(pipe.scheduler.config, eta=1.2)    Stable Diffusion 3, FLUX

**eta lives in the config, and `step` has no eta argument.** The Stable Diffusion pipelines look at the signature of
`scheduler.step` and, where it has an `eta`, pass their own, whose default is 0: a scheduler that took eta there would
silently sample the ODE. In the config it is also saved with the pipeline and loads with it.
"""

from __future__ import annotations

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from etude.sampling.schedulers.flow_match import FlowMatchGDDIMScheduler
from etude.sampling.schedulers.vp import GDDIMScheduler

# A saved pipeline names its scheduler's module, from which it is loaded if SchedulerMixin is found beside it. It is to be
# this package, whatever its files.
__all__ = ["FlowMatchGDDIMScheduler", "GDDIMScheduler", "SchedulerMixin"]

for _scheduler in (GDDIMScheduler, FlowMatchGDDIMScheduler):
    _scheduler.__module__ = __name__
