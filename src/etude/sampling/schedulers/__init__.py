"""Kernels as drop-in diffusers schedulers.

    pipe.scheduler = GDDIMScheduler.from_config(pipe.scheduler.config, eta=1.2)             Stable Diffusion 1.x, 2.x, XL
    pipe.scheduler = FlowMatchGDDIMScheduler.from_config(pipe.scheduler.config, eta=1.2)    Stable Diffusion 3, FLUX

**eta lives in the config, and `step` has no eta argument.** The Stable Diffusion pipelines look at
the signature of `scheduler.step` and, where it has an `eta`, pass their own, whose default is 0. A
scheduler with eta there would silently sample the ODE. In the config eta is also saved with the
pipeline and loads with it.

A saved pipeline names its scheduler `["etude", "GDDIMScheduler"]`, whichever file of the package
the class is in.
"""

from __future__ import annotations

from etude.sampling.schedulers.flow_match import FlowMatchGDDIMScheduler
from etude.sampling.schedulers.vp import GDDIMScheduler

__all__ = ["FlowMatchGDDIMScheduler", "GDDIMScheduler"]

for _scheduler in (GDDIMScheduler, FlowMatchGDDIMScheduler):
    _scheduler.__module__ = "etude"  # what a saved pipeline names, and imports when it is loaded
