"""The levels (a, s) of an N-step sampler, from a path, a named schedule or an explicit grid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from etude.errors import EtudeError, unknown
from etude.theory.arrays import Array, Numbers, array, positive, require, whole
from etude.theory.continuous_paths import VP, ContinuousPath, Start, as_path

TABLE_SPACINGS = ("trailing", "leading", "linspace")
PATH_SPACINGS = ("trailing", "log-snr", "karras")


@dataclass(frozen=True)
class Levels:
    """Levels of a sampler, from noise to data; step i goes from (a[i], s[i]) to (a[i+1], s[i+1]).

    The sampler starts from N(0, prior_variance I). Shapes are [N + 1, ...]; the trailing axes are
    those of the path's horizon. Every function that takes a schedule takes `Levels` too.
    """

    a: Array
    s: Array
    prior_variance: Array

    spacings: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys(TABLE_SPACINGS + PATH_SPACINGS))

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
            return Start(V=np.asarray((s / a) ** 2), excess=np.where(a > 0, excess, np.inf), a=a)


def levels(
    schedule: Any, steps: int | None = None, spacing: str = "trailing", prior_variance: Numbers | None = None
) -> Levels:
    """Return the levels of a sampler.

    Every grid made from a path ends at the data, s = 0. An explicit grid may end anywhere.

    Args:
        schedule: "sd" or "ddpm" (tables of 1000 levels), "flow", a `ContinuousPath`, or a grid. A
            grid is `Levels`, a pair (a, s) of arrays [N + 1], or an object with attributes `a` and
            `s` of that shape, such as a sampler's `Grid` or `StepTable`; its levels run from noise
            to data.
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
    if isinstance(schedule, (str, ContinuousPath)):
        if steps is None:
            raise EtudeError("steps is missing: say how many the sampler takes on this schedule, for example steps=50.")
        grid = _path_levels(as_path(schedule), whole(steps, "steps"), str(spacing))
    else:
        grid = _grid_levels(schedule)
        if steps is not None and whole(steps, "steps") != grid.steps:
            raise EtudeError(f"steps is {steps}, but the grid has {grid.steps} steps: leave steps out.")
    if prior_variance is None:
        return grid
    return Levels(grid.a, grid.s, np.broadcast_to(positive(prior_variance, "prior_variance"), grid.a.shape[1:]))


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
    if np.any(s[1:] * a[:-1] >= s[:-1] * a[1:]):
        step = int(np.argmax(s[1:] * a[:-1] >= s[:-1] * a[1:]))
        raise EtudeError(f"the grid's s/a does not fall at step {step}: list the levels from noise to data.")
    return Levels(a, s, np.asarray(s[0] ** 2 if a[0] == 1.0 else 1.0))


@lru_cache(maxsize=256)
def _path_levels(path: ContinuousPath, steps: int, spacing: str) -> Levels:
    """Compute the levels on a path; paths do not change, so the cache knows them by identity."""
    if spacing not in Levels.spacings:
        raise unknown("spacing", spacing, Levels.spacings)
    if isinstance(path, VP) and path.alphas_cumprod is not None and spacing in TABLE_SPACINGS:
        return _table_levels(path.alphas_cumprod, steps, spacing)
    if spacing not in PATH_SPACINGS:
        raise EtudeError(
            f"spacing '{spacing}' is defined for the trained tables 'sd' and 'ddpm' only: for {path!r} use one of "
            f"{', '.join(PATH_SPACINGS)}."
        )
    if spacing == "trailing":
        share = np.linspace(1.0, 0.0, steps + 1).reshape((-1,) + (1,) * path.end.ndim)
        a, s = path.a(path.end * share), path.s(path.end * share)
    else:
        a, s = path.at_level(_geometric(path, steps) if spacing == "log-snr" else _karras(path, steps))
    return Levels(a, s, np.broadcast_to(path.prior_variance, a.shape[1:]))


def _table_levels(alphas_cumprod: Array, steps: int, spacing: str) -> Levels:
    """Compute the levels of a trained table at the sampler's own timesteps, and a clean end."""
    import torch

    from etude.sampling.paths import VPPath

    path = VPPath(torch.from_numpy(alphas_cumprod), 1.0, timestep_spacing=spacing, steps_offset=1)
    return _grid_levels(path.grid(steps))


def _top(path: ContinuousPath) -> Array:
    v = path.v(path.end)
    if not np.all(np.isfinite(v)):
        raise EtudeError(
            "this path starts at a = 0, where log(s/a) is infinite: use spacing 'trailing' or a delta above 0."
        )
    return v


def _geometric(path: ContinuousPath, steps: int, span: float = 1e-3) -> Array:
    """Compute s/a, uniform in log(s/a) from the top level down to `span`, then 0."""
    top = _top(path)
    if np.any(top <= span):
        raise EtudeError(f"spacing 'log-snr' needs a path noisier than s/a = {span:g}: raise T.")
    share = np.linspace(0.0, 1.0, steps).reshape((-1,) + (1,) * top.ndim)
    return np.concatenate([top * (span / top) ** share, np.zeros((1, *top.shape))])


def _karras(path: ContinuousPath, steps: int, low: float = 0.002, rho: float = 7.0) -> Array:
    """Compute EDM's levels in s/a (arXiv 2206.00364, eq. 5), from the top down to `low`, then 0."""
    top = _top(path)
    share = np.linspace(0.0, 1.0, steps).reshape((-1,) + (1,) * top.ndim)
    ramp = (top ** (1 / rho) + share * (low ** (1 / rho) - top ** (1 / rho))) ** rho
    return np.concatenate([ramp, np.zeros((1, *top.shape))])
