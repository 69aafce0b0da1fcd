"""The exact reward gap between stochastic and deterministic samplers (arXiv 2510.10767)."""

from __future__ import annotations

from etude.theory.along_training import (
    GapAlongTraining,
    Slope,
    gap_along_training,
    gap_at_limit,
    gap_slope,
    level_of_equal_response,
)
from etude.theory.arrays import Approximation
from etude.theory.bounds import GapBounds, finite_step_bound, gap_bounds
from etude.theory.continuous_paths import VE, VP, ContinuousPath, RectifiedFlow
from etude.theory.exact_gap import GapSplit, gap_split, improvement, reward_gap
from etude.theory.laws import (
    ScoreError,
    finite_step_law,
    score_bias_shift,
    terminal_law,
    terminal_law_with_error,
    white_variance,
)
from etude.theory.levels import Levels, levels
from etude.theory.line_training import LineTrainingProblem
from etude.theory.mixture import mixture_gap, simulate_gap
from etude.theory.optima import MeanPolicy, critical_beta, mean_policy_optimum, path_kl_optimum, tilt
from etude.theory.rates import Rate, asymptotic_series, fit_rate, own_error_rates, rates
from etude.theory.recommend import Recommendation, recommended_eta
from etude.theory.reward_functions import LipschitzReward, QuadraticReward
from etude.theory.targets import Gaussian, GaussianMixture, kl, w2
from etude.theory.training_problem import TrainingProblem

__all__ = [
    "VE",
    "VP",
    "Approximation",
    "ContinuousPath",
    "GapAlongTraining",
    "GapBounds",
    "GapSplit",
    "Gaussian",
    "GaussianMixture",
    "Levels",
    "LineTrainingProblem",
    "LipschitzReward",
    "MeanPolicy",
    "QuadraticReward",
    "Rate",
    "Recommendation",
    "RectifiedFlow",
    "ScoreError",
    "Slope",
    "TrainingProblem",
    "asymptotic_series",
    "critical_beta",
    "finite_step_bound",
    "finite_step_law",
    "fit_rate",
    "gap_along_training",
    "gap_at_limit",
    "gap_bounds",
    "gap_slope",
    "gap_split",
    "improvement",
    "kl",
    "level_of_equal_response",
    "levels",
    "mean_policy_optimum",
    "mixture_gap",
    "own_error_rates",
    "path_kl_optimum",
    "rates",
    "recommended_eta",
    "reward_gap",
    "score_bias_shift",
    "simulate_gap",
    "terminal_law",
    "terminal_law_with_error",
    "tilt",
    "w2",
    "white_variance",
]
