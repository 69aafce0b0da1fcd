"""The numbers of `etude theory`: every result on one Gaussian reference and quadratic reward."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from etude.errors import EtudeError
from etude.theory.arrays import Array
from etude.theory.bounds import gap_bounds, gap_bounds_at
from etude.theory.continuous_paths import VE, VP, ContinuousPath, as_path
from etude.theory.exact_gap import continuous_gap, gap_split, improvement, reward_difference, reward_gap, step_gap
from etude.theory.general_bound import general_bound_rows
from etude.theory.laws import ScoreError, law_in_y_with_error
from etude.theory.levels import Levels, levels
from etude.theory.optima import TiltedGaussian, tilt
from etude.theory.rates import asymptotic_series, fit_rate, natural, rates
from etude.theory.recommend import recommended_eta
from etude.theory.reward_functions import QuadraticReward
from etude.theory.sampler_steps import EULER_MARUYAMA, largest_eta, sampler_steps, short_step_etas
from etude.theory.targets import Gaussian, GaussianMixture

HORIZONS = 60
STEP_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500)
EXAMPLE = GaussianMixture([0.6, 0.4], [-1.0, 1.5], 0.3)
"""Two modes of a pretrained model on the line, for the rows of the mixture."""


@dataclass(frozen=True)
class Settings:
    """The reference, the reward, the samplers and the score error of one report.

    Lists of one entry mean the line. `etas` are in the kernel's unit with N steps, and in gDDIM's
    in continuous time.
    """

    mean: list[float] = field(default_factory=lambda: [1.0])
    variance: list[float] = field(default_factory=lambda: [1.0])
    curvature: list[float] = field(default_factory=lambda: [1.0])
    center: list[float] = field(default_factory=lambda: [2.0])
    linear: list[float] = field(default_factory=lambda: [0.0])
    beta: float = 2.0
    etas: list[float] = field(default_factory=lambda: [0.5, 1.0, 1.5])
    steps: list[int] = field(default_factory=lambda: [10, 20, 50])
    schedule: str = "sd"
    spacing: str = "trailing"
    kernel: str = "gddim"
    bias: float = 0.0
    gain: float = 0.0
    white: float = 0.0
    ve_horizon: float = 100.0
    vp_horizon: float = 12.0

    def reference(self) -> Gaussian:
        """Make the law N(mean, diag(variance))."""
        d = max(len(self.mean), len(self.variance), len(self.curvature), len(self.center), len(self.linear))
        if d == 1:
            return Gaussian(self.mean[0], self.variance[0])
        return Gaussian(_wide(self.mean, d, "--mean"), _wide(self.variance, d, "--variance"))

    def reward(self) -> QuadraticReward:
        """Make the reward r(x) = -sum curvature (x - center)^2 + sum linear x."""
        return QuadraticReward(*(x[0] if len(x) == 1 else x for x in (self.curvature, self.center, self.linear)))

    def score_error(self) -> ScoreError:
        """Make the score error of these numbers."""
        return ScoreError(self.bias, self.gain, self.white)


def _wide(values: list[float], d: int, name: str) -> Array:
    if len(values) not in (1, d):
        raise EtudeError(f"{name} has {len(values)} numbers but another option has {d}: give 1 or {d}.")
    return np.broadcast_to(np.asarray(values, dtype=np.float64), (d,))


def run(settings: Settings) -> dict[str, Any]:
    """Compute every section of the report as plain numbers and lists (JSON)."""
    reference, reward = settings.reference(), settings.reward()
    reward.parts(reference.d)
    grids = [levels(settings.schedule, n, settings.spacing) for n in settings.steps]
    tuned = tilt(reference, reward, settings.beta)
    return {
        "settings": asdict(settings),
        "optimum": _optimum(reference, tuned, reward, settings),
        "horizon": {
            "ve": _horizon(tuned, VE(T=np.geomspace(1.0, settings.ve_horizon, HORIZONS)), reward, settings.etas),
            "vp": _horizon(tuned, VP(T=np.linspace(0.5, settings.vp_horizon, HORIZONS)), reward, settings.etas),
        },
        "steps": _steps(tuned, reward, settings),
        "split": [_split(tuned, grid, reward, eta, settings) for grid in grids for eta in settings.etas],
        "bounds": _bounds(tuned, reward, settings),
        "general_bound": [
            {key: _finite(value) if isinstance(value, float) else value for key, value in row.items()}
            for row in general_bound_rows(tuned, settings.etas)
        ],
        **_mixture(reward, settings),
        "eta": [_eta(tuned, grid, settings) for grid in grids],
    }


def _optimum(reference: Gaussian, tuned: TiltedGaussian, reward: QuadraticReward, settings: Settings) -> dict[str, Any]:
    path = as_path(settings.schedule)
    return {
        "reference_mean": reference.mu.tolist(),
        "reference_variance": reference.spectrum.tolist(),
        "mean": tuned.mu.tolist(),
        "variance": np.diagonal(tuned.matrix).tolist(),
        "log_normalizer": tuned.log_normalizer,
        "improvement_exact": reward.expected(tuned) - reward.expected(reference),
        "improvement_ode": improvement(reference, path, reward, settings.beta),
    }


def _horizon(tuned: Gaussian, path: VE | VP, reward: QuadraticReward, etas: list[float]) -> dict[str, Any]:
    """Compute the gap against the horizon, its asymptote, and the rate of the last quarter."""
    gaps = reward_gap(tuned, path, reward, np.array(etas)[:, None])
    name, variable = natural(path)
    rows = []
    for eta, gap in zip(etas, gaps, strict=True):
        row: dict[str, Any] = {"eta": eta, "gap": gap.tolist()}
        if eta > 0:
            rate = rates(tuned, path, reward, eta)
            row |= {"asymptote": rate(path).tolist(), "series": asymptotic_series(tuned, path, reward, eta).tolist()}
            row |= {"exponent": _finite(rate.exponent), "constant": rate.constant, "regime": rate.regime}
            row["fitted_exponent"] = fit_rate(variable, gap, 0.25).exponent if np.all(gap != 0) else None
        rows.append(row)
    return {"T": np.asarray(path.T).tolist(), "variable": name, "etas": rows}


def _steps(tuned: Gaussian, reward: QuadraticReward, settings: Settings) -> dict[str, Any]:
    """Compute the N-step gap, score error included; None where the kernel has no such eta."""
    etas = np.array(settings.etas)
    gaps = []
    for n in STEP_COUNTS:
        grid = levels(settings.schedule, n, settings.spacing)
        legal = etas <= largest_eta(grid, settings.kernel)
        sampler = sampler_steps(grid, np.where(legal, etas, 0.0), kernel=settings.kernel)
        values = step_gap(tuned, reward, sampler, score_error=settings.score_error())
        gaps.append([float(gap) if ok else None for gap, ok in zip(values, legal, strict=True)])
    return {
        "steps": list(STEP_COUNTS),
        "etas": settings.etas,
        "gap": [list(column) for column in zip(*gaps, strict=True)],
        "limit": _limit(tuned, reward, settings),
    }


def _limit(tuned: Gaussian, reward: QuadraticReward, settings: Settings) -> list[float] | None:
    """Compute the gaps for N -> infinity, where a white error vanishes.

    None: the other errors have no closed form, or the short steps are of no finite or no one eta.
    """
    start, error = as_path(settings.schedule).start(), ScoreError(settings.bias, settings.gain)
    by_level = short_step_etas(settings.kernel, settings.etas, levels(settings.schedule, 8))
    etas = by_level[:, 0]
    if not np.all(np.isfinite(by_level)) or (np.isfinite(start.V) and not np.allclose(by_level, etas[:, None])):
        return None
    if not error:
        return np.asarray(continuous_gap(tuned, start, reward, etas)).tolist()
    if not np.isfinite(start.V) or np.any(tuned.spectrum <= 0):
        return None
    ode, sde = (law_in_y_with_error(tuned, start, x, error) for x in (np.zeros_like(etas), etas))
    return np.asarray(reward_difference(reward, ode, sde)).tolist()


def _split(tuned: Gaussian, grid: Levels, reward: QuadraticReward, eta: float, settings: Settings) -> dict[str, Any]:
    parts = gap_split(tuned, grid, reward, eta, kernel=settings.kernel, score_error=settings.score_error())
    return {"steps": grid.steps, "eta": eta, **parts.as_dict(), "dominant": parts.dominant}


def _bounds(tuned: Gaussian, reward: QuadraticReward, settings: Settings) -> dict[str, Any]:
    """Compute every bound against the horizon, at the eta nearest to 1, for VE and VP."""
    eta = min((e for e in settings.etas if e > 0), key=lambda e: abs(e - 1.0), default=1.0)
    curves = {}
    horizons = {"ve": np.geomspace(2.0, settings.ve_horizon, 20), "vp": np.linspace(1.0, settings.vp_horizon, 20)}
    for name, path in (("ve", VE), ("vp", VP)):
        at = [gap_bounds(tuned, path(T=float(T)), reward, eta) for T in horizons[name]]
        curves[name] = {
            "T": horizons[name].tolist(),
            "gap": [abs(each.gap) for each in at],
            "bounds": {key: [_finite(each.bounds[key]) for each in at] for key in at[0].bounds},
            "best": [_finite(each.best) for each in at],
            "ratio": [_finite(each.ratio) for each in at],
        }
    return {"eta": eta, **curves}


def _mixture(reward: QuadraticReward, settings: Settings) -> dict[str, Any]:
    """Compute gap and bounds of the tilted two-mode example, or say why there are none."""
    if settings.reference().d > 1:
        skipped = "The example of two modes is on the line: left out in more dimensions."
        return {"mixture": [], "mixture_skipped": skipped}
    rows, etas = [], [eta for eta in settings.etas if eta > 0]
    paths: dict[str, ContinuousPath] = {"VE(T=10)": VE(T=10.0), "VP(T=4)": VP(T=4.0)} if etas else {}
    try:
        tuned = tilt(EXAMPLE, reward, settings.beta)
        for name, path in paths.items():
            for eta, found in zip(etas, gap_bounds_at(tuned, path, reward, etas), strict=True):
                best = {"best": _finite(found.best), "best_name": found.best_name, "ratio": _finite(found.ratio)}
                rows.append({"path": name, "eta": eta, "gap": found.gap, "error": found.gap_error, **best})
    except EtudeError as error:
        return {"mixture": [], "mixture_skipped": f"The example of two modes is left out: {error}"}
    return {"mixture": rows, "mixture_skipped": None}


def _eta(tuned: Gaussian, grid: Levels, settings: Settings) -> dict[str, Any]:
    top = 1.0 if settings.kernel == EULER_MARUYAMA else 3.0
    best = recommended_eta(tuned, grid, score_error=settings.score_error(), kernel=settings.kernel, eta_max=top)
    names = ("eta", "error", "at_limit", "etas", "errors", "prior", "discretisation", "score", "to_ode")
    values = {name: getattr(best, name) for name in names}
    return {"steps": grid.steps, **{k: x.tolist() if isinstance(x, np.ndarray) else x for k, x in values.items()}}


def _finite(value: float) -> float | None:
    """Return the value, or None for infinity, which JSON lacks."""
    return float(value) if np.isfinite(value) else None
