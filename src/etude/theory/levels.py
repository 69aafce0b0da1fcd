"""The levels (a, s) that an N-step sampler visits, from a path, a named schedule or an explicit grid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from etude.errors import EtudeError, unknown
from etude.theory.arrays import Array, Numbers, array, checked, positive, whole
from etude.theory.continuous_paths import VP, Path, Start, as_path

TABLE_SPACINGS = ("trailing", "leading", "linspace")
PATH_SPACINGS = ("trailing", "log-snr", "karras")


@dataclass(frozen=True)
class Levels:
    """Step i goes from (a[i], s[i]) to (a[i+1], s[i+1]); the sampler starts from N(0, prior_variance I).

    Shapes [N + 1, ...]; the trailing axes are those of the path's horizon. Works as an explicit grid wherever a schedule does.
    """

    a: Array
    s: Array
    prior_variance: Array

    spacings: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys(TABLE_SPACINGS + PATH_SPACINGS))

    @property
    def steps(self) -> int:
        return int(self.a.shape[0]) - 1

    @property
    def v(self) -> Array:
        """Noise-to-signal ratios s/a, infinite where a = 0."""
        with np.errstate(divide="ignore"):
            return self.s / self.a

    def start(self) -> Start:
        """The continuous-time sampler that starts where this one does."""
        a, s = self.a[0], self.s[0]
        with np.errstate(divide="ignore", invalid="ignore"):
            excess = np.asarray((self.prior_variance - s**2) / a**2)
            return Start(V=np.asarray((s / a) ** 2), excess=np.where(a > 0, excess, np.inf), a=a)


def levels(
    schedule: Any, steps: int | None = None, spacing: str = "trailing", prior_variance: Numbers | None = None
) -> Levels:
    """The grid of a sampler.

    schedule   "sd", "ddpm" (tables of 1000 levels), "flow", a `Path`, or a grid: `Levels`, a pair (a, s) of arrays
               [N + 1], or any object with attributes `a` and `s` of that shape (levels from noise to data)
    steps      N; a grid brings its own
    spacing    tables: "trailing" (ends at the last trained level), "leading" (diffusers' default, offset 1), "linspace";
               paths: "trailing" (uniform in t from T to 0), "log-snr" (uniform in log(s/a)), "karras" (rho = 7)
    prior_variance    of the start; defaults to the path's own, to s[0]^2 on a grid with a[0] = 1, and to 1 on other grids

    Every grid made here ends at the data, s = 0. An explicit grid may end anywhere.
    """
    if isinstance(schedule, (str, Path)):
        if steps is None:
            raise EtudeError("steps is missing: say how many the sampler takes on this schedule, for example steps=50.")
        grid = _of_path(as_path(schedule), whole(steps, "steps"), str(spacing))
    else:
        grid = _explicit(schedule)
        if steps is not None and whole(steps, "steps") != grid.steps:
            raise EtudeError(f"steps is {steps}, but the grid has {grid.steps} steps: leave steps out.")
    if prior_variance is None:
        return grid
    return Levels(grid.a, grid.s, np.broadcast_to(positive(prior_variance, "prior_variance"), grid.a.shape[1:]))


def _explicit(grid: Any) -> Levels:
    if isinstance(grid, Levels):
        return grid
    pair = (grid.a, grid.s) if hasattr(grid, "a") and hasattr(grid, "s") else grid
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise EtudeError(
            f"{type(grid).__name__} is not a schedule: pass 'sd', 'ddpm', 'flow', a path, or a pair (a, s) of arrays [N + 1]."
        )
    a = checked(pair[0], "the grid's a", lambda x: (x >= 0) & (x <= 1), "between 0 and 1")
    s = checked(pair[1], "the grid's s", lambda x: x >= 0, "zero or more")
    if a.ndim != 1 or a.shape != s.shape or a.size < 2:
        raise EtudeError(f"the grid's a {a.shape} and s {s.shape} do not fit: pass two lists of the same N + 1 levels.")
    if np.any(s[1:] * a[:-1] >= s[:-1] * a[1:]):
        step = int(np.argmax(s[1:] * a[:-1] >= s[:-1] * a[1:]))
        raise EtudeError(f"the grid's s/a does not fall at step {step}: list the levels from noise to data.")
    return Levels(a, s, np.asarray(s[0] ** 2 if a[0] == 1.0 else 1.0))


@lru_cache(maxsize=256)
def _of_path(path: Path, steps: int, spacing: str) -> Levels:
    """The grid of this very path object (paths do not change once made, and compare by identity)."""
    return _from_path(path, steps, spacing)


def _from_path(path: Path, steps: int, spacing: str) -> Levels:
    if spacing not in Levels.spacings:
        raise unknown("spacing", str(spacing), Levels.spacings)
    if isinstance(path, VP) and path.alphas_cumprod is not None and spacing in TABLE_SPACINGS:
        return _from_table(path.alphas_cumprod, steps, spacing)
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


def _from_table(alphas_cumprod: Array, steps: int, spacing: str) -> Levels:
    """diffusers' choices of timesteps (scheduling_ddim.py), then the clean image."""
    K = alphas_cumprod.size
    if steps > K:
        raise EtudeError(f"steps is {steps}, but the table has {K} levels: use at most {K}.")
    if spacing == "trailing":
        index = np.round(np.arange(K, 0, -K / steps)).astype(int)[:steps] - 1
    elif spacing == "leading":
        index = np.minimum(np.arange(steps)[::-1] * (K // steps) + 1, K - 1)
    else:
        index = np.round(np.linspace(0, K - 1, steps))[::-1].astype(int) if steps > 1 else np.array([K - 1])
    abar = np.append(alphas_cumprod[index], 1.0)
    return Levels(np.sqrt(abar), np.sqrt(1.0 - abar), np.asarray(1.0))


def _top(path: Path) -> Array:
    v = path.v(path.end)
    if not np.all(np.isfinite(v)):
        raise EtudeError(
            "this path starts at a = 0, where log(s/a) is infinite: use spacing 'trailing' or a delta above 0."
        )
    return v


def _geometric(path: Path, steps: int, span: float = 1e-3) -> Array:
    """Uniform in log(s/a) from the top level down to `span` (in units of the data), then 0."""
    top = _top(path)
    if np.any(top <= span):
        raise EtudeError(f"spacing 'log-snr' needs a path noisier than s/a = {span:g}: raise T.")
    share = np.linspace(0.0, 1.0, steps).reshape((-1,) + (1,) * top.ndim)
    return np.concatenate([top * (span / top) ** share, np.zeros((1, *top.shape))])


def _karras(path: Path, steps: int, low: float = 0.002, rho: float = 7.0) -> Array:
    """EDM's levels (arXiv 2206.00364, eq. 5) in v = s/a, from the top level down to 0.002, then 0."""
    top = _top(path)
    share = np.linspace(0.0, 1.0, steps).reshape((-1,) + (1,) * top.ndim)
    ramp = (top ** (1 / rho) + share * (low ** (1 / rho) - top ** (1 / rho))) ** rho
    return np.concatenate([ramp, np.zeros((1, *top.shape))])


def explicit(a: Numbers, s: Numbers) -> Levels:
    """A grid from its two lists."""
    return _explicit((array(a, "the grid's a"), array(s, "the grid's s")))
