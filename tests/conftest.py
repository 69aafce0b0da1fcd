"""One thread, no hub, no accelerator: a test computes the same thing on every machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

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
from hypothesis import settings

from etude.registry import REWARDS
from etude.rewards import reward

torch.set_num_threads(1)

# Property tests draw the same examples in every run; a deadline would measure the machine.
settings.register_profile("etude", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("etude")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many fuzzed cases ran, where any did."""
    fuzzing = sys.modules.get("fuzzing")
    if fuzzing is not None and fuzzing.CASES:
        subjects = ", ".join(f"{count} {subject}" for subject, count in sorted(fuzzing.CASES.items()))
        terminalreporter.write_line(f"{fuzzing.CASES.total()} fuzzed cases: {subjects}")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Each test starts from the same global torch generator, whatever ran before it."""
    torch.manual_seed(0)


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
