"""Matching objectives: their algebra, and the closed forms at which a Gaussian policy stops to move."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from scipy.special import ndtri
from torch import Tensor

from etude.errors import EtudeError
from etude.learning.objectives.awm import AWM, awm_loss
from etude.learning.objectives.elbo_pg import ELBOPG, elbo_pg_loss
from etude.learning.objectives.matching import Matching, squared
from etude.learning.objectives.nft import NFT, nft_loss
from etude.learning.objectives.noise_levels import draw_levels
from etude.learning.objectives.objective import Samples
from etude.learning.objectives.old_policy import OldPolicy
from etude.sampling.kernels import GDDIM
from etude.sampling.noise import NoiseSource
from etude.sampling.paths import to_x0_eps
from etude.sampling.plans import SamplingPlan
from etude.sampling.rollout import Trajectory
from support.gaussian_policy import GaussianPolicy, flow_path, sd_path

PAIRS, SHAPE = 5, (5, 3, 4)
PATHS = {"vp": sd_path, "flow": flow_path}


@dataclass
class Case:
    """Random errors of an old and a trained network, shares of good, and weights of the levels."""

    old: Tensor
    delta: Tensor
    share: Tensor
    weight: Tensor

    @classmethod
    def of(cls, seed: int) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        share = torch.rand(PAIRS, generator=generator, dtype=torch.float64)
        return cls(draw(*SHAPE), draw(*SHAPE), share, draw(PAIRS).exp())

    def gradient(self, beta: float, weight: Tensor | None, delta: Tensor | None = None) -> Tensor:
        """The derivative of the loss, summed over pairs, at an error of `old + delta`."""
        error = (self.old + (0 if delta is None else delta)).requires_grad_()
        (gradient,) = torch.autograd.grad(nft_loss(error, self.old, self.share, beta, weight).sum(), error)
        return gradient


def each(values: Tensor) -> Tensor:
    return values[:, None, None]


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).mean(1)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_an_indifferent_image_teaches_nothing_at_the_old_policy(beta: float) -> None:
    case = Case.of(0)
    case.share = torch.full((PAIRS,), 0.5, dtype=torch.float64)
    for weight in (None, case.weight):
        assert case.gradient(beta, weight).abs().max() == 0


def test_at_the_old_policy_nft_and_both_forms_of_awm_have_one_gradient() -> None:
    case, beta = Case.of(1), 0.3
    advantages = 2 * case.share - 1
    expected = 2 * each(advantages * case.weight) * case.old / case.old[0].numel()
    torch.testing.assert_close(case.gradient(beta, case.weight) / beta, expected)
    for clip in (None, 0.2):
        error = case.old.clone().requires_grad_()
        loss = awm_loss(squared(error, case.weight), squared(case.old, case.weight), advantages, clip)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), error)[0], expected)


def test_one_image_pulls_the_policy_to_its_closed_form_under_the_plain_weight_alone() -> None:
    case, beta = Case.of(2), 0.7
    # e = v_theta - v: the closed form v_old + (2 r - 1) / beta (v - v_old) has the error below.
    stop = -each(2 * case.share - 1) / beta * case.old
    assert case.gradient(beta, case.weight, stop).abs().max() < 1e-14
    assert case.gradient(beta, None, stop).abs().max() > 1e-3


def test_the_plain_loss_is_a_pull_within_a_trust_region() -> None:
    case = Case.of(3)
    for beta in (0.1, 1.0, 3.0):
        d, delta, tilt = case.old, case.delta, 2 * case.share - 1
        expected = case.weight * (inner(d, d) + 2 * beta * tilt * inner(d, delta) + beta**2 * inner(delta, delta))
        torch.testing.assert_close(nft_loss(d + delta, d, case.share, beta, case.weight), expected)


def test_nft_at_beta_one_is_plain_awm_with_a_trust_region() -> None:
    case = Case.of(4)
    d, delta, tilt = case.old, case.delta, 2 * case.share - 1
    nft = nft_loss(d + delta, d, case.share, 1.0, case.weight)
    awm = awm_loss(squared(d + delta, case.weight), squared(d, case.weight), tilt, None)
    torch.testing.assert_close(nft, awm + (1 - tilt) * (squared(delta, case.weight) + squared(d, case.weight)))


def test_good_and_bad_change_places_by_a_mirror_at_the_old_policy() -> None:
    case = Case.of(5)
    for weight in (None, case.weight):
        one = nft_loss(case.old + case.delta, case.old, case.share, 0.4, weight)
        other = nft_loss(case.old - case.delta, case.old, 1 - case.share, 0.4, weight)
        torch.testing.assert_close(one, other)


def test_larger_data_weigh_by_their_square_or_by_their_size() -> None:
    case, c = Case.of(6), 7.0
    for weight, power in ((case.weight, 2), (None, 1)):
        one = nft_loss(case.old + case.delta, case.old, case.share, 0.4, weight)
        scaled = nft_loss(c * (case.old + case.delta), c * case.old, case.share, 0.4, weight)
        torch.testing.assert_close(scaled, c**power * one)


def test_the_ratio_is_clipped_where_it_has_moved_far_enough() -> None:
    matching = torch.tensor([0.0, 1.0, 0.0, 1.0], requires_grad=True)
    old, advantages = torch.full((4,), 0.5), torch.tensor([1.0, 1.0, -1.0, -1.0])
    (gradient,) = torch.autograd.grad(awm_loss(matching, old, advantages, 0.2).sum(), matching)
    ratio = torch.tensor([0.5, -0.5]).exp()
    torch.testing.assert_close(gradient, torch.tensor([0.0, float(ratio[1]), -float(ratio[0]), 0.0]))


def slope(loss: Tensor, bound: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), bound)[0]


def bounds(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Evidence bounds of a trained and an old policy, and advantages."""
    draws = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draws[0].requires_grad_(), draws[1], draws[2]


def test_epg_has_the_gradient_of_awms_ratio_without_a_clip() -> None:
    bound, old, advantages = bounds(0)
    awm = awm_loss(-bound, -old, advantages, float("inf"))
    torch.testing.assert_close(slope(elbo_pg_loss(bound, old, advantages, proximal=False), bound), slope(awm, bound))


def test_pepg_has_the_gradient_of_a_regression_of_the_log_ratio_on_the_advantage() -> None:
    bound, old, advantages = bounds(1)
    log_ratio = bound - old
    for ratio in (True, False):
        weight = log_ratio.detach().exp() if ratio else 1.0
        regression = weight * (advantages - log_ratio).square() / 2
        loss = elbo_pg_loss(bound, old, advantages, ratio=ratio)
        torch.testing.assert_close(slope(loss, bound), slope(regression, bound))


def test_pepg_rests_where_the_bound_has_risen_by_the_advantage() -> None:
    _, old, advantages = bounds(2)
    bound = (old + advantages).requires_grad_()
    assert slope(elbo_pg_loss(bound, old, advantages), bound).abs().max() < 1e-15
    assert slope(elbo_pg_loss(bound, old, advantages, proximal=False), bound).abs().max() > 0.1


def test_at_the_old_policy_elbo_pg_is_awm() -> None:
    _, old, advantages = bounds(3)
    bound = old.clone().requires_grad_()
    for proximal in (True, False):
        for ratio in (True, False):
            assert torch.equal(slope(elbo_pg_loss(bound, old, advantages, proximal, ratio), bound), -advantages)


@dataclass(frozen=True)
class Grid:
    """Noise that goes round a fixed list of values instead of being drawn: an exact mean over it."""

    values: Tensor
    seed: int = 0
    stream: str = "objective"
    iteration: int = 1

    def step(self, samples: list[int], step: int, shape: tuple[int, ...]) -> Tensor:
        return self.values[[i % len(self.values) for i in samples]].reshape(-1, *shape)


def nodes(count: int) -> Tensor:
    """Quantiles of N(0, 1), scaled to variance 1."""
    values = torch.from_numpy(ndtri((torch.arange(count) + 0.5).double().numpy() / count))
    return values / values.square().mean().sqrt()


MEAN, VARIANCE, STEPS = 0.5, 0.8, 4


def line(path: str, count: int = 12) -> tuple[GaussianPolicy, Samples]:
    """The exact denoiser of a Gaussian with trainable corrections, and images and noise on a product grid."""
    levels = PATHS[path]()
    table = SamplingPlan.sde(STEPS, GDDIM(1.0)).tabulate(levels.grid(STEPS))
    policy = GaussianPolicy(MEAN, VARIANCE, levels, table=table)
    x0 = (MEAN + VARIANCE**0.5 * nodes(count)).float().repeat_interleave(count).reshape(-1, 1, 1, 1)
    conditioning = policy.encode([""] * len(x0))
    samples = Samples(
        table, Trajectory.of_images(x0), conditioning, 1.0, list(range(len(x0))), Grid(nodes(count).float())
    )  # type: ignore[arg-type]
    return policy, samples


def settled(objective: Matching, policy: GaussianPolicy, samples: Samples) -> None:
    """Moves the policy to the minimum of the objective, whose old policy stays."""
    rows = torch.arange(len(samples.indices)).repeat(STEPS)
    columns = torch.arange(STEPS).repeat_interleave(len(samples.indices))
    objective.prepare(policy, samples, [], None, lambda n: None)  # type: ignore[arg-type]
    parameters = list(policy.trainable().values())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=25, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=1e-12
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective.loss(policy, samples, rows, columns).value
        value.backward()
        return value

    objective.after_step(policy.trainable())
    optimizer.step(closure)


def difference(policy: GaussianPolicy, samples: Samples, mean: float, variance: float = VARIANCE) -> float:
    """The largest difference, over levels and states, of the policy's x0_hat to that of N(mean, variance)."""
    table, worst = samples.table, 0.0
    target = GaussianPolicy(mean, variance, policy.path)
    for step in range(1 if table.a[0] == 0 else 0, STEPS):
        if table.std[step] == 0:
            continue  # the parametrisation has no correction there
        x = torch.linspace(-2, 2, 9).reshape(-1, 1, 1, 1)
        answers = []
        for each_policy in (policy, target):
            output = each_policy.predict(x, table.timesteps[[step] * 9], each_policy.encode([""] * 9), 1.0)
            answers.append(to_x0_eps(output, x, table.a[step], table.s[step], policy.prediction_type)[0])
        worst = max(worst, float((answers[0] - answers[1]).detach().abs().max()))
    return worst


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weighting", ["velocity", "epsilon", "x0"])
def test_nft_moves_a_gaussian_by_a_linear_reward_to_the_shifted_gaussian(path: str, weighting: Any) -> None:
    beta, slope, (policy, samples) = 0.5, 0.2, line(path)
    x0 = samples.trajectory.latents.flatten()
    objective = NFT(beta, weighting, adv_clip_max=1.0)  # r = 1/2 + slope (x0 - m)
    settled(objective, policy, samples.judged(2 * slope * (x0 - MEAN)))
    shifted = MEAN + 2 * slope * VARIANCE / beta
    assert difference(policy, samples, shifted) < 2e-3
    assert difference(policy, samples, MEAN) > 0.1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "objective",
    [
        lambda: AWM("plain", old_coef=0.0, adv_clip_max=1e9),
        lambda: ELBOPG(proximal=False, ratio=False, scale=1.0, weighting="velocity", adv_clip_max=1e9),
    ],
    ids=["awm", "elbo_pg"],
)
def test_matching_with_exponential_weights_reaches_the_tilted_gaussian(path: str, objective: Any) -> None:
    lam, (policy, samples) = 0.3, line(path, 32)
    weights = (lam * samples.trajectory.latents.flatten()).exp()
    settled(objective(), policy, samples.judged(weights))
    assert difference(policy, samples, MEAN + lam * VARIANCE) < 0.02
    assert difference(policy, samples, MEAN) > 0.1


def test_equal_weights_are_plain_matching_and_leave_an_exact_denoiser_alone() -> None:
    policy, samples = line("vp")
    settled(AWM("plain", old_coef=0.0), policy, samples.judged(torch.full((len(samples.indices),), 3.0)))
    assert difference(policy, samples, MEAN) < 1e-3


def test_the_distance_to_the_reference_draws_the_policy_back() -> None:
    """`|2 c (2 r - 1) d + 2 c beta delta| + 2 kl delta = 0`: the shift of each level is divided by `1 + kl / (c beta)`."""
    beta, slope, kl, (policy, samples) = 0.5, 0.2, 0.5, line("flow")
    advantages = 2 * slope * (samples.trajectory.latents.flatten() - MEAN)
    settled(NFT(beta, "velocity", adv_clip_max=1.0, kl_coef=kl), policy, samples.judged(advantages))
    assert difference(policy, samples, MEAN + 2 * slope * VARIANCE / beta / (1 + kl / beta)) < 2e-3


def test_levels_are_the_steps_or_cover_the_models_levels_evenly() -> None:
    policy, samples = line("flow", 8)
    real = replace(samples, noise=NoiseSource(0, "objective", 3))
    whole = draw_levels(policy, real, STEPS, "steps")
    assert torch.equal(whole.s, samples.table.s[:-1].expand(64, -1))
    two = draw_levels(policy, real, 2, "steps").timesteps
    assert {float(t) for t in two[:, 0]} == {float(t) for t in samples.table.timesteps[:2]}
    assert {float(t) for t in two[:, 1]} == {float(t) for t in samples.table.timesteps[2:]}
    fine = draw_levels(policy, real, 4, "uniform")
    assert len(fine.s.unique()) > 100
    torch.testing.assert_close(fine.a + fine.s, torch.ones_like(fine.a))
    normal = draw_levels(policy, real, 4, "logit_normal").s
    middle = policy.grid(500).s[100:400].float()  # sigmoid(z) is in [0.2, 0.8] with probability 0.834
    share = float(((normal <= middle[0]) & (normal > middle[-1])).float().mean())
    assert share == pytest.approx(0.834, abs=0.07)  # 256 draws: three standard deviations


def test_the_old_policy_follows_by_its_schedule() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    old = OldPolicy(rate=0.25, most=0.5)
    for iteration, expected in ((1, 0.25 * 1 + 0.75 * 2), (2, 0.5 * 1.75 + 0.5 * 3), (3, 0.5 * 2.375 + 0.5 * 4)):
        old.remember({"w": weight})
        weight.data += 1
        old.follow({"w": weight}, iteration)
        assert old.weights is not None
        assert float(old.weights["w"]) == pytest.approx(expected)
        with old.active({"w": weight}):
            assert weight.item() == pytest.approx(expected)
        assert weight.item() == iteration + 1
    assert old.state()["w"] is old.weights["w"]
    on_policy = OldPolicy(rate=0.0, most=0.5)
    on_policy.remember({"w": weight})
    weight.data += 1
    on_policy.follow({"w": weight}, 1)
    assert on_policy.current
    assert on_policy.state() == {}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: NFT(beta=0.0), "beta = 0.0 must be above 0"),
        (lambda: NFT(weighting="v"), "weighting = v must be one of self"),  # type: ignore[arg-type]
        (lambda: NFT(levels=0), "levels = 0"),
        (lambda: NFT(level_sampling="even"), "level_sampling = even"),  # type: ignore[arg-type]
        (lambda: NFT(old_most=1.0), "old_most = 1.0 in"),
        (lambda: AWM(form="log"), "form = log must be one of ratio, plain"),  # type: ignore[arg-type]
        (lambda: AWM(clip=0.0), "clip = 0.0 must be above 0"),
        (lambda: ELBOPG(scale=0.0), "scale = 0.0 must be above 0"),
        (lambda: ELBOPG(proximal="yes"), "proximal = yes must be true or false"),  # type: ignore[arg-type]
        (lambda: ELBOPG(weighting="v"), "weighting = v must be one of self"),  # type: ignore[arg-type]
    ],
)
def test_an_option_out_of_range_is_one_sentence(make: Any, says: str) -> None:
    with pytest.raises(EtudeError, match=says):
        make()
