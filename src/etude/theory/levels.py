"""The levels (a, s) of an N-step sampler, from a path, a named schedule or an explicit grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from etude.errors import EtudeError, unknown
from etude.theory.arrays import Array, Numbers, array, positive, require, whole
from etude.theory.continuous_paths import VP, ContinuousPath, Start, as_path, is_path

TABLE_SPACINGS = ("trailing", "leading", "linspace")
PATH_SPACINGS = ("trailing", "log-snr", "karras")
SPACINGS = tuple(dict.fromkeys(TABLE_SPACINGS + PATH_SPACINGS))


@dataclass(frozen=True)
class Levels:
    """Levels of a sampler, from noise to data; step i goes from (a[i], s[i]) to (a[i+1], s[i+1]).

    The sampler starts from N(0, prior_variance I). Shapes are [N + 1, ...]; the trailing axes are
    those of the path's horizon. Every function that takes a schedule takes `Levels` too.
    """

    a: Array
    s: Array
    prior_variance: Array

    @property
    def steps(self) -> int:
        """Number of steps, N."""
        return int(self.a.shape[0]) - 1

    @property
    def v(self) -> Array:
        """Noise-to-signal ratios s/a, infinite where a = 0."""
        with np.errstate(divide="ignore"):
            return self.s / self.a

    def start(self) -> Start:
        """Return the start of the continuous-time sampler that begins at the first level."""
        a, s = self.a[0], self.s[0]
        with np.errstate(divide="ignore", invalid="ignore"):
            excess = np.asarray((self.prior_variance - s**2) / a**2)
            return Start(V=np.asarray((s / a) ** 2), excess=np.where(a > 0, excess, np.inf))


def levels(
    schedule: Any, steps: int | None = None, spacing: str = "trailing", prior_variance: Numbers | None = None
) -> Levels:
    """Return the levels of a sampler; on a path they end at the data, s = 0.

    Args:
        schedule: "sd" or "ddpm" (tables of 1000 levels), "flow", a `ContinuousPath`, or a grid from
            noise to data. A grid is `Levels`, a pair (a, s) of arrays [N + 1], or an object with
            attributes `a` and `s` of that shape, such as a sampler's `Grid` or `StepTable`.
        steps: N. A grid brings its own.
        spacing: on tables "trailing" (ends at the last trained level), "leading" (diffusers'
            default, with offset 1) or "linspace"; on paths "trailing" (uniform in t from T to 0),
            "log-snr" (uniform in log(s/a)) or "karras" (rho = 7).
        prior_variance: variance of the start. Default: the path's own; on a grid s[0]^2 where a[0]
            = 1, else 1.

    Raises:
        EtudeError: steps are missing, do not fit the grid or exceed the table, the spacing is
            unknown or not defined for the path, the grid's s/a does not fall, or a `StepTable` ends
            in a compressed tail.
    """
    if is_path(schedule):
        if steps is None:
            raise EtudeError("steps is missing: say how many the sampler takes on this schedule, for example steps=50.")
        grid = _path_levels(as_path(schedule), whole(steps, "steps"), str(spacing))
    else:
        grid = _grid_levels(schedule)
        if steps is not None and whole(steps, "steps") != grid.steps:
            raise EtudeError(f"steps is {steps}, but the grid has {grid.steps} steps: leave steps out.")
    if prior_variance is None:
        return grid
    variance = np.broadcast_to(positive(prior_variance, "prior_variance"), grid.a.shape[1:])
    return replace(grid, prior_variance=variance)


def explicit(a: Numbers, s: Numbers) -> Levels:
    """Make levels from their two lists, each [N + 1]."""
    return _grid_levels((array(a, "the grid's a"), array(s, "the grid's s")))


def _grid_levels(grid: Any) -> Levels:
    if isinstance(grid, Levels):
        return grid
    if getattr(grid, "tail", None) is not None:
        raise EtudeError(
            "the table ends in a compressed tail of DPM-Solver++(2M) steps, whose law is not computed: tabulate a plan "
            "without one."
        )
    pair = (grid.a, grid.s) if hasattr(grid, "a") and hasattr(grid, "s") else grid
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise EtudeError(
            f"{type(grid).__name__} is not a schedule: pass 'sd', 'ddpm', 'flow', a path, or a pair (a, s) of arrays [N + 1]."
        )
    a = require(pair[0], "the grid's a", lambda x: (x >= 0) & (x <= 1), "between 0 and 1")
    s = require(pair[1], "the grid's s", lambda x: x >= 0, "zero or more")
    if a.ndim != 1 or a.shape != s.shape or a.size < 2:
        raise EtudeError(f"the grid's a {a.shape} and s {s.shape} do not fit: pass two lists of the same N + 1 levels.")
    rises = s[1:] * a[:-1] >= s[:-1] * a[1:]
    if np.any(rises):
        raise EtudeError(f"the grid's s/a does not fall at step {np.argmax(rises)}: list levels from noise to data.")
    return Levels(a, s, np.asarray(s[0] ** 2 if a[0] == 1.0 else 1.0))


@lru_cache(maxsize=256)
def _path_levels(path: ContinuousPath, steps: int, spacing: str) -> Levels:
    """Compute the levels on a path; paths do not change, so the cache knows them by identity."""
    if spacing not in SPACINGS:
        raise unknown("spacing", spacing, SPACINGS)
    if isinstance(path, VP) and path.alphas_cumprod is not None and spacing in TABLE_SPACINGS:
        import torch

        from etude.sampling.paths import VPPath

        table = torch.from_numpy(path.alphas_cumprod)
        return _grid_levels(VPPath(table, 1.0, timestep_spacing=spacing, steps_offset=1).grid(steps))
    if spacing not in PATH_SPACINGS:
        raise EtudeError(
            f"spacing '{spacing}' is defined for the trained tables 'sd' and 'ddpm' only: for {path!r} use one of "
            f"{', '.join(PATH_SPACINGS)}."
        )
    if spacing == "trailing":
        t = path.T * np.linspace(1.0, 0.0, steps + 1).reshape((-1,) + (1,) * path.T.ndim)
        a, s = path.a(t), path.s(t)
    else:
        a, s = path.at_level(_ratios(path, steps, spacing))
    return Levels(a, s, np.broadcast_to(path.prior_variance, a.shape[1:]))


def _ratios(path: ContinuousPath, steps: int, spacing: str) -> Array:
    """Compute falling s/a, even in log(s/a) or EDM's (arXiv 2206.00364, eq. 5), and a last 0."""
    top, least, rho = path.v(path.T), 1e-3 if spacing == "log-snr" else 0.002, 7.0
    if not np.all(np.isfinite(top)):
        raise EtudeError(
            "this path starts at a = 0, with log(s/a) infinite: use spacing 'trailing' or a delta above 0."
        )
    share = np.linspace(0.0, 1.0, steps).reshape((-1,) + (1,) * top.ndim)
    if spacing == "karras":
        v = (top ** (1 / rho) + share * (least ** (1 / rho) - top ** (1 / rho))) ** rho
    elif np.any(top <= least):
        raise EtudeError(f"spacing 'log-snr' needs a path noisier than s/a = {least:g}: raise T.")
    else:
        v = top * (least / top) ** share
    return np.concatenate([v, np.zeros((1, *top.shape))])
