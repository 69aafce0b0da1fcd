"""`etude theory peers`: the peers' noise levels as gDDIM etas, and the page that shows them."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from etude.cli.theory import app
from etude.errors import EtudeError
from etude.sampling.kernels import GDDIM, FlowSDE, equivalent_eta
from etude.sampling.paths import FlowPath, Grid
from etude.theory.peers import PUBLISHED, peer_table
from support.kernels import KERNELS

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "kernels.md"


def peers(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["peers", *arguments], terminal_width=160)
    if result.exception:
        raise result.exception
    return result.output


@pytest.mark.parametrize("arguments", [(), ("--steps", "10", "--pipeline", "sd3")])
def test_the_pages_tables_are_what_the_command_prints(arguments):
    assert peers(*arguments, "--markdown") in PAGE.read_text()
    assert ("etude theory peers " + " ".join(arguments)).strip() in PAGE.read_text()


def test_the_printed_table_has_every_published_level():
    lines = peers().splitlines()
    for method, kernel, level, _ in PUBLISHED:
        assert any(line.startswith(method) and f" {kernel} " in line and f" {level:g} " in line for line in lines)


def test_the_page_names_every_kernel_and_every_source():
    text = PAGE.read_text()
    assert all(f"`{name}` | `{kernel.__name__}`" in text for name, kernel in KERNELS.items())
    assert all(
        source in text for method, _, _, source in PUBLISHED if method not in ("DDPM posterior", "etude's recipes")
    )


def test_what_the_page_says_of_every_step_holds():
    def etas(noise: float, grid: Grid) -> list[float]:
        levels = list(zip(grid.a.tolist(), grid.s.tolist(), strict=True))[1:-1]
        return [float(equivalent_eta(FlowSDE(noise), *step)) for step in pairwise(levels)]

    path = FlowPath.from_config({"shift": 3.0})
    flux, sd3 = path.grid(25, [1 - i / 25 for i in range(25)]), path.grid(10)
    usual, largest, short = etas(0.7, flux), etas(1.2, flux), etas(0.7, sd3)
    assert (round(min(usual), 2), round(max(usual[:-1]), 2), round(usual[-1], 2)) == (0.54, 0.74, 1.81)
    assert round(min(largest), 2) == 0.97
    assert [i for i, eta in enumerate(largest) if math.isinf(eta)] == [0, 21, 22]
    assert (round(min(short), 2), round(max(short[:-2]), 2), short[-2:]) == (0.64, 0.81, [math.inf, math.inf])
    text = " ".join(PAGE.read_text().split())
    assert "0.7 is eta 0.54 to 0.74 at every step but the last, which is 1.81. There 1.2 is never below 0.97" in text
    assert "0.7 is 0.64 to 0.81 until the last two steps" in text


@pytest.mark.parametrize("pipeline", ["flux", "sd3"])
def test_gddim_at_the_eta_shown_has_the_peers_std(pipeline):
    table = peer_table(20, 2.0, pipeline)
    assert len(table.steps) == 3
    assert table.steps[0][0] < 1
    assert table.steps[-1][1] > 0
    for row in table.rows:
        for (start, end), eta in zip(table.steps, row.etas, strict=True):
            levels = (1 - start, start), (1 - end, end)
            std = float(KERNELS[row.kernel](row.level).coefficients(*levels).std)
            if math.isinf(eta):
                assert std >= end * (1 - 1e-12)
            else:
                assert float(GDDIM(eta).coefficients(*levels).std) == pytest.approx(std, rel=1e-9)


def test_more_steps_bring_a_peers_eta_to_the_one_of_short_steps():
    flow = next(row for row in peer_table(1000, 3.0).rows if row.method == "Flow-GRPO")
    assert flow.small_step == pytest.approx(0.7 / math.sqrt(2))
    assert flow.etas[1] == pytest.approx(flow.small_step, rel=2e-3)


def test_a_row_of_ones_own_is_added():
    row = peer_table(25, 3.0, levels=[("flow_sde", 0.9)]).rows[-1]
    assert (row.method, row.kernel, row.level) == ("yours", "flow_sde", 0.9)
    assert "0.636" in peers("--level", "flow_sde=0.9").splitlines()[-1]


def test_three_steps_have_one_stochastic_step():
    assert len(set(peer_table(3).steps)) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "2"], "2 steps have no stochastic one"),
        (["--steps", "0"], "--steps is 0"),
        (["--shift", "0"], "--shift is 0"),
        (["--shift", "nan"], "finite"),
        (["--pipeline", "sdxl"], "unknown pipeline 'sdxl'"),
        (["--level", "flow_sd=0.9"], "did you mean 'flow_sde'"),
        (["--level", "flow_sde"], "write flow_sde=0.9"),
        (["--level", "cps=1.5"], "folds back"),
        (["--level", "gddim=nan"], "finite"),
    ],
)
def test_a_wrong_argument_is_an_error_that_says_what_to_give(arguments, says):
    with pytest.raises(EtudeError, match=says):
        peers(*arguments)


def test_the_theory_without_a_command_is_what_it_was(tmp_path):
    result = CliRunner().invoke(app, ["--steps", "10", "--eta", "1", "--no-figures", "--out", str(tmp_path)])
    assert result.exit_code == 0
    assert (tmp_path / "theory.json").exists()
