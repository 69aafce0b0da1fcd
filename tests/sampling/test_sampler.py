"""A sampler is one value: it knows its steps, checks itself on a model's levels, and draws from keyed noise."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from etude.errors import EtudeError
from etude.policies.flux import FluxPolicy
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.sampling.kernels import CPS, GDDIM, make_kernel
from etude.sampling.noise import NoiseSource
from etude.sampling.plans import SamplingPlan, Step
from etude.sampling.sampler import ODE, SDE, Window, sample
from etude.sampling.solvers import Solver
from support.tiny import flux, stable_diffusion

PROMPTS = ["sun", "moon", "car"]
SAMPLERS = [
    ODE(4, 2.0),
    SDE(1.2, 4, guidance=2.0),
    SDE([0.5, 1.0, 0.0, 2.0], 4, guidance=2.0),
    Window(1.2, 1, 1, 4, compression=0.4, guidance=2.0),
    Solver("dpmsolver++", 4, 2.0),
]


@pytest.fixture(scope="module")
def policy():
    return FluxPolicy(flux())


def test_eta_0_is_the_ode_under_any_kernel():
    for kernel in ("gddim", "flow_sde", "cps", CPS):
        assert SDE(0.0, 5, kernel).plan() == ODE(5).plan() == SamplingPlan.ode(5)
        assert SDE(0.0, 5, kernel).label == ODE(5).label == "ODE"


def test_nothing_of_a_samplers_plan_is_trained():
    plan = SDE(0.7, 5, "cps", first_step="sde").plan()
    assert (plan.steps, plan.first_step) == ((Step(CPS(0.7)),) * 5, "sde")
    window = Window([1.2, 0.6], start=2, size=2, steps=5).plan()
    assert window.steps == (Step(GDDIM(0.0)),) * 2 + (Step(GDDIM(1.2)), Step(GDDIM(0.6)), Step(GDDIM(0.0)))


def test_a_class_of_kernels_stands_for_its_name():
    assert SDE(0.7, 5, CPS).plan() == SDE(0.7, 5, "cps").plan()
    assert Window(0.7, 1, 2, 5, CPS).plan() == Window(0.7, 1, 2, 5, "cps").plan()


def test_a_sampler_is_a_frozen_value_that_can_be_a_key():
    assert len({*SAMPLERS, *(replace(sampler) for sampler in SAMPLERS)}) == len(SAMPLERS)
    with pytest.raises(FrozenInstanceError):
        SAMPLERS[0].steps = 3


def test_labels_say_what_is_stochastic():
    labels = ["ODE", "eta 1.2", "eta 0.5 to 2 by step", "eta 1.2 in steps 1..1", "dpmsolver++"]
    assert [sampler.label for sampler in SAMPLERS] == labels


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: make_kernel("gdim", 1.0), "did you mean 'gddim'"),
        (lambda: SDE(0.0, kernel="gdim"), "did you mean 'gddim'"),
        (lambda: SDE(-1.0), "eta -1"),
        (lambda: SDE(1.5, kernel="cps"), "at most 1"),
        (lambda: SDE(1.0, first_step="none"), "first_step 'none' is unknown"),
        (lambda: SDE([1.0, 0.5]), "eta lists 2 values for 20 steps"),
        (lambda: ODE(0), "0 sampling steps"),
        (lambda: ODE(guidance=float("nan")), "guidance = nan"),
        (lambda: Window(1.0, start=18), "does not fit in 20 steps"),
        (lambda: Window([1.0, 0.5], size=4), "2 kernels for a window of 4 steps"),
        (lambda: Solver("unipcc"), "did you mean 'unipc'"),
    ],
)
def test_what_no_model_could_draw_with_is_refused_when_it_is_made(make, says):
    with pytest.raises(EtudeError, match=says):
        make()


def test_what_a_models_levels_do_not_allow_is_refused_before_anything_is_drawn(policy, monkeypatch):
    monkeypatch.setattr(policy, "predict", None)
    monkeypatch.setattr(policy, "encode", None)
    for sampler in (SDE(1.9, 9, "ddim"), SDE(0.7, 4, "flow_sde", first_step="sde")):
        for refuse in (sampler.check, lambda policy, sampler=sampler: sampler.draw(policy, PROMPTS)):
            with pytest.raises(EtudeError, match=r"largest legal eta|infinite noise"):
                refuse(policy)
    with pytest.raises(EtudeError, match="1 to 1000"):
        Solver("euler", 1001).draw(StableDiffusionPolicy(stable_diffusion()), PROMPTS)


def test_all_samplers_start_from_the_same_noise(policy, monkeypatch):
    seen = []
    monkeypatch.setattr(policy, "decode", lambda latents: latents)
    predict = policy.predict
    monkeypatch.setattr(policy, "predict", lambda x, *rest: seen.append(x) or predict(x, *rest))
    expected = NoiseSource(0, "evaluation").initial([0, 1, 2], policy.latent_shape)
    for sampler in SAMPLERS:
        seen.clear()
        sampler.draw(policy, PROMPTS)
        assert len(seen) == sampler.evaluations
        assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.label)
def test_progress_counts_the_evaluations_of_every_image(policy, sampler):
    steps = []
    images = sampler.draw(policy, PROMPTS, batch_size=2, on_step=steps.append)
    assert (images.shape, images.dtype) == ((3, 3, 8, 8), torch.uint8)
    assert sum(steps) == 3 * sampler.evaluations


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.label)
def test_an_image_is_keyed_by_seed_stream_and_index_alone(policy, sampler, monkeypatch):
    monkeypatch.setattr(policy, "decode", lambda latents: latents)
    whole = sampler.draw(policy, PROMPTS, seed=3)
    some = sampler.draw(policy, [PROMPTS[2], PROMPTS[0]], seed=3, samples=[2, 0])
    assert torch.allclose(some, whole[[2, 0]], atol=1e-4)
    for other in (sampler.draw(policy, PROMPTS, seed=4), sampler.draw(policy, PROMPTS, seed=3, stream="fresh")):
        assert not torch.allclose(other, whole, atol=1e-2)


def test_sample_draws_with_the_ode_by_default_and_takes_one_prompt(policy):
    assert torch.equal(sample(policy, "sun"), ODE().draw(policy, ["sun"]))
    assert torch.equal(sample(policy, PROMPTS, SAMPLERS[1], seed=5), SAMPLERS[1].draw(policy, PROMPTS, seed=5))
