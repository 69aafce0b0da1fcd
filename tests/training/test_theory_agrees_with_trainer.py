"""The trainer's sampler has the law that the theory computes, and its training ends where the theory says.

Training: one group of all samples, on-policy, log-probabilities and KL reduced alike. The loss is then, up to a factor,
`-E[(r - mean r) / sd(r) log p] + kl_coef sum_i KL_i`, so that `beta = kl_coef sd(r)`, the reward's standard deviation under the
policy where training ends. kl_coef is chosen to give the beta asked for, by the closed form of that policy.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats

from etude.config import parse_config
from etude.learning.objectives.objective import Loss
from etude.learning.objectives.ppo import PPO
from etude.rewards import register
from etude.sampling.kernels import make_kernel
from etude.sampling.noise import NoiseSource
from etude.sampling.plans import SamplingPlan, StepTable
from etude.sampling.replay import replay
from etude.sampling.rollout import denoise, rollout
from etude.sampling.sampler import SDE
from etude.theory import (
    Gaussian,
    QuadraticReward,
    TrainingProblem,
    finite_step_law,
    gap_along_training,
    mean_policy_optimum,
    path_kl_optimum,
    tilt,
    w2,
)
from etude.theory.laws import transfer
from etude.theory.sampler_steps import sampler_steps
from etude.training.trainer import Trainer
from support.gaussian_policy import GaussianPolicy, flow_path, read, sd_path

MEANS, VARIANCES, SIZE, SAMPLES = [0.0, 1.0, -1.5, 3.0], [1.0, 0.5, 0.05, 2.0], (16, 16), 64
CASES = [
    *itertools.product(["leading", "trailing"], ["gddim"], [1, 2, 10, 50], [0.0, 0.5, 1.0, 1.5, 5.0]),
    *itertools.product(["leading", "trailing"], ["ddim"], [10, 50], [0.5, 1.0]),
]
FLOW_CASES = [
    *itertools.product(["gddim"], [6, 25], [0.5, 1.5, 5.0], ["everywhere", "window"]),
    *itertools.product(["flow_sde", "dance_sde", "cps"], [6, 25], [0.7], ["everywhere", "window"]),
]
CONFIDENCE = 0.99  # that all statistics of all cases stay inside, if the laws are equal
TESTS = (
    3 * len(MEANS) * (len(CASES) + len(FLOW_CASES))
)  # mean, variance and Kolmogorov-Smirnov distance of every channel
LIMIT = float(stats.norm.isf((1 - CONFIDENCE) / TESTS / 2))


def sampled(spacing, kernel, steps, eta):
    """Final latents of `rollout` by channel, float64 [c, n]; each case has its own noise."""
    policy = GaussianPolicy(MEANS, VARIANCES, sd_path(spacing), SIZE)
    table = SDE(eta, steps, kernel).plan().tabulate(policy.path.grid(steps))
    noise = NoiseSource(0, "law", CASES.index((spacing, kernel, steps, eta)))
    trajectory = rollout(policy, table, policy.encode([""] * SAMPLES), noise, list(range(SAMPLES)), 1.0, SAMPLES)
    return trajectory.latents.double().transpose(0, 1).flatten(1).numpy()


def scores(values, mean, variance):
    """How many standard deviations a sample [n] of a Gaussian is off in mean, variance and distribution function."""
    n, sd = len(values), variance**0.5
    distance = stats.kstest(values, stats.norm(mean, sd).cdf)
    return np.array([
        (values.mean() - mean) * n**0.5 / sd,
        (np.mean((values - mean) ** 2) / variance - 1) * (n / 2) ** 0.5,
        stats.norm.isf(distance.pvalue / 2),
    ])  # fmt: skip


@pytest.mark.parametrize(("spacing", "kernel", "steps", "eta"), CASES)
def test_rollouts_have_the_exact_finite_step_law(spacing, kernel, steps, eta):
    grid = sd_path(spacing).grid(steps)
    law = finite_step_law(Gaussian(MEANS, np.diag(VARIANCES)), grid, eta, kernel=kernel)
    values = sampled(spacing, kernel, steps, eta)
    found = [scores(v, law.mean[k], law.cov[k, k]) for k, v in enumerate(values)]
    assert np.abs(found).max() < LIMIT


def gains(table, mean, variance):
    """The factor by which each step takes on the deviation from the path's mean, for the exact denoiser: float64 `[N]`."""
    a, s = table.a[:-1], table.s[:-1]
    return (table.x0 * a * variance + table.eps * s) / (a**2 * variance + s**2)


def law_of_table(table, mean, variance):
    """Mean and variance of the last state of N(mean, variance), step by step from the prior."""
    deviation, spread = -float(table.a[0]) * mean, 1.0
    for gain, std in zip(gains(table, mean, variance).tolist(), table.std.tolist(), strict=True):
        deviation, spread = gain * deviation, gain**2 * spread + std**2
    return float(table.a[-1]) * mean + deviation, spread


@pytest.mark.parametrize(("kernel", "steps", "eta", "where"), FLOW_CASES)
def test_rollouts_of_flow_models_have_the_exact_law_of_their_plan(kernel, steps, eta, where):
    policy = GaussianPolicy(MEANS, VARIANCES, flow_path(), SIZE)
    plan = SamplingPlan.sde(steps, make_kernel(kernel, eta))
    if where == "window":
        plan = SamplingPlan.window(steps, make_kernel(kernel, eta), start=2, size=2)
    exact = plan.tabulate(policy.grid(steps), dtype=torch.float64)
    noise = NoiseSource(1, "law", FLOW_CASES.index((kernel, steps, eta, where)))
    table, samples = plan.tabulate(policy.grid(steps)), list(range(SAMPLES))
    trajectory = rollout(policy, table, policy.encode([""] * SAMPLES), noise, samples, 1.0, SAMPLES)
    values = trajectory.latents.double().transpose(0, 1).flatten(1).numpy()
    laws = [law_of_table(exact, mean, variance) for mean, variance in zip(MEANS, VARIANCES, strict=True)]
    found = [scores(v, *law) for v, law in zip(values, laws, strict=True)]
    assert np.abs(found).max() < LIMIT


def test_the_confidence_is_not_vacuous():
    """The same samples reject the laws of another eta, of two steps more, and of the target itself."""
    values, grid = sampled("trailing", "gddim", 10, 1.0), sd_path("trailing").grid
    target = Gaussian(MEANS, np.diag(VARIANCES))
    others = [finite_step_law(target, grid(10), 0.5), finite_step_law(target, grid(12), 1.0), target]
    for other in others:
        assert max(np.abs(scores(v, other.mean[k], other.cov[k, k])).max() for k, v in enumerate(values)) > 2 * LIMIT


BASE, STEPS, ETA, BETA, COUNT = Gaussian(1.0, 1.0), 4, 0.8, 0.5, 512
QUADRATIC, LINEAR = QuadraticReward(1.0, center=2.5), QuadraticReward(0.0, linear=1.0)
GRID = sd_path().grid(STEPS)
ITERATIONS, ARRIVED, RATE, BETAS = 140, 50, 0.05, (0.9, 0.99)
# Of a learnt law, in W2: about three times the gradient noise that is left in the weights' average over the iterations after ARRIVED.
TOLERANCE = 0.03
CURVE, GAP_CURVE = (
    0.1,
    0.05,
)  # of a reward and of a gap on the way: the weights are those of one iteration, not averaged


@dataclass(frozen=True)
class Moments:
    mean: float
    variance: float

    def distance(self, other: Gaussian | Moments) -> float:
        return float(w2(self.law, other.law if isinstance(other, Moments) else other))

    @property
    def law(self) -> Gaussian:
        return Gaussian(self.mean, self.variance)


def moments(law: Gaussian) -> Moments:
    return Moments(float(law.mean), float(law.cov))


def reward_sd(reward: QuadraticReward, at: Moments) -> float:
    """sd of r = -Q (x - c)^2 + b x under a Gaussian: with the slope g at the mean, Var r = g^2 v + 2 Q^2 v^2."""
    Q, c, b = (float(np.asarray(part).item()) for part in reward.parts(1))
    slope = b - 2 * Q * (at.mean - c)
    return (slope**2 * at.variance + 2 * Q**2 * at.variance**2) ** 0.5


def law_of(policy: GaussianPolicy, table: StepTable) -> Moments:
    """The exact law of the sampler under the policy's weights: every step is affine, so two states tell it."""
    mean, variance = 0.0, 1.0
    ends = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    for step in range(table.num_steps):
        with torch.no_grad():
            at = denoise(policy, table, step, ends, policy.encode(["", ""]), 1.0).mean.double().flatten()
        gain = float(at[1] - at[0])
        mean, variance = gain * mean + float(at[0]), gain**2 * variance + float(table.std[step]) ** 2
    return Moments(mean, variance)


TABLE = SamplingPlan.sde(STEPS, make_kernel("gddim", ETA)).tabulate(GRID)


def fresh_policy(with_feedback=True):
    return GaussianPolicy(float(BASE.mean), float(BASE.cov), sd_path(), table=TABLE, with_feedback=with_feedback)


def learn(out, reward, end, with_feedback=True, objective=PPO):
    """Trains with the penalty that makes beta equal BETA at the law `end`; returns the law of the averaged weights."""
    policy = fresh_policy(with_feedback)
    learner(out, reward, policy, BETA / reward_sd(reward, end), STEPS, objective=objective)
    assert TABLE.trained_steps == tuple(range(STEPS))
    return law_of(policy, TABLE)


def learner(out, reward, policy, kl_coef, steps, sampling=None, shared=False, objective=PPO):
    """Trains the policy, which then has the mean of its weights after ARRIVED; returns the weights after every iteration."""
    history = []

    class Recorded(objective):
        def after_iteration(self, parameters, iteration):
            history.append({name: parameter.detach().clone() for name, parameter in parameters.items()})

    register("theory")(lambda images, prompts, **metadata: torch.from_numpy(reward(read(images).numpy())).float())
    (out / "train.txt").write_text("anything\n")
    (out / "evaluation.txt").write_text("one\ntwo\n")
    tree = {
        "iterations": ITERATIONS,
        "rewards": {"theory": 1.0},
        "prompts": {"train": str(out / "train.txt"), "evaluation": str(out / "evaluation.txt")},
        "sampling": {"eta": ETA, "num_steps": steps, "guidance_scale": 1.0, **(sampling or {})},
        "rollout": {"images_per_iteration": COUNT, "images_per_prompt": COUNT, "batch_size": COUNT, "shared_noise": shared},
        "lora": {"rank": 0},
        "objective": {
            "clip_range": 0.2, "logprob_reduction": "sum", "adv_clip_max": 1e3, "kl_coef": kl_coef,
            "updates_per_epoch": 1, "batch_size": COUNT * steps,
        },
        "optimizer": {"learning_rate": RATE, "betas": list(BETAS), "weight_decay": 0.0, "max_grad_norm": 1e6},
        "advantage": {"kind": "group"},
        "evaluation": {"every": 10**6, "num_images": 4, "grid_images": 2},
        "checkpoint": {"every": 10**6},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("etude.learning.objectives.ppo.PPO", Recorded)
        trainer = Trainer(parse_config(tree), out / "run", policy=policy)
    trainer.train()
    carry(policy, {name: torch.stack([each[name] for each in history[ARRIVED:]]).mean(0) for name in history[0]})
    return history


def carry(policy, weights):
    """Gives the policy these weights."""
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            parameter.copy_(weights[name])


def test_images_carry_the_latent():
    policy = GaussianPolicy(0.0, 1.0, sd_path())
    latents = torch.tensor([-2047.0, -1.2345678, 0.0, 3.3333333, 2047.0]).reshape(-1, 1, 1, 1)
    assert (read(policy.decode(latents)) - latents.double().flatten()).abs().max() < 1e-6


def test_without_corrections_the_policy_is_the_reference_sampler():
    found = law_of(fresh_policy(), TABLE)
    assert found.distance(finite_step_law(BASE, GRID, ETA)) < 1e-5


@pytest.mark.slow
def test_shifts_learnt_with_kl_reach_the_mean_of_the_optimum(tmp_path):
    """A quadratic reward and a policy with a shift in each step and no feedback.

    The optimum's mean follows the noiseless problem (certainty equivalence), so shifts alone reach it; they leave the variance.
    """
    optimum, reference = mean_policy_optimum(BASE, GRID, QUADRATIC, BETA, ETA).law, finite_step_law(BASE, GRID, ETA)
    end = Moments(float(optimum.mean), float(reference.cov))
    learnt = learn(tmp_path, QUADRATIC, end, with_feedback=False)
    assert abs(learnt.mean - end.mean) < TOLERANCE
    assert learnt.variance == pytest.approx(end.variance, rel=1e-5)
    assert abs(learnt.mean - end.mean) < abs(learnt.mean - float(tilt(BASE, QUADRATIC, BETA).mean)) / 3


@pytest.mark.slow
def test_a_linear_reward_with_kl_reaches_the_optimum(tmp_path):
    """Mean and variance, feedback trained too. Here the optima of 3.4 and of the mean policy are one law, and not p*."""
    optimum = mean_policy_optimum(BASE, GRID, LINEAR, BETA, ETA).law
    assert w2(optimum, path_kl_optimum(BASE, GRID, LINEAR, BETA, ETA)) < 1e-9
    learnt = learn(tmp_path, LINEAR, moments(optimum))
    assert learnt.distance(optimum) < TOLERANCE < learnt.distance(tilt(BASE, LINEAR, BETA)) / 3


def penalised_step_by_step() -> Moments:
    """Where the loss is stationary if each step's KL is penalised at the states as they come.

    The gradient of KL_i is then taken at fixed states: a step does not answer for the KL that it causes in later steps. With the
    value `-P e^2 + p e` of the reward alone, e the deviation from the path's mean, step i shifts its mean A e by
    k (p - 2 P A e) / (1 + 2 k P), k = std^2 / beta, as the optimal policy does, but hands back the reward's value only.
    """
    A, _, noise = (np.asarray(part, dtype=float).reshape(STEPS) for part in transfer(BASE, sampler_steps(GRID, ETA)))
    Q, c, b = (float(np.asarray(part).item()) for part in QUADRATIC.parts(1))
    end = float(GRID.a[-1]) * float(BASE.mean)
    P, p, steps = Q, b - 2 * Q * (end - c), []
    for gain, variance in zip(A[::-1], noise[::-1], strict=True):
        k = variance / BETA
        kept = 1 / (1 + 2 * k * P)
        steps.append((gain * kept, k * p * kept, variance))
        P, p = P * (gain * kept) ** 2, gain * p * kept**2
    mean, spread = -float(GRID.a[0]) * float(BASE.mean), 1.0
    for gain, shift, variance in reversed(steps):
        mean, spread = gain * mean + shift, gain**2 * spread + variance
    return Moments(float(end + mean), float(spread))


class WholeKl(PPO):
    """Adds what the KL's gradient at fixed states leaves out: each step answers for the KL of the steps after it."""

    def loss(self, policy, samples, rows, columns):
        loss, trajectory = super().loss(policy, samples, rows, columns), samples.trajectory
        transition, target = replay(policy, samples.table, trajectory, rows, columns, samples.conditioning, 1.0)
        by_step = loss.records["reference_kl"].reshape(
            len(trajectory.steps), -1
        )  # one batch holds every pair, step by step
        later = by_step.flip(0).cumsum(0).flip(0) - by_step
        cost = (later - later.mean(1, keepdim=True)).flatten()
        causal = (cost * transition.log_prob(target, "sum")).mean()
        return Loss(loss.value + self.kl_coef * causal, loss.records)


@pytest.mark.slow
def test_answering_for_later_kl_reaches_the_optimum(tmp_path):
    """A quadratic reward, mean and variance, feedback trained: the gradient of the whole trajectory's KL."""
    optimum = mean_policy_optimum(BASE, GRID, QUADRATIC, BETA, ETA).law
    learnt = learn(tmp_path, QUADRATIC, moments(optimum), objective=WholeKl)
    others = tilt(BASE, QUADRATIC, BETA), penalised_step_by_step()
    assert learnt.distance(optimum) < TOLERANCE
    assert learnt.distance(optimum) < min(map(learnt.distance, others)) / 2


@pytest.mark.slow
def test_kl_at_fixed_states_reaches_its_own_fixed_point_along_the_exact_curve(tmp_path):
    """The same without that term, which is the trainer's loss (and DDPO's with KL): another law, in closed form too.

    On the way the ODE's reward and the gap are those of the exact ascent, `etude.theory.gap_along_training`: the same Adam on the
    expected gradient, the weights in the unit of the step's noise.
    """
    end, optimum = penalised_step_by_step(), mean_policy_optimum(BASE, GRID, QUADRATIC, BETA, ETA).law
    policy, kl_coef = fresh_policy(), BETA / reward_sd(QUADRATIC, end)
    history = learner(tmp_path, QUADRATIC, policy, kl_coef, STEPS)
    learnt = law_of(policy, TABLE)
    assert learnt.distance(end) < TOLERANCE
    assert learnt.distance(end) < min(map(learnt.distance, (optimum, tilt(BASE, QUADRATIC, BETA)))) / 2

    a, s, std = (x.double().numpy()[:STEPS] for x in (TABLE.a, TABLE.s, TABLE.std))
    unit = std / (TABLE.x0.double().numpy() - TABLE.eps.double().numpy() * a / s)
    problem = TrainingProblem(BASE, GRID, QUADRATIC, ETA, standardized=True, beta=kl_coef, prediction=unit)
    exact = gap_along_training(problem, ITERATIONS, RATE, betas=BETAS)
    ode = SamplingPlan.ode(STEPS).tabulate(GRID)
    for iteration in (1, 2, 5, 10, 20, 40, 80, ITERATIONS):
        carry(policy, history[iteration - 1])
        deployed, drawn = (QUADRATIC.expected(law_of(policy, table).law) for table in (ode, TABLE))
        assert deployed == pytest.approx(exact.ode[iteration, 0], abs=CURVE)
        assert deployed - drawn == pytest.approx(exact.gap[iteration, 0], abs=GAP_CURVE)
    assert np.ptp(exact.ode) > 20 * CURVE
    assert np.ptp(exact.gap) > 3 * GAP_CURVE


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["independent-noise", "shared-noise"])
def test_a_window_with_kl_moves_the_mean_by_the_noise_that_it_adds(tmp_path, shared):
    """MixGRPO on rectified flow, eta > 1, a linear reward r = x and a shift in each step.

    Step i of the window W hands the fraction g_i of what it adds on to the image, so its optimal shift is std_i^2 g_i / beta and the
    image's mean moves by S / beta, S = sum_W std_i^2 g_i^2 the variance that the window adds. beta = kl_coef sd(r): over images that
    share their noise sd(r) is sqrt(S), over the others the root of the whole variance.
    """
    steps, kl_coef, kernel = 6, 1.0, make_kernel("gddim", 1.5)
    table = SamplingPlan.window(steps, kernel, start=2, size=2).tabulate(flow_path().grid(steps))
    policy = GaussianPolicy(float(BASE.mean), float(BASE.cov), flow_path(), table=table, with_feedback=False)
    before = law_of(policy, table)
    A = gains(table, float(BASE.mean), float(BASE.cov)).tolist()
    added = sum((float(table.std[i]) * float(np.prod(A[i + 1 :]))) ** 2 for i in table.trained_steps)
    window = {"kernel": "gddim", "eta": 1.5, "window": {"strategy": "fixed", "start": 2, "size": 2}}
    learner(tmp_path, LINEAR, policy, kl_coef, steps, window, shared)
    after = law_of(policy, table)
    expected = added / (kl_coef * (added if shared else before.variance) ** 0.5)
    assert after.mean - before.mean == pytest.approx(expected, abs=TOLERANCE)
    assert after.variance == pytest.approx(before.variance, rel=1e-5)
    outside = [i for i in range(steps) if i not in table.trained_steps]
    assert policy.network.shift[outside].abs().max() == 0
    assert expected > 10 * TOLERANCE
