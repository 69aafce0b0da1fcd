"""An adapter is taken whole, as the plain pipeline takes it, or refused in one sentence; the base model is without all of it."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from etude.config import LoraConfig, parse_config
from etude.errors import EtudeError
from etude.policies import load_policy
from etude.policies.adapter_file import WEIGHTS
from etude.policies.flux import FluxPolicy
from etude.policies.kohya import KOHYA_WEIGHTS
from etude.policies.pipeline import PipelinePolicy
from etude.policies.stable_diffusion import StableDiffusionPolicy
from etude.policies.stable_diffusion_3 import StableDiffusion3Policy
from etude.policies.stable_diffusion_xl import StableDiffusionXLPolicy
from etude.sampling.sampler import ODE
from etude.training.dry_run import resolved
from etude.training.trainer import Trainer
from support.adapters import ROWS, AdapterRow, kohya, kohya_text, peft, rand, table, write
from support.tiny import flux, save_stable_diffusion, stable_diffusion, stable_diffusion_3, stable_diffusion_xl

POLICIES: dict[Any, type[PipelinePolicy]] = {
    stable_diffusion: StableDiffusionPolicy,
    stable_diffusion_xl: StableDiffusionXLPolicy,
    stable_diffusion_3: StableDiffusion3Policy,
    flux: FluxPolicy,
}
READ = [row for row in ROWS if row.says is None]
PROMPTS = ["red heart", "pizza"]
GUIDANCE = 3.0


def named(row: AdapterRow) -> str:
    return row.what


def evaluated(policy: PipelinePolicy) -> torch.Tensor:
    """Predictions at one state, which every weight that a prompt reaches determines."""
    x = rand(2, *policy.latent_shape)
    with torch.no_grad():
        return policy.predict(x, policy.grid(4).timesteps[:2], policy.encode(PROMPTS), GUIDANCE)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal up to the rounding of large changes, far below that of a layer at another strength."""
    return bool((one - other).norm() <= 1e-3 * other.norm())


def made(row: AdapterRow, tmp_path: Path) -> Path:
    return row.make(row.pipeline(), tmp_path / "adapter")


@pytest.mark.parametrize("row", READ, ids=named)
def test_an_adapter_acts_as_in_the_plain_pipeline_and_the_reference_is_without_it(row, tmp_path):
    place, kind = made(row, tmp_path), POLICIES[row.pipeline]
    policy, base = kind(row.pipeline()), evaluated(kind(row.pipeline()))
    assert torch.equal(evaluated(policy), base)  # and the prompts are in the cache
    policy.load_lora(place)
    tuned = evaluated(policy)
    assert not close(tuned, base)
    conditioning = policy.encode(PROMPTS)
    x, timesteps = rand(2, *policy.latent_shape), policy.grid(4).timesteps[:2]
    with policy.reference():
        assert torch.equal(evaluated(policy), base)
        assert torch.equal(policy.predict(x, timesteps, conditioning, GUIDANCE), base)  # encoded before
    assert torch.equal(evaluated(policy), tuned)
    if row.as_plain:
        plain = row.pipeline()
        plain.load_lora_weights(load_file(place) if place.is_file() else place)
        assert close(evaluated(kind(plain)), tuned)


@pytest.mark.parametrize("row", [row for row in ROWS if row.says is not None], ids=named)
def test_an_adapter_that_would_be_taken_in_part_is_refused_and_leaves_the_model_as_it_was(row, tmp_path):
    place, policy = made(row, tmp_path), POLICIES[row.pipeline](row.pipeline())
    before = evaluated(policy)
    sentences = []
    for load in (policy.load_lora, policy.continue_lora):
        with pytest.raises(EtudeError, match=row.says) as refusal:
            load(place)
        sentences.append(str(refusal.value).partition(" ")[2])
    assert sentences[0] == sentences[1]
    assert sentences[0].endswith(".")
    assert torch.equal(evaluated(policy), before)
    assert not policy.has_reference


def test_each_layer_of_a_kohya_file_has_its_own_strength(tmp_path):
    """W + alpha / rank up down for each layer, and 1 in place of an alpha that is absent."""
    ranks, alphas = (4, 2, 8), (2.0, None, 1.0, 8.0)
    plain = stable_diffusion()
    text = {"ranks": ranks, "alphas": alphas}
    tensors = kohya(plain.unet, "lora_unet", **text) | kohya_text(plain.text_encoder, **text)
    policy = StableDiffusionPolicy(stable_diffusion())
    policy.load_lora(write(tmp_path / "mixed", tensors))
    merge(plain.unet, "lora_unet_", tensors)
    merge(plain.text_encoder, "lora_te_text_model_", tensors)
    merged = evaluated(StableDiffusionPolicy(plain))
    assert close(evaluated(policy), merged)
    policy.export(tmp_path / "export")  # whose configuration holds the strengths
    again = stable_diffusion()
    again.load_lora_weights(tmp_path / "export")
    assert close(evaluated(StableDiffusionPolicy(again)), merged)


@pytest.mark.parametrize("pipeline", [stable_diffusion, flux])
def test_alphas_beside_pefts_names_are_strengths(pipeline, tmp_path):
    """That of a file whose second factors are multiplied by alpha / rank instead."""
    (row,) = [row for row in ROWS if row.pipeline is pipeline and "alphas as tensors" in row.what]
    kind, place = POLICIES[pipeline], row.make(pipeline(), tmp_path / "alphas")
    tensors = load_file(place / WEIGHTS)
    scaled = {
        name: tensor * tensors[name.replace("lora_B.weight", "alpha")] / 4 if "lora_B" in name else tensor
        for name, tensor in tensors.items()
        if not name.endswith(".alpha")
    }
    given, multiplied = kind(pipeline()), kind(pipeline())
    given.load_lora(place)
    multiplied.load_lora(write(tmp_path / "scaled", scaled))
    assert close(evaluated(given), evaluated(multiplied))


def test_an_alpha_that_contradicts_the_configuration_is_refused(tmp_path):
    tensors, configuration = peft(stable_diffusion().unet, "unet")
    layer = next(name for name in tensors if name.endswith("lora_A.weight")).removesuffix(".lora_A.weight")
    policy = StableDiffusionPolicy(stable_diffusion())
    with pytest.raises(EtudeError, match=r"contradicts itself: .* the strength 2, its alpha 0\.25"):
        policy.load_lora(write(tmp_path / "one", tensors | {f"{layer}.alpha": torch.tensor(1.0)}, configuration))
    policy.load_lora(write(tmp_path / "two", tensors | {f"{layer}.alpha": torch.tensor(8.0)}, configuration))


def test_a_pipeline_that_holds_an_adapter_of_its_own_has_the_model_without_it_as_reference(tmp_path):
    place = write(tmp_path, kohya(stable_diffusion().unet, "lora_unet") | kohya_text(stable_diffusion().text_encoder))
    pipeline, base = stable_diffusion(), evaluated(StableDiffusionPolicy(stable_diffusion()))
    pipeline.load_lora_weights(place)
    policy = StableDiffusionPolicy(pipeline)
    assert policy.has_reference
    assert not close(evaluated(policy), base)
    with policy.reference():
        assert torch.equal(evaluated(policy), base)


def merge(network: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    """Adds a kohya file to the weights, as its authors' tools do."""
    for name, module in network.named_modules():
        key = prefix + name.replace(".", "_")
        if f"{key}.lora_up.weight" in tensors:
            down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
            alpha = tensors.get(f"{key}.alpha", torch.tensor(float(len(down))))
            module.weight.data += alpha / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)


def test_what_changes_nothing_may_be_left_out(tmp_path):
    pipeline = stable_diffusion()
    tensors = {
        name: torch.zeros_like(t) if name.endswith("lora_up.weight") else t
        for name, t in kohya(pipeline.unet, "lora_unet").items()
    }
    tensors["lora_unet_conv_in.diff_b"] = torch.zeros(16)
    policy = StableDiffusionPolicy(pipeline)
    base = evaluated(policy)
    policy.load_lora(write(tmp_path, tensors))
    assert torch.allclose(evaluated(policy), base)


def test_a_second_adapter_is_refused(tmp_path):
    policy = StableDiffusionPolicy(stable_diffusion())
    place = write(tmp_path, kohya(policy.pipeline.unet, "lora_unet"))
    policy.load_lora(place)
    tuned = evaluated(policy)
    with pytest.raises(EtudeError, match="holds an adapter already"):
        policy.load_lora(place)
    assert torch.equal(evaluated(policy), tuned)


@pytest.mark.parametrize("kind", list(POLICIES), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("alpha", [2.0, 7.0])
def test_kohyas_file_of_an_export_acts_as_the_adapter(kind, alpha, tmp_path):
    """By the layout of the published files, in which queries, keys and values of a transformer are one layer."""
    policy = POLICIES[kind](kind())
    unet = [*("to_q", "to_v", "to_out.0", "ff.net.2", "proj_in"), *("conv1", "conv_shortcut", "time_emb_proj", "conv")]
    targets = unet if policy.denoiser == "unet" else TRANSFORMER[kind]
    policy.add_lora(LoraConfig(rank=2, alpha=alpha, targets=targets), seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(policy.trainable().values()):
            parameter.copy_(0.2 * rand(*parameter.shape, seed=number))
    tuned = evaluated(policy)
    policy.export(tmp_path)
    tensors = load_file(tmp_path / KOHYA_WEIGHTS)
    assert {name.rpartition(".")[0] for name in tensors if name.endswith(".alpha")} == {
        n.split(".")[0] for n in tensors
    }
    plain = kind()
    if policy.denoiser == "unet":
        plain.load_lora_weights(tensors)
    else:
        merge_fused(plain.transformer, tensors)
    assert close(evaluated(POLICIES[kind](plain)), tuned)


TRANSFORMER: dict[Any, list[str]] = {
    flux: [
        "to_q",
        "to_k",
        "to_v",
        "add_v_proj",
        "to_out.0",
        "to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.2",
        "proj_mlp",
        "proj_out",
        "norm1.linear",
        "norm.linear",
        "x_embedder",
        "linear_1",
    ],
    stable_diffusion_3: [
        "to_q",
        "to_v",
        "add_k_proj",
        "to_out.0",
        "to_add_out",
        "ff.net.0.proj",
        "ff_context.net.2",
        "norm1.linear",
        "context_embedder",
        "linear_2",
    ],
}
QKV = ["to_q", "to_k", "to_v"]
ADDED = ["add_q_proj", "add_k_proj", "add_v_proj"]
INSIDE: list[tuple[str, str, list[str]]] = [
    (r"double_blocks_(\d+)_img_attn_qkv", "transformer_blocks.{}.attn.", QKV),
    (r"double_blocks_(\d+)_txt_attn_qkv", "transformer_blocks.{}.attn.", ADDED),
    (r"double_blocks_(\d+)_img_attn_proj", "transformer_blocks.{}.attn.", ["to_out.0"]),
    (r"double_blocks_(\d+)_txt_attn_proj", "transformer_blocks.{}.attn.", ["to_add_out"]),
    (r"double_blocks_(\d+)_img_mlp_0", "transformer_blocks.{}.ff.", ["net.0.proj"]),
    (r"double_blocks_(\d+)_img_mlp_2", "transformer_blocks.{}.ff.", ["net.2"]),
    (r"double_blocks_(\d+)_txt_mlp_2", "transformer_blocks.{}.ff_context.", ["net.2"]),
    (r"double_blocks_(\d+)_img_mod_lin", "transformer_blocks.{}.", ["norm1.linear"]),
    (r"single_blocks_(\d+)_linear1", "single_transformer_blocks.{}.", [*(f"attn.{name}" for name in QKV), "proj_mlp"]),
    (r"single_blocks_(\d+)_linear2", "single_transformer_blocks.{}.", ["proj_out"]),
    (r"single_blocks_(\d+)_modulation_lin", "single_transformer_blocks.{}.", ["norm.linear"]),
    (r"joint_blocks_(\d+)_x_block_attn_qkv", "transformer_blocks.{}.attn.", QKV),
    (r"joint_blocks_(\d+)_context_block_attn_qkv", "transformer_blocks.{}.attn.", ADDED),
    (r"joint_blocks_(\d+)_x_block_attn_proj", "transformer_blocks.{}.attn.", ["to_out.0"]),
    (r"joint_blocks_(\d+)_context_block_attn_proj", "transformer_blocks.{}.attn.", ["to_add_out"]),
    (r"joint_blocks_(\d+)_x_block_mlp_fc1", "transformer_blocks.{}.ff.", ["net.0.proj"]),
    (r"joint_blocks_(\d+)_context_block_mlp_fc2", "transformer_blocks.{}.ff_context.", ["net.2"]),
    (r"joint_blocks_(\d+)_x_block_adaLN_modulation_1", "transformer_blocks.{}.", ["norm1.linear"]),
    ("img_in", "", ["x_embedder"]),
    ("final_layer_linear", "", ["proj_out"]),
    ("time_in_in_layer", "time_text_embed.timestep_embedder.", ["linear_1"]),
    ("guidance_in_in_layer", "time_text_embed.guidance_embedder.", ["linear_1"]),
    ("vector_in_in_layer", "time_text_embed.text_embedder.", ["linear_1"]),
    ("context_embedder", "", ["context_embedder"]),
    ("t_embedder_mlp_2", "time_text_embed.timestep_embedder.", ["linear_2"]),
    ("y_embedder_mlp_2", "time_text_embed.text_embedder.", ["linear_2"]),
]
"""Layers of the published FLUX and SD3 files, and the layers of diffusers of which they are the rows."""


def merge_fused(network: Any, tensors: dict[str, torch.Tensor]) -> None:
    for key in sorted({name.split(".")[0] for name in tensors}):
        down, up, alpha = (tensors[f"{key}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        (found,) = [(m, *rest) for pattern, *rest in INSIDE if (m := re.fullmatch(f"lora_unet_{pattern}", key))]
        match, begin, ends = found
        modules = [network.get_submodule(begin.format(*match.groups()) + end) for end in ends]
        change = alpha / len(down) * up @ down
        for module, rows in zip(modules, change.split([m.out_features for m in modules]), strict=True):
            module.weight.data += rows


def test_plain_flux_reads_kohyas_file_of_an_export(tmp_path):
    policy = FluxPolicy(flux())
    policy.add_lora(
        LoraConfig(rank=2, alpha=6.0, targets=["add_q_proj", "add_v_proj", "to_out.0", "to_add_out"]), seed=0
    )
    with torch.no_grad():
        for number, parameter in enumerate(policy.trainable().values()):
            parameter.copy_(0.2 * rand(*parameter.shape, seed=number))
    policy.export(tmp_path)
    plain = flux()
    plain.load_lora_weights(load_file(tmp_path / KOHYA_WEIGHTS))
    assert close(evaluated(FluxPolicy(plain)), evaluated(policy))


def test_an_adapter_that_kohyas_names_have_no_place_for_is_exported_for_diffusers_alone(tmp_path):
    policy = StableDiffusionPolicy(stable_diffusion())
    policy.load_lora(write(tmp_path / "dora", peft(stable_diffusion().unet, "unet", use_dora=True)[0]))
    policy.export(tmp_path / "export")
    assert [file.name for file in (tmp_path / "export").iterdir()] == [WEIGHTS]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("outline", [True, False])
def test_an_adapter_whose_header_says_another_prediction_is_read_with_a_word(outline, tmp_path):
    save_stable_diffusion(tmp_path / "sd")
    file = tmp_path / "style.safetensors"
    save_file(kohya(stable_diffusion().unet, "lora_unet"), file, {"ss_v_parameterization": "True"})
    with pytest.warns(
        UserWarning, match="predicts v_prediction .* the scheduler of the model has prediction_type epsilon"
    ):
        load_policy(tmp_path / "sd", lora=file, device="cpu", outline=outline)
    StableDiffusionPolicy(stable_diffusion(prediction_type="v_prediction")).load_lora(file)  # without a word


BYTES = """
import hashlib, sys
from pathlib import Path
from etude.config import LoraConfig
from etude.policies.stable_diffusion import StableDiffusionPolicy
from support.tiny import stable_diffusion
policy = StableDiffusionPolicy(stable_diffusion())
policy.add_lora(LoraConfig(), seed=0)
for number in range(8):
    policy.export(Path(sys.argv[1]))
    files = sorted(Path(sys.argv[1]).iterdir())
    print(*(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))
"""


def test_an_export_has_the_same_bytes_in_every_process(tmp_path, capsys, monkeypatch):
    """In this process and in another one, which orders sets of strings differently."""
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    program = tmp_path / "program.py"
    program.write_text(BYTES)
    command = [sys.executable, str(program), str(tmp_path / "other")]
    other = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    monkeypatch.setattr(sys, "argv", [str(program), str(tmp_path / "here")])
    runpy.run_path(str(program))
    assert len({*other, *capsys.readouterr().out.split()}) == 2  # one for each of the two files


def test_training_on_from_an_adapter_starts_at_its_weights_and_keeps_the_base_model(tmp_path):
    pipeline = stable_diffusion()
    tensors = kohya(pipeline.unet, "lora_unet", ranks=(4, 2)) | kohya_text(pipeline.text_encoder)
    place = write(tmp_path / "adapter", tensors)
    loaded, policy = StableDiffusionPolicy(stable_diffusion()), StableDiffusionPolicy(stable_diffusion())
    base = evaluated(policy)
    loaded.load_lora(place)
    policy.continue_lora(place)
    assert torch.equal(evaluated(policy), evaluated(loaded))
    trained = policy.trainable()
    assert sum(p.numel() for p in trained.values()) == sum(
        t.numel() for n, t in tensors.items() if "unet" in n and t.ndim
    )
    assert not any(p.requires_grad for p in policy.pipeline.text_encoder.parameters())
    with torch.no_grad():
        for number, parameter in enumerate(trained.values()):
            parameter.add_(0.1 * rand(*parameter.shape, seed=number))
    moved = evaluated(policy)
    with policy.reference():
        assert torch.equal(evaluated(policy), base)
    policy.export(tmp_path / "export")
    plain = stable_diffusion()
    plain.load_lora_weights(tmp_path / "export")
    assert close(evaluated(StableDiffusionPolicy(plain)), moved)
    kohyas = stable_diffusion()
    exported = load_file(tmp_path / "export" / KOHYA_WEIGHTS)
    merge(kohyas.unet, "lora_unet_", exported)
    merge(kohyas.text_encoder, "lora_te_text_model_", exported)
    assert close(evaluated(StableDiffusionPolicy(kohyas)), moved)


def test_half_precision_weights_train_on_from_the_files_own_numbers(tmp_path):
    tensors = kohya(stable_diffusion().unet, "lora_unet")
    policy = StableDiffusionPolicy(stable_diffusion(), dtype=torch.bfloat16)
    policy.continue_lora(write(tmp_path, tensors))
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    policy.export(tmp_path / "export")
    again = load_file(tmp_path / "export" / KOHYA_WEIGHTS)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_an_adapter_of_text_encoders_alone_cannot_be_trained_on_from(tmp_path):
    place = write(tmp_path, kohya_text(stable_diffusion().text_encoder))
    with pytest.raises(EtudeError, match=r"lora\.init .* holds nothing for the unet"):
        StableDiffusionPolicy(stable_diffusion()).continue_lora(place)


def test_the_improvement_of_a_run_from_an_adapter_is_over_the_base_model(tmp_path):
    pipeline = stable_diffusion()
    tensors = kohya(pipeline.unet, "lora_unet") | kohya_text(pipeline.text_encoder)
    settings = {"iterations": 1, "sampling": {"num_steps": 2, "guidance_scale": 2.0}, "rewards": {"colorfulness": 1.0}}
    settings |= {"rollout": {"images_per_iteration": 4, "images_per_prompt": 2}, "objective": {"kl_coef": 0.1}}
    settings |= {"evaluation": {"num_images": 2, "held_out_rewards": [], "grid_images": 2}}
    settings |= {"lora": {"init": str(write(tmp_path / "adapter", tensors))}}
    policy = StableDiffusionPolicy(stable_diffusion())
    trainer = Trainer(parse_config(settings), tmp_path / "run", policy=policy)
    measured = trainer.evaluation.measure(lambda done: None)
    base = StableDiffusionPolicy(stable_diffusion())
    scores = trainer.evaluation.measurement.scores(trainer.evaluation.measurement.images(base, ODE(2, 2.0)))
    improvement = measured["improvement"]["colorfulness"]["mean"]
    assert improvement == pytest.approx(
        measured["ode"]["colorfulness"]["mean"] - scores["colorfulness"].mean(), abs=1e-5
    )
    assert abs(improvement) > 1e-3
    summary = trainer.train()
    assert summary["iterations"] == 1
    assert set(load_file(tmp_path / "run" / "lora" / KOHYA_WEIGHTS)) == set(tensors)


def test_a_run_from_an_adapter_that_does_not_fit_is_refused_alike_by_its_dry_run_and_leaves_nothing(tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "model")
    fits, foreign = kohya(stable_diffusion().unet, "lora_unet"), peft(flux().transformer, "transformer")[0]
    small = {"model": str(tmp_path / "model"), "iterations": 1, "rewards": {"colorfulness": 1.0}}
    small |= {"evaluation": {"held_out_rewards": []}, "sampling": {"num_steps": 2}}
    config = parse_config(small | {"lora": {"init": str(write(tmp_path / "fits", fits))}})
    trained = sum(tensor.numel() for tensor in fits.values() if tensor.ndim)
    assert f"trained parameters: {trained:,} of" in resolved(config, tmp_path / "run")
    config = parse_config(small | {"lora": {"init": str(write(tmp_path / "foreign", foreign))}})
    for start in (resolved, Trainer):
        with pytest.raises(EtudeError, match=r"lora\.init .* no part of the pipeline .* takes 'transformer\."):
            start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_adapter_to_train_on_from_and_full_fine_tuning_contradict_one_another():
    with pytest.raises(EtudeError, match=r"lora\.init = .x. .* lora\.rank = 0"):
        parse_config({"lora": {"init": "x", "rank": 0}})


def test_the_page_shows_the_table() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "what-etude-reads.md"
    assert table() in page.read_text(encoding="utf-8")
