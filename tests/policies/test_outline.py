"""An outline says of a model all that its weights' shapes say, without reading a weight or needing a device for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from etude.config import TrainConfig, parse_config
from etude.errors import EtudeError
from etude.policies import load_policy
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.sampling.shapes import ShapeTensor
from etude.training.dry_run import resolved
from support.tiny import flux, save_stable_diffusion, stable_diffusion, stable_diffusion_3, stable_diffusion_xl

FAMILIES = {
    "stable-diffusion": stable_diffusion,
    "stable-diffusion-xl": stable_diffusion_xl,
    "stable-diffusion-3": stable_diffusion_3,
    "stable-diffusion-3-without-t5": lambda: stable_diffusion_3(with_t5=False),
    "flux": flux,
}


def config(model: Path, **changes: Any) -> TrainConfig:
    return parse_config(
        {
            "model": str(model),
            "dtype": "bfloat16",
            "rewards": {"colorfulness": 1.0},
            "sampling": {"num_steps": 4, "guidance_scale": 1.0},
            "rollout": {"images_per_iteration": 8},
            "objective": {"kl_coef": 0.1},
            "evaluation": {"num_images": 4},
            **changes,
        }
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dry_run_of_the_outline_says_what_one_of_the_model_says(name: str, tmp_path: Path) -> None:
    FAMILIES[name]().save_pretrained(tmp_path / "model")
    settings = config(tmp_path / "model", memory={"offload": True, "gradient_checkpointing": True})
    outline, model = load_source(ModelSource.of(settings), outline=True), load_source(ModelSource.of(settings), "cpu")
    said = [resolved(settings, tmp_path / "run", policy=policy) for policy in (outline, model)]
    assert said[0] == said[1]
    assert all(isinstance(p, ShapeTensor) for name, p in outline.network.named_parameters() if "lora" not in name)


def test_full_fine_tuning_is_reckoned_from_the_outline_too(tmp_path: Path) -> None:
    settings = config(save_stable_diffusion(tmp_path / "model"), lora={"rank": 0}, dtype="float32")
    said = [
        resolved(settings, tmp_path / "run", policy=load_source(ModelSource.of(settings), "cpu", outline))
        for outline in (True, False)
    ]
    assert said[0] == said[1]


def test_an_outline_reads_headers_alone_and_a_directory_without_weights_is_named(tmp_path: Path) -> None:
    place = save_stable_diffusion(tmp_path / "model")
    weights = place / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(weights, framework="pt") as file:
        count = sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in list(file.keys()))
    assert sum(p.numel() for p in load_policy(place, outline=True).network.parameters()) == count
    weights.write_bytes(b"not a header")
    with pytest.raises(EtudeError, match="cannot be loaded"):
        load_policy(place, outline=True)
    weights.unlink()
    with pytest.raises(EtudeError, match="no safetensors weights of its unet"):
        load_policy(place, outline=True)


@pytest.mark.parametrize("outline", [True, False])
def test_parts_that_read_pictures_are_not_looked_for(tmp_path: Path, outline: bool) -> None:
    place = save_stable_diffusion(tmp_path / "model")
    index = json.loads((place / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]  # which transformers 5 no longer has
    index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (place / "model_index.json").write_text(json.dumps(index))
    policy = load_policy(place, device="cpu", outline=outline)
    assert policy.pipeline.feature_extractor is policy.pipeline.image_encoder is policy.pipeline.safety_checker is None


def test_code_of_a_pipelines_own_is_refused(tmp_path: Path) -> None:
    place = save_stable_diffusion(tmp_path / "model")
    index = json.loads((place / "model_index.json").read_text())
    index["unet"] = ["my_unet", "UNet2DConditionModel"]
    (place / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(EtudeError, match="takes its unet from 'my_unet'"):
        load_policy(place, outline=True)


def test_a_missing_configuration_is_one_clear_error(tmp_path: Path) -> None:
    place = save_stable_diffusion(tmp_path / "model")
    (place / "unet" / "config.json").unlink()
    with pytest.raises(EtudeError, match="cannot be loaded"):
        load_policy(place, outline=True)
    shutil.rmtree(place)
    with pytest.raises(EtudeError):
        load_policy(place, outline=True)
