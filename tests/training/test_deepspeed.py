"""Two processes under DeepSpeed's ZeRO-2 train the model of one, and keep the moments that DeepSpeed divides among them.

DeepSpeed is no dependency of the tests: without it they are skipped. `pip install --no-build-isolation deepspeed` brings it, for the CPU too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from support.launching import launch
from support.two_process_driver import make_models, train

pytest.importorskip("deepspeed", reason="pip install --no-build-isolation deepspeed runs these tests, too")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
DRIVER = str(Path(__file__).parents[1] / "support" / "two_process_driver.py")
NAMES = ["zero-lora", "zero-full"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each run alone and in two processes, and one that goes on with two processes from the checkpoint of iteration 1."""
    root = tmp_path_factory.mktemp("runs")
    make_models(root)
    for place in ("one", "two"):
        (root / place).mkdir()
    for name in NAMES:
        train(root, name, root / "one" / name)
    together(root, *NAMES)
    broken_off(root, "zero-full", "broken")
    together(root, "zero-full=broken")
    return root


def together(root: Path, *names: str) -> None:
    code, output = launch(2, [DRIVER, str(root), *names], config="deepspeed_zero2")
    assert code == 0, output[-3000:]


def broken_off(root: Path, name: str, copied_to: str) -> Path:
    """A copy of a run as it was after its first iteration."""
    copy = root / "two" / copied_to
    shutil.copytree(root / "two" / name, copy)
    shutil.rmtree(copy / "checkpoints" / "iteration-000002")
    return copy


def saved(out: Path, iteration: int = 2) -> dict[str, Tensor]:
    return load_file(out / "checkpoints" / f"iteration-{iteration:06d}" / "tensors.safetensors")


def distance(a: dict[str, Tensor], b: dict[str, Tensor], kind: str = "") -> float:
    assert a.keys() == b.keys()
    first, second = (torch.cat([t[n].flatten() for n in sorted(t) if n.startswith(kind)]).double() for t in (a, b))
    return float((first - second).norm() / first.norm())


@pytest.mark.parametrize("name", NAMES)
def test_zero_takes_the_steps_of_one_process(root: Path, name: str) -> None:
    one, two = saved(root / "one" / name), saved(root / "two" / name)
    assert distance(saved(root / "one" / name, 1), one, "weights/") > 1e-3
    for kind in ("weights/", "optimizer/", "ema/") if name == "zero-full" else ("weights/", "optimizer/"):
        assert distance(one, two, kind) < 1e-5


def test_a_resumed_run_under_zero_ends_with_the_same_bits(root: Path) -> None:
    assert distance(saved(root / "two" / "zero-full"), saved(root / "two" / "broken")) == 0


def test_a_run_under_zero_goes_on_without_it(root: Path) -> None:
    alone = broken_off(root, "zero-full", "alone")
    train(root, "zero-full", alone, resume=True)
    assert distance(saved(root / "two" / "zero-full"), saved(alone)) < 1e-5
