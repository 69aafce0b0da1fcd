"""Images under a plan, without training."""

from __future__ import annotations

import pytest
import torch

from etude.errors import EtudeError
from etude.policies.flux import FluxPolicy
from etude.sampling.kernels import CPS, GDDIM, make_kernel
from etude.sampling.plans import SamplingPlan
from etude.sampling.sampler import make_plan, sample_images
from support.tiny import flux

PROMPTS = ["sun", "moon", "car"]


@pytest.fixture(scope="module")
def policy():
    return FluxPolicy(flux())


def test_a_plan_of_eta_0_is_the_ode_under_any_kernel():
    for kernel in ("gddim", "flow_sde", "cps"):
        assert make_plan(kernel, 0.0, 5) == SamplingPlan.ode(5)
    plan = make_plan("cps", 0.7, 5, first_step="sde")
    assert (plan.steps[0].kernel, plan.steps[0].trained, plan.first_step) == (CPS(0.7), False, "sde")


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(EtudeError, match="did you mean 'gddim'"):
        make_kernel("gdim", 1.0)


def test_two_plans_start_from_the_same_noise(policy, monkeypatch):
    seen = []
    monkeypatch.setattr(policy, "decode", lambda latents: latents)
    predict = policy.predict
    monkeypatch.setattr(policy, "predict", lambda x, *rest: seen.append(x) or predict(x, *rest))
    for plan in (
        SamplingPlan.ode(4),
        make_plan("gddim", 1.2, 4),
        SamplingPlan.window(4, GDDIM(1.2), 1, 1, compression=0.4),
    ):
        sample_images(policy, PROMPTS, plan, 2.0)
    assert len(seen) == 4 + 4 + 3
    assert torch.equal(seen[0], seen[4])
    assert torch.equal(seen[0], seen[8])


def test_a_plan_with_a_tail_makes_images_and_counts_its_evaluations(policy):
    plan, steps = SamplingPlan.window(10, GDDIM(1.2), 1, 4, compression=0.4), []
    images = sample_images(policy, PROMPTS, plan, 2.0, batch_size=2, on_step=steps.append)
    assert images.shape == (3, 3, 8, 8)
    assert sum(steps) == 3 * plan.num_steps == 3 * (5 + 2)
