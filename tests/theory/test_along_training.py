"""The gap along training: every gradient against differences, quadrature or torch, every limit against the closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from etude.errors import EtudeError
from etude.sampling.windows import ProgressiveWindow
from etude.theory import (
    Gaussian,
    QuadraticReward,
    ScoreError,
    TrainingProblem,
    finite_step_law,
    gap_along_training,
    gap_at_limit,
    gap_slope,
    level_of_equal_response,
    mean_policy_optimum,
    reward_gap,
    tilt,
)
from etude.theory.affine_policy import Weights
from etude.theory.along_training import _Adam
from etude.theory.noised_images import matching_ascent

BASE = Gaussian([1.0, -0.5], [[1.0, 0.3], [0.3, 0.5]])
REWARD = QuadraticReward([[1.0, 0.2], [0.2, -0.3]], center=[2.0, 0.0], linear=[0.1, 0.4])
CONCAVE = QuadraticReward([[1.0, 0.2], [0.2, 0.5]], center=[2.0, 0.0])
LINE, SHIFTED = Gaussian(1.0, 1.0), QuadraticReward(1.0, center=2.0)
ETAS = np.array([0.5, 1.5])
SHORT = TrainingProblem(LINE, "sd", SHIFTED, [0.5, 1.0, 2.0], 10, "leading", beta=0.05, prediction="sample")
SAMPLERS = {
    "gddim": {"schedule": "sd", "eta": ETAS, "steps": 5},
    "ddim": {"schedule": "ddpm", "eta": np.array([0.5, 0.9]), "steps": 5, "kernel": "ddim"},
    "flow-sde": {"schedule": "flow", "eta": ETAS, "steps": 5, "kernel": "flow_sde"},
    "cps": {"schedule": "flow", "eta": np.array([0.5, 0.9]), "steps": 5, "kernel": "cps"},
    "window": {"schedule": "flow", "eta": ETAS, "steps": 6, "window": (2, 2)},
    "score-error": {"schedule": "sd", "eta": ETAS, "steps": 5, "score_error": ScoreError(0.1, 0.1, 0.05)},
}


def random_weights(problem, size=0.1, seed=0):
    rng, d = np.random.default_rng(seed), problem.target.d
    shape = (problem.steps, problem.etas, d)
    return Weights(size * rng.standard_normal((*shape, d)), size * rng.standard_normal(shape))


def slope_along(value, weights, direction, h=1e-5):
    """The central difference of `value(weights)` along a direction, [etas]."""
    return (value(weights + direction.scaled(h)) - value(weights + direction.scaled(-h))) / (2 * h)


@pytest.mark.parametrize("name", SAMPLERS)
def test_without_corrections_the_gap_is_that_of_the_exact_laws(name):
    options = {**SAMPLERS[name], "target": BASE, "reward": REWARD}
    problem = TrainingProblem(**options)
    sampler = {k: v for k, v in options.items() if k not in ("window", "target", "reward")}
    ode, sde, _ = problem.measure(problem.start)
    law = finite_step_law(BASE, **sampler)
    assert sde == pytest.approx(REWARD.expected(law), rel=1e-12)
    if name != "score-error":
        gap = reward_gap(BASE, sampler.pop("schedule"), REWARD, **sampler)
        assert ode - sde == pytest.approx(gap, rel=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_policy_gradient_is_the_derivative_of_the_expected_reward(name):
    """In d = 2 with a full covariance and an indefinite Q; only noisy steps move."""
    problem = TrainingProblem(BASE, reward=REWARD, **SAMPLERS[name])
    weights, (sampler, trained) = random_weights(problem), problem.training(1)
    direction = random_weights(problem, 1.0, seed=1).scaled(trained)
    found = problem.ascent(weights).dot(direction)
    expected = slope_along(lambda w: sampler.course(w).reward(problem.end), weights, direction)
    assert found == pytest.approx(expected, rel=1e-6)
    still = problem.ascent(weights).scaled(~trained)
    assert still.dot(still) == pytest.approx(0.0, abs=0)


def test_both_kls_have_their_gradients():
    """The path's KL by differences; the steps' KL by differences at states that stay as they are."""
    sampler, beta = SAMPLERS["gddim"], 0.3
    path = TrainingProblem(BASE, reward=REWARD, **sampler, beta=beta, kl="path")
    steps = TrainingProblem(BASE, reward=REWARD, **sampler, beta=beta)
    weights, direction = random_weights(path), random_weights(path, 1.0, 1).scaled(path.training(1)[1])

    def penalised(w):
        course = path.sde.course(w)
        return course.reward(path.end) - beta * path.sde.kl(w, course)

    assert path.ascent(weights).dot(direction) == pytest.approx(slope_along(penalised, weights, direction), rel=1e-6)
    course, free = path.sde.course(weights), TrainingProblem(BASE, reward=REWARD, **sampler)
    fixed = free.ascent(weights).dot(direction) - beta * slope_along(
        lambda w: path.sde.kl(w, course), weights, direction
    )
    assert steps.ascent(weights).dot(direction) == pytest.approx(fixed, rel=1e-6)


def test_a_standardized_reward_is_divided_by_its_deviation():
    plain, divided = (TrainingProblem(BASE, reward=REWARD, **SAMPLERS["gddim"], standardized=s) for s in (False, True))
    weights = plain.start
    laws = [finite_step_law(BASE, "sd", eta, 5) for eta in ETAS]
    spread = np.array([REWARD.variance(law) ** 0.5 for law in laws])
    assert divided.ascent(weights).f * spread[:, None] == pytest.approx(plain.ascent(weights).f, rel=1e-10)


@pytest.mark.parametrize("method", ["policy-gradient", "matching", "backpropagation"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_slope_of_the_gap_is_its_derivative_along_the_ascent(method, shared):
    slopes = []
    for beta in (0.0, 3.0):
        problem = TrainingProblem(BASE, reward=REWARD, **SAMPLERS["gddim"], method=method, shared=shared, beta=beta)
        step = 1e-5
        moved = gap_along_training(problem, 1, step, "gradient")
        back = problem.measure(problem.start + problem.ascent(problem.start).scaled(-step))
        slopes.append(gap_slope(problem).gap)
        assert slopes[-1] == pytest.approx((moved.gap[1] - back[0] + back[1]) / (2 * step), rel=1e-5)
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-12)  # the distance to the start is flat there


def test_a_policy_gradient_moves_the_gap_by_the_inner_product_less_its_own_square():
    problem = TrainingProblem(BASE, reward=REWARD, **SAMPLERS["gddim"])
    own = problem.ascent(problem.start)
    ode = problem.ode.ascent(problem.start, problem.ode.course(problem.start), problem.end)
    assert gap_slope(problem).gap == pytest.approx(ode.dot(own) - own.dot(own), rel=1e-12)


def test_late_steps_widen_the_gap_and_early_steps_narrow_it():
    """A linear reward on the line: the response to a shift of x0_hat changes sides at q*, and so does the gap's slope."""
    linear, eta = QuadraticReward(0.0, linear=1.0), np.array([0.5, 1.0, 2.0])
    problem = TrainingProblem(LINE, "ddpm", linear, eta, 1000, prediction="sample")
    ode, sde = (
        s.ascent(problem.start, s.course(problem.start), problem.end).f[..., 0] for s in (problem.ode, problem.sde)
    )
    q = (problem.levels.s / problem.levels.a)[:-1] ** 2
    width = -np.diff(np.append(q, 0.0))
    middle = (q > 0.02) & (q < 300)
    for e, value in enumerate(eta):
        kappa = 1 + value**2
        closed = kappa / (2 * q) * (1 / (1 + q)) ** (kappa / 2) * width
        assert sde[middle, e] == pytest.approx(closed[middle], rel=0.1)
        equal = float(level_of_equal_response(1.0, value))
        ahead = ode[:, e] > sde[:, e]
        assert ahead[q > 1.1 * equal].all()
        assert not ahead[(q < 0.9 * equal) & (q > q[-1])].any()
        late = int(np.argmax(q < 0.9 * equal))
        early, last = (0, int(np.argmax(q < 1.1 * equal))), (late, len(q) - late)
        slopes = [
            gap_slope(TrainingProblem(LINE, "ddpm", linear, value, 1000, window=w, prediction="sample")).gap
            for w in (early, last)
        ]
        assert slopes[0] > 0 > slopes[1]
    assert level_of_equal_response(2.0, 0.0) == pytest.approx(2 * np.expm1(2.0))
    assert level_of_equal_response(1.0, 1.0) == pytest.approx(3.0)


@pytest.mark.parametrize("kl", ["steps", "path"])
def test_the_limit_is_the_only_stationary_point_and_training_reaches_it(kl):
    problem = TrainingProblem(BASE, "sd", CONCAVE, ETAS, 4, beta=0.5, kl=kl, prediction="sample")
    limit = gap_at_limit(problem)
    ascent = problem.ascent(limit.weights)
    assert ascent.dot(ascent) == pytest.approx(0.0, abs=1e-20)
    trained = gap_along_training(problem, 500, 0.05)
    assert trained.gap[-1] == pytest.approx(limit.gap[0], abs=2e-3)
    assert trained.sde[-1] == pytest.approx(limit.sde[0], abs=2e-3)
    if kl == "path":
        for e, eta in enumerate(ETAS):
            best = mean_policy_optimum(BASE, "sd", CONCAVE, 0.5, eta, 4)
            assert limit.sde[0, e] == pytest.approx(best.reward, rel=1e-9)
            assert limit.kl[0, e] == pytest.approx(best.kl, rel=1e-9)


@pytest.mark.parametrize("end", [0.0, 0.3])
def test_matching_is_the_expectation_over_images_and_noise(end):
    """By Gauss-Hermite quadrature over x0 and eps, in two dimensions, with a score error."""
    error, steps = ScoreError(0.1, 0.05), 3
    s = np.array([0.998, 0.9, 0.6, end])
    problem = TrainingProblem(BASE, (np.sqrt(1 - s**2), s), REWARD, 1.0, method="matching", score_error=error)
    weights = random_weights(problem)
    course = problem.ode.course(weights)
    found = problem.ascent(weights)
    nodes, w = np.polynomial.hermite_e.hermegauss(5)
    grid = np.stack(np.meshgrid(*[nodes] * 4, indexing="ij"), -1).reshape(-1, 4)
    weight = np.prod(np.stack(np.meshgrid(*[w / w.sum()] * 4, indexing="ij"), -1).reshape(-1, 4), axis=1)
    y = course.mean[-1, 0] + grid[:, :2] @ np.linalg.cholesky(course.cov[-1, 0]).T
    y = y + (problem.levels.a[-1] - 1) * BASE.to_eigen(BASE.mu)  # x0 - m, also where the last level is not clean
    r = REWARD.value(BASE.mu + BASE.from_eigen(y))
    advantage, eps, c = r - weight @ r, grid[:, 2:], BASE.spectrum
    for i in range(steps):
        a, s, u = problem.levels.a[i], problem.levels.s[i], problem.unit[i]
        e = a * y + s * eps
        spread = a**2 * c + s**2
        white = e / np.sqrt(spread)
        noise = (1 + error.gain) * s * e / spread + BASE.to_eigen(error.bias_in(2))
        guess = (e - s * noise) / a + u * (white @ weights.F[i, 0].T + weights.f[i, 0])
        pull = (weight * advantage)[:, None] * (y - guess) / u
        assert found.f[i, 0] == pytest.approx(pull.sum(0), rel=1e-9)
        assert found.F[i, 0] == pytest.approx(pull.T @ white, rel=1e-9)


def test_matching_moves_an_exact_network_to_that_of_the_tilted_law():
    """From images of the target itself: x0_hat moves as the denoiser of p exp(t r) does at t = 0."""
    problem = TrainingProblem(BASE, "sd", CONCAVE, 1.0, 4, method="matching", prediction="sample")
    images = np.zeros((1, 2)), np.diag(BASE.spectrum)[None]
    end = type(problem.end).of(BASE, CONCAVE, 1.0)
    found = matching_ascent(BASE, problem.levels, problem.unit, problem.start, images, end)
    t = 1e-6
    laws = [tilt(BASE, CONCAVE, 1 / t)], [tilt(BASE, QuadraticReward(-CONCAVE.Q, CONCAVE.center), 1 / t)]
    x = np.random.default_rng(0).standard_normal((6, 2))
    for i in range(4):
        a, s = problem.levels.a[i], problem.levels.s[i]

        def denoised(law, a=a, s=s):
            C = law.matrix
            return law.mu + a * np.linalg.solve(a**2 * C + s**2 * np.eye(2), (x - a * law.mu).T).T @ C

        change = (denoised(laws[0][0]) - denoised(laws[1][0])) / (2 * t)
        white = BASE.to_eigen(x - a * BASE.mu) / np.sqrt(a**2 * BASE.spectrum + s**2)
        moved = BASE.from_eigen(white @ found.F[i, 0].T + found.f[i, 0])
        assert moved == pytest.approx(change, rel=1e-4, abs=1e-6)


def test_adam_takes_the_steps_of_torch():
    rng, step = np.random.default_rng(0), _Adam(0.03, (0.9, 0.99))
    weight, parameter = np.zeros(3), torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=0.03, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(5):
        g = rng.standard_normal(3)
        weight = weight + step(Weights(np.zeros((1, 1, 3, 3)), g[None, None])).f[0, 0]
        parameter.grad = -torch.from_numpy(g)
        optimizer.step()
    assert weight == pytest.approx(parameter.detach().numpy(), rel=1e-12)


def test_steps_that_learn_apart_widen_the_gap_before_they_narrow_it():
    """A shifted reward with a KL: wider for some tens of updates, the more the larger eta; one change for all steps narrows it."""
    gap = gap_along_training(SHORT, 150, 0.02, "gradient").gap
    widest = gap.min(axis=0) / gap[0]
    assert (gap_slope(SHORT).gap < 0).all()
    assert (np.diff(widest) > 0).all()
    assert widest == pytest.approx([1.08, 1.19, 1.34], abs=0.01)
    assert np.argmin(gap, axis=0).tolist() == [17, 22, 20]
    for options in ({"shared": True}, {"method": "matching"}, {"method": "backpropagation"}):
        other = TrainingProblem(LINE, "sd", SHIFTED, [0.5, 1.0, 2.0], 10, "leading", prediction="sample", **options)
        assert (np.diff(np.abs(gap_along_training(other, 60, 0.02, "gradient").gap), axis=0) < 0).all()


def test_one_measured_eta_measures_all_weights_alike():
    problem = TrainingProblem(LINE, "sd", SHIFTED, ETAS, 6)
    found = gap_along_training(problem, 3, 0.01, measured_eta=1.0)
    assert found.sde[0] == pytest.approx(np.full(2, SHIFTED.expected(finite_step_law(LINE, "sd", 1.0, 6))))
    assert found.ode == pytest.approx(gap_along_training(problem, 3, 0.01).ode)
    assert np.isnan(found.relative[0]).all()
    assert found.relative[3] == pytest.approx(found.gap[3] / (found.ode[3] - found.ode[0]))


def test_a_moving_window_trains_its_steps_in_turn():
    window = ProgressiveWindow(stop=5, size=1, iters_per_shift=1, stride=1, start=1)
    problem = TrainingProblem(LINE, "flow", SHIFTED, 1.0, 6, window=window)
    moved = [np.flatnonzero(problem.ascent(problem.start, update).f[:, 0, 0]).tolist() for update in (1, 2, 3)]
    assert moved == [[1], [2], [3]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "ppo"}, "unknown method 'ppo'"),
        ({"kl": "reverse"}, "unknown KL 'reverse'"),
        ({"prediction": "score"}, "unknown prediction"),
        ({"prediction": [1.0]}, "give one a step"),
        ({"eta": 0.0}, "no step of the sampler is noisy"),
        ({"window": (4, 3)}, "does not fit in 6 steps"),
        ({"beta": -1.0}, "beta"),
        ({"reward": np.abs}, "exact for a QuadraticReward"),
        ({"schedule": "flow", "prediction": "noise"}, "use prediction 'velocity'"),
    ],
)
def test_a_wrong_problem_is_named(changes, words):
    with pytest.raises(EtudeError, match=words):
        TrainingProblem(**{"target": LINE, "schedule": "sd", "reward": SHIFTED, "eta": 1.0, "steps": 6, **changes})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 1.0, "method": "matching"},
        {"beta": 1.0, "standardized": True},
        {"beta": 1.0, "shared": True},
        {"beta": 1.0, "window": ProgressiveWindow(stop=5, size=1)},
    ],
)
def test_a_training_without_a_limit_is_named(options):
    problem = TrainingProblem(LINE, "sd", SHIFTED, 1.0, 6, **options)
    with pytest.raises(EtudeError, match="has no limit in closed form"):
        gap_at_limit(problem)


def test_rewards_that_grow_without_bound_are_named():
    with pytest.raises(EtudeError, match="raise beta"):
        gap_at_limit(TrainingProblem(LINE, "sd", QuadraticReward(-5.0), 1.0, 6, beta=0.1))
    with pytest.raises(EtudeError, match="lower the rate"):
        gap_along_training(TrainingProblem(LINE, "sd", QuadraticReward(-1.0), 1.0, 6), 500, 100.0, "gradient")
