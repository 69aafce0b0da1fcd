"""Runs on tiny flow transformers: each family trains, resumes to the same bits, ships what it drew, and is measured by the commands."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from etude.cli.app import app
from etude.config import TrainConfig, parse_config
from etude.policies import load_policy
from etude.policies.flow import FlowPolicy
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.report.grids import image_grid
from etude.sampling.noise import NoiseSource
from etude.sampling.sampler import ODE, SDE
from etude.sampling.solvers import SOLVERS
from etude.training.dry_run import resolved
from etude.training.trainer import Trainer
from support.small_runs import outcome, train_until
from support.tiny_flow import FAMILIES, ernie_image, hidream, lumina2

WINDOW = {"strategy": "progressive", "size": 1, "iters_per_shift": 1}
PPO = {"clip_range": None, "clip_nats": 1.6, "kl_coef": 0.1, "batch_size": 4}
RUNS: dict[str, dict[str, Any]] = {
    "flux2-klein": {"sampling": {"window": WINDOW}},
    "z-image": {"objective": {"kind": "nft", "options": {"levels": 2}, "batch_size": 4}},
    "qwen-image": {"objective": {"kind": "dpo", "options": {"levels": 2}, "batch_size": 4}},
    "sana": {"sampling": {"window": WINDOW}, "resolution": 32},
    "wan": {
        "objective": {"kind": "awm", "options": {"levels": 2}, "batch_size": 4},
        "memory": {"gradient_checkpointing": True, "offload": True},
    },
}
"""Settings of each family's run: every objective, and what saves memory."""


def mebibytes(line: str) -> float:
    assert line.endswith("MiB")
    return float(line.split()[-2])


@pytest.fixture(scope="module", params=RUNS)
def settings(request: Any, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    root = tmp_path_factory.mktemp("family")
    (root / "prompts.txt").write_text("red heart\na pizza beside a tiger\n")
    FAMILIES[request.param]().save_pretrained(root / request.param)
    own = RUNS[request.param]
    return parse_config(
        {
            "model": str(root / request.param),
            "resolution": 16,
            "iterations": 2,
            "rewards": {"colorfulness": 1.0},
            "prompts": {"train": str(root / "prompts.txt"), "evaluation": str(root / "prompts.txt")},
            "rollout": {"images_per_iteration": 4, "images_per_prompt": 2, "batch_size": 4},
            "objective": PPO,
            "advantage": {"kind": "group"},
            "evaluation": {"every": 2, "num_images": 2, "grid_images": 2},
            **own,
            "sampling": {"eta": 1.0, "num_steps": 3, "guidance_scale": 2.0, **own.get("sampling", {})},
        }
    )


@pytest.fixture(scope="module", autouse=True)
def _no_report() -> Iterator[None]:
    """Leaves out what takes most of the time of such runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("etude.training.finish.write_report", lambda directory: directory)
        yield


@pytest.fixture(scope="module")
def whole(settings: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one piece."""
    place = tmp_path_factory.mktemp("runs") / "whole"
    Trainer(settings, place).train()
    return place


def command(*words: str | Path) -> None:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output


def test_a_run_that_is_broken_off_and_resumed_ends_with_the_bits_of_a_whole_one(
    settings: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    train_until(Trainer(settings, tmp_path / "halves"), 2)
    Trainer(settings, tmp_path / "halves", resume=True).train()
    assert outcome(tmp_path / "halves") == outcome(whole)
    first = outcome(whole)[1][1]
    if settings.objective.kind == "ppo":
        assert first["rollout_ratio_deviation"] <= 1e-4
    card = (whole / "lora" / "README.md").read_text()
    if "wan" in settings.model:
        assert "pipe.scheduler = UniPCMultistepScheduler.from_config(" in card
        assert "num_frames=1, height=16, width=16).frames[0][0]" in card
    if "sana" in settings.model:
        assert "DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)" in card
        assert "use_resolution_binning=False" in card
    if "qwen" in settings.model:
        assert "true_cfg_scale=2, negative_prompt=' '" in card


def by_the_card(run: Path, policy: FlowPolicy) -> Tensor:
    """Pictures of "red heart" by the ODE and by the SDE of a run's card, uint8 `[2, 3, h, w]`, from the noise of image 0."""
    noise, at = NoiseSource(0, "evaluation"), iter(range(3))

    def told_its_noise(scheduler: Any) -> None:
        step = scheduler.step

        def noisy(*arguments: Any, **options: Any) -> Any:
            drawn = noise.step([0], next(at), policy.latent_shape)
            if drawn.shape != arguments[2].shape:  # FLUX.2's scheduler steps tokens
                drawn = drawn.flatten(2).transpose(1, 2)
            return step(*arguments, **options, variance_noise=drawn)

        scheduler.step = noisy

    ode, sde = re.findall(r"```python\n(.*?)```", (run / "lora" / "README.md").read_text(), re.DOTALL)
    text = f"{ode}\node = image\n" + sde.replace("image =", "told_its_noise(pipe.scheduler)\nimage =")
    text = text.replace('"a prompt"', '"red heart", latents=noise, output_type="np"')
    (run / "card.py").write_text(text)
    given = {"noise": noise.initial([0], policy.latent_shape), "told_its_noise": told_its_noise}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run)
        drawn = runpy.run_path("card.py", init_globals=given)
    return torch.from_numpy(np.rint(np.stack([drawn["ode"], drawn["image"]]) * 255).astype(np.uint8)).movedim(-1, 1)


def test_etude_sample_draws_what_the_lines_of_the_card_draw(settings: TrainConfig, whole: Path, tmp_path: Path) -> None:
    options = ("--lora", whole / "lora", "--eta", "0", "--eta", "1", "--out", tmp_path / "ours.png")
    command("sample", settings.model, "--prompt", "red heart", *options)
    policy = load_policy(settings.model, device="cpu", resolution=settings.resolution)
    assert isinstance(policy, FlowPolicy)
    pictures = by_the_card(whole, policy)
    labels = [f"red heart, {sampler.label}" for sampler in (ODE(3), SDE(1.0, 3))]
    ours, theirs = Image.open(tmp_path / "ours.png"), image_grid(pictures, 1, labels=labels)
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))
    assert difference.max() <= 1  # one grey level: the rounding of 1e-6
    assert pictures[0].float().std() > 1
    assert not torch.equal(*pictures)


@pytest.mark.parametrize("settings", ["z-image", "qwen-image", "wan"], indirect=True)
def test_etude_gap_measures_again_what_the_run_measured_at_its_end(
    settings: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    options = ("--reward", "colorfulness", "--samples", "2", "--prompts", settings.prompts.evaluation)
    command("gap", settings.model, "--lora", whole / "lora", *options, "--json", tmp_path / "gap.json")
    (row,) = json.loads((tmp_path / "gap.json").read_text())["rows"]
    final = json.loads((whole / "summary.json").read_text())["final"]
    for name in ("ode", "sde", "improvement", "gap"):
        assert row[name]["mean"] == pytest.approx(final[name]["colorfulness"]["mean"], abs=0.02), name


@pytest.mark.parametrize("settings", ["z-image"], indirect=True)
def test_etude_bench_measures_what_etude_gap_measures(settings: TrainConfig, whole: Path, tmp_path: Path) -> None:
    prompts, size = settings.prompts.evaluation, settings.resolution
    assert size is not None
    changes = f"{{solvers: [heun], steps: [2], guidance: [1], sizes: [{2 * size}]}}"
    sampler = f"{{steps: 3, guidance: 2, size: {size}}}\nsamplers: [{{eta: 1}}]\nsensitivity: {changes}"
    protocol = f"name: tiny\nprompts: {prompts}\nnum_prompts: 2\nimages_per_prompt: 1\nsampler: {sampler}\n"
    (tmp_path / "tiny.yaml").write_text(protocol + "rewards: [colorfulness]\n")
    adapter = ("--lora", whole / "lora", "--sensitivity", "--out", tmp_path / "bench")
    command("bench", settings.model, "--protocol", tmp_path / "tiny.yaml", *adapter)
    results = json.loads((tmp_path / "bench" / "results.json").read_text())
    final = json.loads((whole / "summary.json").read_text())["final"]
    (models,) = results["between_models"]
    assert models["difference"]["colorfulness"]["mean"] == pytest.approx(
        final["improvement"]["colorfulness"]["mean"], abs=0.02
    )
    rows = [row for row in results["around_the_sampler"] if row["model"] == models["model"]]
    (gap,) = [row["difference"]["colorfulness"]["mean"] for row in rows if row["kind"] == "sampler"]
    assert -gap == pytest.approx(final["gap"]["colorfulness"]["mean"], abs=0.02)
    assert any(row["sampler"].endswith(f"{2 * size} px") for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["z-image"], indirect=True)
def test_etude_advise_trains_pilots_and_draws_the_best_with_every_solver(settings: TrainConfig, tmp_path: Path) -> None:
    recipe = parse_config(settings.model_dump(mode="json") | {"objective": PPO, "iterations": 1})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    options = ("--budget", "60", "--eta", "0.5", "--eta", "1", "--json", tmp_path / "advice.json")
    command("advise", settings.model, "--recipe", tmp_path / "recipe.yaml", "--reward", "colorfulness", *options)
    advice = json.loads((tmp_path / "advice.json").read_text())
    assert advice["suggestion"]["eta"] in (0.5, 1.0)
    assert {row["solver"] for row in advice["deployment"]} == set(SOLVERS) - {"euler"}  # which is ddim here


def test_a_dry_run_of_the_outline_says_what_one_of_the_model_says(settings: TrainConfig, tmp_path: Path) -> None:
    outline, model = load_source(ModelSource.of(settings), outline=True), load_source(ModelSource.of(settings), "cpu")
    said = [resolved(settings, tmp_path / "run", policy=policy).splitlines() for policy in (outline, model)]
    for ours, theirs in zip(*said, strict=True):
        if "roughly" not in ours:
            assert ours == theirs
        else:  # rotary embeddings are tensors beside parameters and buffers, which an outline leaves out
            assert abs(mebibytes(ours) - mebibytes(theirs)) < 1


@pytest.mark.parametrize(
    ("make", "resolution", "name"),
    [
        (ernie_image, 16, "ErnieImagePipeline"),
        (lambda: hidream(side=128), None, "HiDreamImagePipeline"),
        (lumina2, 16, "Lumina2Pipeline"),
    ],
)
def test_a_dry_run_says_what_it_cannot_reckon_of_a_pipeline_that_reads_numbers(
    make: Any, resolution: int | None, name: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path / "model")
    tree = {"model": str(tmp_path / "model"), "rewards": {"colorfulness": 1.0}}
    tree |= {"sampling": {"num_steps": 4, "guidance_scale": 2.0}, "resolution": resolution}
    said = resolved(parse_config(tree), tmp_path / "run")
    assert f"without activations: not reckoned, since the {name} computes with numbers" in said
    assert "frozen weights" in said
    assert "in all" not in said.partition("memory of the accelerator")[2]


@pytest.mark.parametrize("settings", ["z-image", "qwen-image", "sana"], indirect=True)
def test_a_dry_run_reckons_with_the_bytes_of_a_prompt_that_the_model_encodes(settings: TrainConfig) -> None:
    """Also where `encode_prompt` selects tokens by a mask, with guidance's own prompt beside."""
    outline, model = load_source(ModelSource.of(settings), outline=True), load_source(ModelSource.of(settings), "cpu")
    for prompt in ("red heart", "a pizza beside a tiger"):
        told, found = (policy.encode([prompt]) for policy in (outline, model))
        for ours, theirs in ((told.prompt, found.prompt), (told.unconditional, found.unconditional)):
            assert {name: rows.nbytes for name, rows in ours.items()} == {n: rows.nbytes for n, rows in theirs.items()}
    assert isinstance(model, FlowPolicy)
    before = model._encoded.size
    grown = sum(rows.nbytes for rows in outline.encode(["a tiger"]).prompt.values())
    model.encode(["a tiger"])
    assert model._encoded.size - before == grown > 0
