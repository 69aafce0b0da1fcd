"""`etude check-model` says of each check what it found, and refuses a model that fails one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from etude.cli.app import app
from support.tiny import flux, stable_diffusion
from support.tiny_flow import sana, z_image

MODELS = {"sana": (sana, "32"), "z-image": (z_image, "16"), "flux": (flux, "8"), "sd": (stable_diffusion, "8")}


@pytest.mark.parametrize("name", MODELS)
def test_a_sound_model_passes_every_check(name: str, tmp_path: Path) -> None:
    make, side = MODELS[name]
    make().save_pretrained(tmp_path / name)
    result = CliRunner().invoke(app, ["check-model", str(tmp_path / name), "--resolution", side])
    assert result.exit_code == 0, result.output
    for said in (
        "one by one: ",
        "guidance at",
        "plain pipeline's images: ",
        "reach exactly the adapter: ",
        "export draws",
    ):
        assert said in result.output
    assert result.output.endswith(f"{tmp_path / name} passes\n")


def test_a_model_that_does_not_draw_as_its_pipeline_does_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sana().save_pretrained(tmp_path)
    monkeypatch.setattr("etude.policies.deployment.first_order", lambda name, steps: {"solver_order": 2})
    result = CliRunner().invoke(app, ["check-model", str(tmp_path), "--resolution", "32"])
    assert result.exit_code == 1
    assert "the ODE plan does not draw the plain pipeline's images" in " ".join(result.output.split())


def test_a_pipeline_without_the_conventions_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    result = CliRunner().invoke(app, ["check-model", str(tmp_path)])
    assert result.exit_code == 1
    assert "it lacks transformer" in " ".join(result.output.split())
