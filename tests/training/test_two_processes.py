"""Two processes train the same model as one: same prompts, noise, images, rewards and steps; and lose nothing when one of them dies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from etude.errors import EtudeError
from etude.learning.draws import own_pairs, split_samples
from etude.learning.exchange import share
from etude.training.processes import make_accelerator
from support.launching import launch
from support.small_runs import metrics
from support.two_process_driver import RUNS, config, make_models, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SIGNALLED, LOCKED, FAILING = "ddpo-signalled", "ddpo-locked", "ddpo-failing"
HERE = [name for name in RUNS if name not in (SIGNALLED, LOCKED, FAILING)]
WHOLE = [name for name in HERE if not name.startswith("fsdp")]
DRIVER = str(Path(__file__).parents[1] / "support" / "two_process_driver.py")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    make_models(root)
    (root / "one").mkdir()
    (root / "two").mkdir()
    return root


@pytest.fixture(scope="module")
def launched(root: Path) -> Iterator[Future[tuple[int, str]]]:
    """All runs in two processes, in one launch, by the example for FSDP, which those that do not use it switch off."""
    layers = ("--fsdp_transformer_layer_cls_to_wrap", "BasicTransformerBlock,ResnetBlock2D")
    names = [DRIVER, str(root), LOCKED, FAILING, SIGNALLED, *HERE]
    with ThreadPoolExecutor() as beside:
        yield beside.submit(launch, 2, names, timeout=400, config="fsdp2", options=layers)


@pytest.fixture(scope="module")
def alone(root: Path, launched: Any) -> dict[str, dict[str, Tensor]]:
    """Each run in this process alone, beside the others: its weights before and after."""
    return {name: train(root, name, root / "one" / name) for name in HERE}


@pytest.fixture(scope="module")
def together(root: Path, launched: Future[tuple[int, str]]) -> Path:
    """Where the runs of two processes are."""
    code, output = launched.result()
    assert code == 0, output[-3000:]
    return root / "two"


def seen(place: Path, name: str, processes: int) -> list[tuple[list[str], Tensor]]:
    """Prompts and images of each of two evaluations' two samplers and of the iterations between, in the order of the samples."""
    settings = config(place.parent, name)
    evaluated, drawn = settings.evaluation.num_images, settings.rollout.images_per_iteration
    sizes = [size // processes for size in [evaluated] * 2 + [drawn] * settings.iterations + [evaluated] * 2]
    images = [
        load_file(place / f"{name}-images-{rank}.safetensors")["images"].split(sizes) for rank in range(processes)
    ]
    prompts = [iter(json.loads((place / f"{name}-prompts-{rank}.json").read_text())) for rank in range(processes)]
    return [
        ([next(told) for told in prompts for _ in range(size)], torch.cat([parts[i] for parts in images]))
        for i, size in enumerate(sizes)
    ]


def updates(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows[1:]]


def flat(weights: dict[str, Tensor], prefix: str = "") -> Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights) if name.startswith(prefix)]).double()


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_make_the_images_of_one(root: Path, alone: Any, together: Path, name: str) -> None:
    one, two = seen(root / "one", name, 1), seen(together, name, 2)
    assert len(one) == len(two)
    for (prompts, images), (shared_prompts, shared_images) in zip(one, two, strict=True):
        assert shared_prompts == prompts
        difference = (shared_images.int() - images.int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_take_the_steps_of_one(root: Path, alone: Any, together: Path, name: str) -> None:
    rows, shared_rows = metrics(root / "one" / name), metrics(together / name)
    for key in ("iteration", "window", "reward", "zero_std_ratio"):
        assert [row.get(key) for row in shared_rows] == [row.get(key) for row in rows]
    assert updates(shared_rows, "grad_norm") == pytest.approx(updates(rows, "grad_norm"), rel=1e-4)
    # A ratio of 1 but for rounding has no digits in common with another.
    compared = {"loss", "ratio_mean", "ratio_max_deviation", "clipfrac", "approx_kl", "old_distance", "dpo_margin"}
    for key in compared & rows[1].keys():
        assert updates(shared_rows, key) == pytest.approx(updates(rows, key), rel=1e-3, abs=1e-5), key
    weights, shared = alone[name], load_file(together / f"{name}.safetensors")
    before, after, other = flat(weights, "before/"), flat(weights, "after/"), flat(shared, "after/")
    assert torch.equal(flat(shared, "before/"), before)
    assert (after - before).norm() > 1e-3 * before.norm()
    assert (other - after).norm() < 1e-5 * after.norm()
    assert (other - after).norm() < 1e-4 * (after - before).norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_both_processes_took_part(together: Path, alone: Any, name: str) -> None:
    assert json.loads((together / name / "summary.json").read_text())["machine"]["processes"] == 2
    images = [load_file(together / f"{name}-images-{rank}.safetensors")["images"] for rank in (0, 1)]
    assert len(images[0]) == len(images[1])
    assert not torch.equal(*images)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("fsdp-lora", "lora/pytorch_lora_weights.safetensors"),
        ("fsdp-lora", "lora-best/pytorch_lora_weights.safetensors"),
        ("fsdp-full", "model/unet/diffusion_pytorch_model.safetensors"),
        ("fsdp-ernie-image", "lora/pytorch_lora_weights.safetensors"),
    ],
)
def test_weights_in_parts_are_exported_as_those_of_one_process(
    root: Path, alone: Any, together: Path, name: str, file: str
) -> None:
    one, two = (load_file(place / name / file) for place in (root / "one", together))
    assert {n: t.shape for n, t in two.items()} == {n: t.shape for n, t in one.items()}
    assert (flat(two) - flat(one)).norm() < 1e-5 * flat(one).norm()
    assert metrics(together / name)[-1]["reward"] == metrics(root / "one" / name)[-1]["reward"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp-lora", "fsdp-full", "fsdp-ernie-image"])
def test_a_checkpoint_of_weights_in_parts_is_that_of_one_process(
    root: Path, alone: Any, together: Path, name: str
) -> None:
    one, two = (
        load_file(place / name / "checkpoints" / "iteration-000002" / "tensors.safetensors")
        for place in (root / "one", together)
    )
    assert two.keys() == one.keys()
    for kind in ("weights/", "optimizer/", "ema/", "best/"):
        if any(n.startswith(kind) for n in one):
            assert (flat(two, kind) - flat(one, kind)).norm() < 1e-4 * flat(one, kind).norm()


@pytest.mark.slow
def test_what_the_first_process_alone_cannot_begin_is_told_by_all_and_by_its_name(together: Path) -> None:
    told = [Path(f"{together / LOCKED}-told-{rank}.txt").read_text() for rank in (0, 1)]
    assert told[0] == told[1]
    assert re.search("process 0: another process is writing the run", told[0])


@pytest.mark.slow
def test_a_failure_in_one_process_ends_all_and_loses_no_iteration(together: Path) -> None:
    told = [Path(f"{together / FAILING}-told-{rank}.txt").read_text() for rank in (0, 1)]
    assert all("process 1: reward 'support.two_process_driver:bright' failed" in text for text in told)
    assert all("the scorer of one process is gone" in text for text in told)
    assert (together / FAILING / "checkpoints" / "iteration-000002").is_dir()
    assert [row["iteration"] for row in metrics(together / FAILING)] == [0, 1]


@pytest.mark.slow
def test_the_process_that_has_too_little_memory_halves_its_batches_alone(together: Path, alone: Any) -> None:
    """That it takes the steps of the other all the same, another test says."""
    sizes = [json.loads(Path(f"{together / 'ddpo-memory'}-sizes-{rank}.json").read_text()) for rank in (0, 1)]
    assert sizes == [[4, 8], [2, 2]]


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_where_nothing_is_lost_and_resumed_they_end_with_the_same_bits(
    together: Path,
) -> None:
    told, other = (Path(f"{together / SIGNALLED}-told-{rank}.txt").read_text() for rank in (0, 1))
    assert told == other
    # The third iteration, in which the signal comes, is finished if its update has begun.
    assert re.search("interrupted by SIGTERM .* continues from the checkpoint of iteration [23]", told)
    weights, resumed = (load_file(together / f"{name}.safetensors") for name in ("ddpo-lora", SIGNALLED))
    assert torch.equal(flat(resumed, "after/"), flat(weights, "after/"))
    assert metrics(together / SIGNALLED) == metrics(together / "ddpo-lora")


@pytest.mark.slow
def test_a_run_whose_process_died_goes_on_alone_to_the_same_end(
    root: Path, alone: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """The first process, which writes, is killed while it scores iteration 3; the run goes on in this process."""
    name = "ddpo-lora"
    died = root / "two" / "died"
    code, output = launch(2, [DRIVER, str(root), f"{name}=died"], config="ddp", DIE_AT="5")
    assert code != 0
    assert "another process of the run has ended" in output
    assert "intact checkpoint: iteration 2" in output
    weights = train(root, name, died, resume=True)
    assert any("goes on with 1 process instead of 2" in str(warning.message) for warning in recwarn)
    after, other = flat(alone[name], "after/"), flat(weights, "after/")
    assert (other - after).norm() < 1e-5 * after.norm()
    assert [row["iteration"] for row in metrics(died)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("count", "updates", "processes"), [(24, 3, 4), (8, 2, 2), (12, 1, 3)])
def test_every_process_has_an_equal_share_of_every_step(count: int, updates: int, processes: int) -> None:
    steps = split_samples(count, updates, np.random.default_rng(0))
    assert sorted(torch.cat(steps).tolist()) == list(range(count))
    for step in steps:
        pairs = (step, torch.zeros_like(step))
        parts = [
            own_pairs(pairs, share(count, processes, i))[0] + share(count, processes, i)[0] for i in range(processes)
        ]
        assert {len(part) for part in parts} == {count // updates // processes}
        assert sorted(torch.cat(parts).tolist()) == sorted(step.tolist())


def test_processes_wait_longer_for_each_other_than_for_a_reward(root: Path, tmp_path: Path) -> None:
    settings = config(root, "ddpo-lora")
    handler = make_accelerator(settings, tmp_path).init_handler
    assert handler is not None
    assert handler.timeout.total_seconds() > settings.rollout.reward_timeout + 600


def test_processes_of_their_own_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the group has fewer processes than the launcher started, each would train alone and write over the others."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # of a kind that Accelerate does not know
    with pytest.raises(EtudeError, match="2 processes were launched, but Accelerate formed a group of 1"):
        make_accelerator(config(root, "ddpo-lora"), tmp_path)
