"""The theory beside a study's gap covers every kernel that the study may train with."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from etude.registry import KERNELS
from etude.study.analysis import _theory
from etude.theory import Gaussian, QuadraticReward, levels, reward_gap

FLOW, SD = levels("flow", 10), levels("sd", 10)


def theory(kernel, eta, grid):
    """The row of a condition with this sampler, measured at these levels."""
    condition = SimpleNamespace(
        config=SimpleNamespace(sampling=SimpleNamespace(kernel=kernel)),
        eta=eta,
        results=[SimpleNamespace(levels={"10": {"a": grid.a.tolist(), "s": grid.s.tolist()}})],
    )
    return _theory(condition, 10)


@pytest.mark.parametrize("kernel", list(KERNELS.builtin))
def test_every_kernel_has_the_exact_gap_on_a_flow_model(kernel):
    row = theory(kernel, 0.7, FLOW)
    exact = reward_gap(Gaussian(0.0, 1.0), FLOW, QuadraticReward(1.0), 0.7, kernel=kernel)
    assert row["total"] == pytest.approx(exact, rel=1e-12)
    assert row["prior"] == 0
    assert np.isfinite(list(row.values())).all()


def test_a_kernel_that_the_levels_lack_and_an_eta_schedule_have_none():
    assert theory("flow_sde", 0.7, SD) is None
    assert theory("gddim", None, SD) is None
    assert theory("cps", 0.7, SD)["prior"] != 0
