"""The benchmark for a GPU runs on a CPU with tiny models, divides what it counted by what it measured, and outlasts a failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35", "flux", "flux2-klein", "z-image", "qwen-image", "sana"])
def test_a_model_has_the_parameters_of_the_published_one_and_its_outline_holds_no_numbers(
    name: str, tmp_path: Path
) -> None:
    from benchmarks.full_size import MODELS, save_outline

    millions = {"sd15": 859.5, "sdxl": 2567.5, "sd35": 2243.2, "flux": 11901.4, "flux2-klein": 3875.5}
    millions |= {"z-image": 6154.9, "qwen-image": 20430.4, "sana": 1604.5}
    with torch.device("meta"):
        pipeline = MODELS[name](False)
    denoiser = pipeline.components.get("unet") or pipeline.transformer
    assert sum(p.numel() for p in denoiser.parameters()) / 1e6 == pytest.approx(millions[name], abs=0.1)
    place = save_outline(name, tmp_path / name, tiny=True)
    file = next((place / ("unet" if name.startswith(("sd1", "sdx")) else "transformer")).glob("*.safetensors"))
    assert file.stat().st_blocks * 512 < file.stat().st_size


def test_a_measured_process_reports_phases_flops_and_memory_of_a_tiny_model() -> None:
    from benchmarks import gpu, gpu_side

    case = next(case for case in gpu.CASES if case.name == "sd15 512")
    settings = {"model": case.model, "tiny": True, "dtype": "float32", "config": case.config(True)}
    info, handlers = gpu_side.start(settings)
    report = {**info, **handlers["measure"]()}
    assert set(report["phases"]) == {"rollout", "rewards", "update", "evaluation", "total"}
    rollout, update = (report["network"][phase] for phase in ("rollout", "update"))
    assert rollout["rows"] == update["rows"] == 4 * 4  # images and steps, each of them stochastic
    # Frozen weights need no gradient: a backward has the products of a forward, but the first layers'.
    assert 1.5 < update["flops"] / update["rows"] / (rollout["flops"] / rollout["rows"]) < 3
    assert min(report["peak_bytes"], report["estimated_bytes"], report["rate"]) > 0
    rows = gpu._rows(case, {case.name: report})
    assert [row[1] for row in rows] == list(report["phases"])
    assert all(head.ratio.median > 0 for head in gpu._headlines(case, {case.name: report}))


FASTER = {"rollout": 1.0, "rewards": 0.1, "update": 2.0, "total": 3.1}
REPORT = {
    "device": "some card",
    "versions": {"torch": "1"},
    "rate": 100e12,
    "build_seconds": 1.0,
    "phases": {"rollout": 2.0, "rewards": 0.1, "update": 4.0, "total": 6.1},
    "network": {
        "rollout": {"flops": 100e12, "seconds": 1.9, "rows": 10, "size": 5},
        "update": {"flops": 160e12, "seconds": 3.9, "rows": 8, "size": 4},
    },
    "peak_bytes": 20 * 2**30,
    "estimated_bytes": 19 * 2**30,
    "sizes": {"rollout": 5, "replay": 4},
}


def test_the_use_of_a_card_is_counted_flops_over_seconds_and_rate() -> None:
    from benchmarks import gpu

    cases = {case.name: case for case in gpu.CASES}
    measured = {"sd15 512": REPORT, "sd15 512, channels last": REPORT | {"phases": FASTER, "network": {}}}
    plain, variant = (gpu._headlines(cases[name], measured) for name in measured)
    assert [head.ratio.median for head in plain] == pytest.approx([0.5, 0.4, 6.0 / 5.8, 0.95])
    assert [head.ratio.median for head in variant] == pytest.approx([2.0, 1.0, 0.8, 0.95])
    assert variant[0].name == "sd15 512, channels last: plain / this"


def test_settings_are_laid_over_a_case_and_name_what_exists() -> None:
    from benchmarks import gpu
    from etude.config import parse_config

    for case in gpu.CASES:
        config = parse_config({"model": case.model, "dtype": "bfloat16", **case.config(tiny=False)})
        for name, value in case.settings.items():
            section, _, rest = name.partition(".")
            found = getattr(config, section)
            assert (getattr(found, rest) if rest else found) == value


def test_a_process_that_fails_or_hangs_costs_no_other_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import gpu

    written = []

    class FakeSide:
        def __init__(self, python: str, module: str, settings: dict[str, Any], **options: Any) -> None:
            self.model, self.imported = settings["model"], False

        def stop(self) -> None:
            pass

        def __enter__(self) -> FakeSide:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def send(self, do: str) -> None:
            assert do == "measure"

        def receive(self, within: float) -> dict[str, Any]:
            if not self.imported:
                self.imported = True
                return {"device": "some card", "versions": {"torch": "1"}}
            if self.model == "sdxl":
                raise TimeoutError(f"no reply within {within:g} seconds")
            if self.model == "sd35":
                raise RuntimeError("a measured process ended with exit code 1")
            return REPORT

    monkeypatch.setattr(gpu, "Side", FakeSide)
    cases = [case for case in gpu.CASES if case.target is not None and not case.variant]
    result = gpu.run(cases, True, tmp_path, 5.0, lambda so_far: written.append(len(so_far.headlines)))
    assert written == [4, 8, 8, 8, 12]
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert set(stored["measurements"]["failed"]) == {"sdxl 1024", "sd35 512"}
    assert [row[-1] for row in result.rows if row[1] == "failed"] == [
        "no reply within 5 seconds",
        "a measured process ended with exit code 1",
    ]
    with pytest.raises(RuntimeError, match="no case could be measured: no reply"):
        gpu.run([case for case in cases if case.model == "sdxl"], True, tmp_path, 5.0)
    late = gpu.run(cases[:1] * 2, True, tmp_path, 5.0, within=60.0)
    assert not late.measurements["failed"]


def test_a_process_without_a_reply_in_time_is_a_time_out() -> None:
    import sys

    from benchmarks.processes import Side

    with (
        pytest.raises(TimeoutError, match="no reply within 0 seconds"),
        Side(sys.executable, "benchmarks.pipeline_side", {}, wait=False) as side,
    ):
        side.receive(0)
