"""What does not fit into memory is done in smaller parts, with the same result, and said once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from etude.batching import MicroBatch
from etude.config import parse_config
from etude.errors import EtudeError
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.sampling.kernels import GDDIM
from etude.sampling.noise import NoiseSource
from etude.sampling.plans import SamplingPlan
from etude.sampling.rollout import rollout
from etude.training.trainer import Trainer
from support.small_runs import brief_settings, metrics
from support.tiny import stable_diffusion

PROMPTS = [f"prompt {i}" for i in range(7)]


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class FailingBackward(torch.autograd.Function):
    """The identity, whose gradient asks `allowed` first."""

    @staticmethod
    def forward(ctx, x, allowed):
        ctx.allowed = allowed
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if not ctx.allowed(len(gradient)):
            raise out_of_memory()
        return gradient, None


def limit(policy, forward: int, backward: Callable[[int], bool] = lambda rows: True) -> list[int]:
    """The policy's network takes at most `forward` rows at once. Returns where the sizes that went through are listed."""
    predict, taken = policy.predict, []

    def limited(x, *arguments):
        if len(x) > forward:
            raise out_of_memory()
        taken.append(len(x))
        return FailingBackward.apply(predict(x, *arguments), backward)

    policy.predict = limited
    return taken


@pytest.mark.parametrize(("size", "fits", "ends"), [(8, 8, 8), (8, 3, 2), (5, 1, 1), (100, 7, 7), (6, 4, 3)])
@pytest.mark.filterwarnings("ignore:.*does not fit into memory")
def test_every_row_is_worked_through_once_and_in_order_and_progress_adds_up(size, fits, ends):
    done, progress, batches = [], [], MicroBatch(size, "size")

    def work(rows, report):
        report(1)
        if rows.stop - rows.start > fits:
            raise out_of_memory()
        done.extend(range(rows.start, rows.stop))
        report(rows.stop - rows.start - 1)

    batches.run(15, work, progress.append)
    assert done == list(range(15))
    assert sum(progress) == 15
    assert batches.size == ends


def test_a_halving_is_said_once_and_lasts():
    batches = MicroBatch(8, "rollout.batch_size")

    def work(rows, report):
        if rows.stop - rows.start > 4:
            raise out_of_memory()

    with pytest.warns(UserWarning, match=r"rollout\.batch_size = 8 does not fit .* with 4, .* not the result") as told:
        batches.run(32, work)
    assert len(told) == 1
    assert batches.size == 4


@pytest.mark.parametrize(("size", "adaptive", "says"), [(1, True, "a single sample"), (8, False, "several processes")])
def test_what_cannot_be_made_smaller_is_one_clear_error(size, adaptive, says):
    def work(rows, report):
        raise out_of_memory()

    with pytest.raises(EtudeError, match=says):
        MicroBatch(size, "rollout.batch_size", adaptive).run(8, work)


def test_a_settled_size_is_not_made_smaller():
    batches = MicroBatch(8, "objective.batch_size")

    def work():
        with batches.settled():
            raise out_of_memory()

    with pytest.raises(EtudeError, match=r"objective\.batch_size = 8 does not fit"):
        batches.fits(work, 8)
    assert batches.size == 8


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 2 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ],
)
def test_a_library_that_gets_no_memory_is_out_of_memory(error):
    def work():
        raise error

    with pytest.warns(UserWarning, match="does not fit"):
        assert not MicroBatch(8, "size").fits(work, 8)


def test_other_errors_are_not_mistaken_for_a_lack_of_memory():
    def work(rows, report):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    batches = MicroBatch(8, "rollout.batch_size")
    with pytest.raises(RuntimeError, match="mat1"):
        batches.run(8, work)
    assert batches.size == 8


def sampled(policy, batch_size, on_step=lambda done: None):
    table = SamplingPlan.sde(4, GDDIM(1.2)).tabulate(policy.grid(4))
    noise, samples = NoiseSource(0, "training"), list(range(len(PROMPTS)))
    keys = [0, 0, 0, 3, 3, 3, 6]  # groups that share their first steps where those are deterministic
    return rollout(
        policy,
        table,
        policy.encode(PROMPTS),
        noise,
        samples,
        3.0,
        batch_size,
        "mean",
        policy.reference,
        on_step,
        noise_samples=keys,
        prompts=PROMPTS,
    )


@pytest.mark.filterwarnings("ignore:.*does not fit into memory")
def test_a_rollout_that_runs_out_of_memory_is_the_rollout_of_smaller_batches():
    policy, small, progress = StableDiffusionPolicy(stable_diffusion()), StableDiffusionPolicy(stable_diffusion()), []
    taken = limit(policy, 3)
    batches = MicroBatch(8, "rollout.batch_size")
    found, expected = sampled(policy, batches, progress.append), sampled(small, 3)
    assert batches.size == 3  # 7 rows at first, then their half
    assert max(taken) == 3
    assert sum(progress) == 4 * len(PROMPTS)
    for name in ("latents", "states", "log_prob", "reference_mean"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.filterwarnings("ignore:.*does not fit into memory")
def test_decoding_that_runs_out_of_memory_makes_the_same_pictures():
    policy = StableDiffusionPolicy(stable_diffusion())
    latents, decode = torch.randn(7, *policy.latent_shape), policy.pipeline.vae.decode
    expected = policy.decode(latents)

    def limited(x, **options):
        if len(x) > 2:
            raise out_of_memory()
        return decode(x, **options)

    policy.pipeline.vae.decode = limited
    assert (policy.decode(latents).int() - expected.int()).abs().max() <= 1
    assert policy.decode_batch.size == 1  # 7, 3, 1
    assert len(policy.decode(latents[:0].new_zeros(3, *policy.latent_shape))) == 3


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return {
        **brief_settings(tmp_path_factory.mktemp("model")),
        "rollout": {"images_per_iteration": 8, "images_per_prompt": 4, "batch_size": 8},
        "objective": {"clip_range": None, "clip_nats": 1.6, "kl_coef": 0.1, "batch_size": 8, "updates_per_epoch": 2},
        "optimizer": {"learning_rate": 3e-3},
    }


def trained(settings, out, size, forward=100, backward=lambda rows: True):
    tree = {**settings}
    tree["rollout"], tree["objective"] = ({**tree[name], "batch_size": size} for name in ("rollout", "objective"))
    trainer = Trainer(parse_config(tree), out)
    limit(trainer.policy, forward, backward)
    trainer.train()
    return trainer, torch.cat([p.detach().flatten() for p in trainer.parameters.values()]), metrics(out)


@pytest.mark.filterwarnings("ignore:.*does not fit into memory")
def test_a_run_short_of_memory_ends_with_the_bits_of_one_with_small_batches(settings, tmp_path):
    gradients = []

    def backward(rows):  # the first micro-batch of an optimiser step has left its gradients when the second fails
        gradients.append(rows)
        return rows <= 2 or len(gradients) != 2

    trainer, short, logged = trained(settings, tmp_path / "short", 8, 4, backward)
    assert (trainer.rollout_batches.size, trainer.learner.micro_batches.size) == (4, 2)
    assert gradients[:3] == [4, 4, 2]
    # The rollout of 4 at a time, the replay of 2.
    small = {**settings, "rollout": {**settings["rollout"], "batch_size": 4}}
    small["objective"] = {**settings["objective"], "batch_size": 2}
    reference = Trainer(parse_config(small), tmp_path / "small")
    reference.train()
    assert torch.equal(short, torch.cat([p.detach().flatten() for p in reference.parameters.values()]))
    _, large, of_large = trained(settings, tmp_path / "large", 8)
    assert torch.allclose(short, large, atol=1e-4)
    for name in ("loss", "approx_kl", "grad_norm", "reference_kl"):
        assert logged[1][name] == pytest.approx(of_large[1][name], rel=1e-3, abs=1e-6)
