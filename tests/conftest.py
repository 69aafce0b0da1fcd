"""One thread, no hub, no accelerator: a test computes the same thing on every machine."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Before torch, transformers or huggingface_hub are imported: they read these once. Child processes inherit them.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["MPLBACKEND"] = "Agg"
os.environ["COLUMNS"] = "200"  # help and tables are not wrapped in the middle of what a test looks for

import pytest
import torch
import typer.testing
from hypothesis import settings

from etude.registry import REWARDS
from etude.rewards import reward
from support.figures import leave_figures_out
from support.fuzzing import pytest_sessionfinish, pytest_terminal_summary, pytest_testnodedown

__all__ = ["pytest_sessionfinish", "pytest_terminal_summary", "pytest_testnodedown"]

torch.set_num_threads(1)
# A test runner of typer builds the whole command line anew for each command: a tenth of a second.
typer.testing._get_command = cache(typer.testing._get_command)

# Property tests draw the same examples in every run; a deadline would measure the machine.
settings.register_profile("etude", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("etude")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Gives `--numprocesses auto` a worker for each CPU at hand, 8 at most: each takes 0.7 GB of memory."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the files that take longest first in a worker, so that the last one left to a single worker is short."""
    if not hasattr(config, "workerinput"):
        return
    cost: Counter[Path] = Counter()
    for item in items:
        cost[item.path] += 100 if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: -cost[item.path])


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Each test starts from the same global torch generator, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _figures_where_they_are_tested(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reports hold empty figures outside of the tests of reports and studies: to draw takes longer than a small run."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name not in {"report", "study"}:
            leave_figures_out(patch.setattr)
        yield


def _rewards_put_back() -> Iterator[None]:
    tables = REWARDS.registered, reward._factories, reward._loaded
    before = [table.copy() for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture(autouse=True, scope="module")
def _rewards_of_the_module() -> Iterator[None]:
    """Rewards that a module's fixtures register are gone after it."""
    yield from _rewards_put_back()


@pytest.fixture(autouse=True)
def _own_rewards(_rewards_of_the_module: None) -> Iterator[None]:
    """Rewards that a test registers are gone after it."""
    yield from _rewards_put_back()
