"""The numbers behind `etude theory`: one Gaussian reference, one quadratic reward, every result of the theory on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from etude.errors import EtudeError
from etude.theory.arrays import Array
from etude.theory.bounds import GapBounds, gap_bounds
from etude.theory.continuous_paths import VE, VP, Path, as_path
from etude.theory.exact_gap import continuous_gap, difference, gap_split, improvement, ode_and_sde, reward_gap
from etude.theory.finite_step import ScoreError, largest_ddim_eta
from etude.theory.levels import Levels, levels
from etude.theory.rates import asymptotic_series, fit_rate, natural, rates
from etude.theory.recommend import recommended_eta
from etude.theory.reward_functions import QuadraticReward
from etude.theory.score_error import law_in_y_with_error
from etude.theory.targets import Gaussian, GaussianMixture
from etude.theory.tilt import TiltedGaussian, tilt

HORIZONS = 60
STEP_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500)
# Two modes of a pretrained model, on the line: what the mixture rows are computed for.
EXAMPLE = GaussianMixture([0.6, 0.4], [-1.0, 1.5], 0.3)


@dataclass(frozen=True)
class Settings:
    """What a study is about; lists of one entry mean the line."""

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
        """N(mean, diag(variance))."""
        d = max(len(self.mean), len(self.variance), len(self.curvature), len(self.center), len(self.linear))
        if d == 1:
            return Gaussian(self.mean[0], self.variance[0])
        return Gaussian(_wide(self.mean, d, "--mean"), _wide(self.variance, d, "--variance"))

    def reward(self) -> QuadraticReward:
        """r(x) = -sum curvature (x - center)^2 + sum linear x."""
        return QuadraticReward(*(x[0] if len(x) == 1 else x for x in (self.curvature, self.center, self.linear)))

    def score_error(self) -> ScoreError:
        return ScoreError(self.bias, self.gain, self.white)


def _wide(values: list[float], d: int, name: str) -> Array:
    if len(values) not in (1, d):
        raise EtudeError(f"{name} has {len(values)} numbers but another option has {d}: give 1 or {d}.")
    return np.broadcast_to(np.asarray(values, dtype=np.float64), (d,))


def run(settings: Settings) -> dict[str, Any]:
    """Every section of the report, as plain numbers and lists (JSON)."""
    reference, reward = settings.reference(), settings.reward()
    reward.parts(reference.d)
    grids = {n: levels(settings.schedule, n, settings.spacing) for n in settings.steps}
    tuned = tilt(reference, reward, settings.beta)
    return {
        "settings": asdict(settings),
        "optimum": _optimum(reference, tuned, reward, settings),
        "horizon": {
            "ve": _horizon(tuned, VE(T=np.geomspace(1.0, settings.ve_horizon, HORIZONS)), reward, settings.etas),
            "vp": _horizon(tuned, VP(T=np.linspace(0.5, settings.vp_horizon, HORIZONS)), reward, settings.etas),
        },
        "steps": _steps(tuned, reward, settings),
        "split": _split(tuned, grids, reward, settings),
        "bounds": _bounds(tuned, reward, settings),
        **_mixture(reward, settings),
        "eta": [_eta(tuned, grids[n], settings) for n in settings.steps],
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
    """The continuous-time gap against the horizon, its asymptote, and the fitted rate of the last half."""
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
    """The N-step gap, score error included, against N; None where the kernel "ddim" has no such eta."""
    etas = np.array(settings.etas)
    gaps = []
    for n in STEP_COUNTS:
        grid = levels(settings.schedule, n, settings.spacing)
        legal = etas <= (largest_ddim_eta(grid) if settings.kernel == "ddim" else np.inf)
        laws = ode_and_sde(tuned, grid, np.where(legal, etas, 0.0), settings.kernel, score_error=settings.score_error())
        gaps.append([float(gap) if ok else None for gap, ok in zip(difference(reward, *laws), legal, strict=True)])
    return {
        "steps": list(STEP_COUNTS),
        "etas": settings.etas,
        "gap": [list(column) for column in zip(*gaps, strict=True)],
        "limit": _limit(tuned, reward, settings),
    }


def _limit(tuned: Gaussian, reward: QuadraticReward, settings: Settings) -> list[float] | None:
    """The gaps for N -> infinity, where a white error vanishes; None where the other errors have no closed form."""
    start, etas = as_path(settings.schedule).start(), np.array(settings.etas)
    error = ScoreError(settings.bias, settings.gain)
    if not error:
        return np.asarray(continuous_gap(tuned, start, reward, etas)).tolist()
    if not np.isfinite(start.V) or np.any(tuned.spectrum <= 0):
        return None
    ode, sde = (law_in_y_with_error(tuned, start, x, error) for x in (np.zeros_like(etas), etas))
    return np.asarray(difference(reward, ode, sde)).tolist()


def _split(
    tuned: Gaussian, grids: dict[int, Levels], reward: QuadraticReward, settings: Settings
) -> list[dict[str, Any]]:
    rows = []
    for n, grid in grids.items():
        for eta in settings.etas:
            parts = gap_split(tuned, grid, reward, eta, kernel=settings.kernel, score_error=settings.score_error())
            rows.append({"steps": n, "eta": eta, **parts.as_dict(), "dominant": parts.dominant})
    return rows


def _bounds(tuned: Gaussian, reward: QuadraticReward, settings: Settings) -> dict[str, Any]:
    """Every bound against the horizon, at the eta nearest to 1, for VE and VP."""
    eta = min((e for e in settings.etas if e > 0), key=lambda e: abs(e - 1.0), default=1.0)
    curves = {}
    for name, paths in (
        ("ve", [VE(T=float(T)) for T in np.geomspace(2.0, settings.ve_horizon, 20)]),
        ("vp", [VP(T=float(T)) for T in np.linspace(1.0, settings.vp_horizon, 20)]),
    ):
        found = [gap_bounds(tuned, path, reward, eta) for path in paths]
        curves[name] = {
            "T": [float(path.T) for path in paths],
            "gap": [abs(each.gap) for each in found],
            "bounds": {key: [_finite(each.bounds[key]) for each in found] for key in found[0].bounds},
            "best": [_finite(each.best) for each in found],
            "ratio": [_finite(each.ratio) for each in found],
        }
    return {"eta": eta, **curves}


def _mixture(reward: QuadraticReward, settings: Settings) -> dict[str, Any]:
    """Gap and bounds of the tilted two-mode example on the line, or why there are none: it is not the user's problem."""
    if settings.reference().d > 1:
        return {
            "mixture": [],
            "mixture_skipped": "The example of two modes is on the line: left out in more dimensions.",
        }
    try:
        return {"mixture": _mixture_rows(reward, settings), "mixture_skipped": None}
    except EtudeError as error:
        return {"mixture": [], "mixture_skipped": f"The example of two modes is left out: {error}"}


def _mixture_rows(reward: QuadraticReward, settings: Settings) -> list[dict[str, Any]]:
    tuned = tilt(EXAMPLE, reward, settings.beta)
    rows = []
    paths: list[tuple[str, Path]] = [("VE(T=10)", VE(T=10.0)), ("VP(T=4)", VP(T=4.0))]
    for name, path in paths:
        for eta in settings.etas:
            if eta > 0:
                rows.append({"path": name, "eta": eta, **_bounded(gap_bounds(tuned, path, reward, eta))})
    return rows


def _bounded(found: GapBounds) -> dict[str, Any]:
    return {
        "gap": found.gap,
        "error": found.gap_error,
        "best": _finite(found.best),
        "best_name": found.best_name,
        "ratio": _finite(found.ratio),
    }


def _eta(tuned: Gaussian, grid: Levels, settings: Settings) -> dict[str, Any]:
    top = 1.0 if settings.kernel == "euler-maruyama" else 3.0
    found = recommended_eta(tuned, grid, score_error=settings.score_error(), kernel=settings.kernel, eta_max=top)
    curves = {
        name: getattr(found, name).tolist() for name in ("etas", "errors", "prior", "discretisation", "score", "to_ode")
    }
    return {"steps": grid.steps, "eta": found.eta, "error": found.error, "at_limit": found.at_limit, **curves}


def _finite(value: float) -> float | None:
    """JSON has no infinity: None says that a bound does not apply."""
    return float(value) if np.isfinite(value) else None
