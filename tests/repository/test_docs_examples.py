"""The how-to pages are programs: their files are written, their code blocks run in order, their assertions hold."""

from __future__ import annotations

import ast
import copy
import importlib
import re
import runpy
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import etude
from etude.cli.app import app
from etude.config import TrainConfig, describe_fields, leaves, load_config, parse_rewards
from etude.learning.advantages import PromptStatistics
from etude.learning.draws import draw_pairs
from support.tiny_families import save_families

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(?P<info>[^\n]+)\n(?P<body>.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def _blocks(page: Path) -> tuple[dict[str, str], str]:
    """Blocks with a title are files; the other Python blocks are one program, in order."""
    files, program = {}, []
    for block in FENCE.finditer(page.read_text(encoding="utf-8")):
        title = re.search(r'title="([^"]+)"', block["info"])
        if title:
            files[title[1]] = block["body"]
        elif "python" in block["info"] and ".no-test" not in block["info"]:
            program.append(block["body"])
    return files, "\n".join(program)


PAGES = [page for page in sorted((ROOT / "docs" / "how-to").glob("*.md")) if any(_blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_code_of_a_how_to_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, program = _blocks(page)
    assert "assert " in program, f"{page.name} proves nothing: give its code an assertion"
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "page.py").write_text(program, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        runpy.run_path(str(tmp_path / "page.py"))
    finally:
        for name in files:
            sys.modules.pop(name.removesuffix(".py"), None)


SMALL = {"iterations": 1, "sampling.num_steps": 2, "rollout.images_per_iteration": 8}
SMALL |= {"evaluation.num_images": 2, "evaluation.held_out_rewards": []}


def test_the_readmes_python_trains_samples_and_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is printed, but for the sizes of the runs and of the measurement."""
    train, reward_gap = etude.train, etude.reward_gap

    def small_train(recipe: str, out: str, overrides: dict[str, Any]) -> Any:
        return train(recipe, out, SMALL | overrides)

    def small_gap(policy: Any, rewards: list[str], etas: list[float]) -> Any:
        measurement = etude.Measurement.of(rewards, num_images=2)
        return reward_gap(policy, etas=etas, sampler=etude.SDE(1.2, steps=2), measurement=measurement)

    monkeypatch.setattr(etude, "train", small_train)
    monkeypatch.setattr(etude, "reward_gap", small_gap)
    monkeypatch.chdir(tmp_path)
    _, program = _blocks(ROOT / "README.md")
    (tmp_path / "readme.py").write_text(program, encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "readme.py"))
    assert names["images"].shape == names["deployed"].shape == (1, 3, 64, 64)
    assert names["run"]["brightness"].improvement.n == 2
    assert names["pipe"].scheduler.config.eta == 1.2
    shown = capsys.readouterr().out
    for text in ("run: runs/first", "gap (ODE - SDE)", "improvement (ODE)", str(names["gap"]["colorfulness", 1.2].gap)):
        assert text in shown


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_name_that_a_document_imports_from_etude_exists(document: Path) -> None:
    for block in FENCE.finditer(document.read_text(encoding="utf-8")):
        if "python" not in block["info"]:
            continue
        for node in ast.walk(ast.parse(block["body"])):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "etude":
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def _commands(document: Path) -> list[list[str]]:
    """The arguments of each `etude ...` in the shell blocks; what a redirection or a pipe does with the output is left out."""
    lines = [
        line
        for block in FENCE.finditer(document.read_text(encoding="utf-8"))
        if block["info"].split()[0].strip("{}.") in {"bash", "sh", "console"}
        for line in block["body"].replace("\\\n", " ").splitlines()
    ]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("etude ")]
    return [arguments[1 : next((i for i, w in enumerate(arguments) if w in {">", "|"}), None)] for arguments in words]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_of_a_document_is_one_that_the_program_takes(document: Path) -> None:
    known: Any = typer.main.get_command(app)
    for name, *rest in _commands(document):
        assert name in known.commands, f"etude {name}"
        given = known.commands[name].make_context(name, list(rest), resilient_parsing="--help" in rest).params
        if name == "train" and given["recipe"] and not given["recipe"].endswith(".yaml"):
            load_config(given["recipe"], given["overrides"], parse_rewards(given["reward"] or []))


@pytest.mark.parametrize("document", [ROOT / "CONTRIBUTING.md", *DOCUMENTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    named = re.findall(r"`((?:src|tests|docs|examples)/[\w./-]+)`", document.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_file_of_the_architecture_exists() -> None:
    """In the second column; a bare name stands in the folder of the first one of its cell."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| [^|]+ \| (`[^|]+`) \|", page, flags=re.MULTILINE)
    paths = []
    for first, *others in (re.findall(r"`([^`]+)`", cell) for cell in cells):
        paths += [first, *(name if "/" in name else f"{first.rpartition('/')[0]}/{name}" for name in others)]
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / "src" / "etude" / path).exists()] == []


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_families(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem.startswith("tune-")], ids=lambda p: p.stem)
def test_every_run_of_a_tuning_page_passes_a_dry_run_on_a_small_model_of_its_class(
    page: Path, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files, _ = _blocks(page)
    for name, text in files.items():
        Path(name).write_text(text, encoding="utf-8")
    runs = [arguments for command, *arguments in _commands(page) if command == "train"]
    assert runs
    for arguments in runs:
        model = checkpoints[load_config(arguments[0]).model]
        small = ["--model", str(model), "--set", "resolution=null", "--dry-run"]
        result = CliRunner().invoke(app, ["train", *arguments, *small])
        assert result.exit_code == 0, f"{shlex.join(arguments)}: {result.output}"
        assert {path.name for path in tmp_path.iterdir()} == set(files)


# Fields and defaults of trl 0.23.1's DDPOConfig.
DDPO: dict[str, Any] = {
    "exp_name": "ddpo",
    "run_name": "",
    "seed": 0,
    "log_with": None,
    "tracker_kwargs": {},
    "accelerator_kwargs": {},
    "project_kwargs": {},
    "tracker_project_name": "trl",
    "logdir": "logs",
    "num_epochs": 100,
    "save_freq": 1,
    "num_checkpoint_limit": 5,
    "mixed_precision": "fp16",
    "allow_tf32": True,
    "resume_from": "",
    "sample_num_steps": 50,
    "sample_eta": 1.0,
    "sample_guidance_scale": 5.0,
    "sample_batch_size": 1,
    "sample_num_batches_per_epoch": 2,
    "train_batch_size": 1,
    "train_use_8bit_adam": False,
    "train_learning_rate": 3e-4,
    "train_adam_beta1": 0.9,
    "train_adam_beta2": 0.999,
    "train_adam_weight_decay": 1e-4,
    "train_adam_epsilon": 1e-8,
    "train_gradient_accumulation_steps": 1,
    "train_max_grad_norm": 1.0,
    "train_num_inner_epochs": 1,
    "train_cfg": True,
    "train_adv_clip_max": 5.0,
    "train_clip_range": 1e-4,
    "train_timestep_fraction": 1.0,
    "per_prompt_stat_tracking": False,
    "per_prompt_stat_tracking_buffer_size": 16,
    "per_prompt_stat_tracking_min_count": 16,
    "async_reward_computation": False,
    "max_workers": 2,
    "negative_prompts": "",
    "push_to_hub": False,
}
# Keys and values of flow_grpo's config/base.py; some of its configurations add `sample.sde_type`.
FLOW_GRPO: dict[str, Any] = {
    "run_name": "",
    "debug": True,
    "num_epochs": 100000,
    "resume_from": None,
    "seed": 42,
    "logdir": "logs",
    "save_freq": 20,
    "eval_freq": 20,
    "num_checkpoint_limit": 5,
    "mixed_precision": "fp16",
    "allow_tf32": True,
    "use_lora": True,
    "dataset": "",
    "resolution": 768,
    "activation_checkpointing": False,
    "fsdp_optimizer_offload": False,
    "pretrained": {"model": "runwayml/stable-diffusion-v1-5", "revision": "main"},
    "sample": {
        "num_steps": 40,
        "eval_num_steps": 40,
        "guidance_scale": 4.5,
        "eval_guidance_scale": 4.5,
        "train_batch_size": 1,
        "num_image_per_prompt": 1,
        "test_batch_size": 1,
        "num_batches_per_epoch": 2,
        "global_std": True,
        "noise_level": 0.7,
        "same_latent": False,
        "sde_window_size": 2,
        "sde_window_range": (0, 10),
    },
    "train": {
        "batch_size": 1,
        "use_8bit_adam": False,
        "learning_rate": 3e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_weight_decay": 1e-4,
        "adam_epsilon": 1e-8,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 1.0,
        "num_inner_epochs": 1,
        "cfg": True,
        "adv_clip_max": 5,
        "clip_range": 1e-4,
        "clip_range_lt": 1e-4,
        "clip_range_gt": 1e-4,
        "timestep_shift": 3.0,
        "timestep_fraction": 1.0,
        "beta": 0.0,
        "lora_path": None,
        "ema": False,
    },
    "prompt_fn": "imagenet_animals",
    "prompt_fn_kwargs": {},
    "reward_fn": {},
    "save_dir": "",
    "per_prompt_stat_tracking": True,
}
THEIRS = {"come-from-trl": DDPO, "come-from-flow-grpo": FLOW_GRPO}


def _page(name: str) -> Path:
    return ROOT / "docs" / "how-to" / f"{name}.md"


def _rows(name: str) -> list[tuple[list[str], list[str]]]:
    """Names in code in the first cell of each row of a page's tables, and in its second where that column is etude's."""
    rows, ours = [], False
    for line in _page(name).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|") or set(line) <= set("|- :"):
            continue
        first, second = (re.findall(r"`([^`]+)`", cell) for cell in cells[:2])
        if not first:
            ours = cells[1] == "etude"  # a table's heading
        rows.append((first, second if ours else []))
    return rows


def _settings(name: str, source: dict[str, Any], processes: int) -> dict[str, Any]:
    """The answer of the converter that a page holds."""
    ((file, code),) = [item for item in _blocks(_page(name))[0].items() if item[0].startswith("from_")]
    module = types.ModuleType(file)
    exec(compile(code, file, "exec"), module.__dict__)  # noqa: S102 - our own documentation
    return module.settings(source, processes)


def _converted(name: str, recipe: str, source: dict[str, Any], processes: int) -> TrainConfig:
    return load_config(recipe, [f"{key}={value}" for key, value in _settings(name, source, processes).items()])


def _flow_grpo(**changes: Any) -> dict[str, Any]:
    """flow_grpo's configuration with dotted keys changed."""
    config = copy.deepcopy(FLOW_GRPO)
    for key, value in changes.items():
        section, _, leaf = key.rpartition("__")
        (config[section] if section else config)[leaf] = value
    return config


@pytest.mark.parametrize("name", THEIRS)
def test_every_setting_of_another_trainer_has_a_row(name: str) -> None:
    said = {key for first, _ in _rows(name) for key in first}
    theirs = {
        f"{key}.{leaf}" if isinstance(value, dict) and value and leaf else key
        for key, value in THEIRS[name].items()
        for leaf in (value if isinstance(value, dict) and value else [""])
    }
    assert theirs - said == set()
    assert name != "come-from-flow-grpo" or "sample.sde_type" in said


@pytest.mark.parametrize("name", THEIRS)
def test_every_setting_that_a_table_offers_instead_exists(name: str) -> None:
    known = {key for key, *_ in describe_fields()}
    named = {key for _, second in _rows(name) for key in second}
    assert len(named) > 20
    assert {key for key in named if key not in known and not any(k.startswith(f"{key}.") for k in known)} == set()


@pytest.mark.parametrize("name", THEIRS)
def test_a_converter_gives_the_settings_of_its_table_alone(name: str) -> None:
    source = DDPO if name == "come-from-trl" else _flow_grpo(sample__sde_type="cps")
    named = {key for _, second in _rows(name) for key in second} | {"sampling.first_step", "sampling.window.strategy"}
    assert set(_settings(name, source, 1)) - named == set()


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sample_batch_size": 6, "train_batch_size": 3, "sample_num_batches_per_epoch": 4},
        {"sample_num_batches_per_epoch": 8, "train_gradient_accumulation_steps": 4, "train_num_inner_epochs": 2},
        {"sample_num_steps": 10, "train_timestep_fraction": 0.75, "mixed_precision": "no"},
        {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 4, "log_with": "wandb"},
    ],
)
def test_a_converted_ddpo_configuration_has_the_sizes_of_the_original(changes: dict[str, Any], processes: int) -> None:
    theirs = {**DDPO, **changes}
    config = _converted("come-from-trl", "sd15-ddpo", theirs, processes)

    images = theirs["sample_batch_size"] * theirs["sample_num_batches_per_epoch"] * processes
    in_step = theirs["train_batch_size"] * theirs["train_gradient_accumulation_steps"] * processes
    steps, trained = theirs["sample_num_steps"], int(theirs["sample_num_steps"] * theirs["train_timestep_fraction"])

    assert config.rollout.images_per_iteration == images
    assert images == in_step * config.objective.updates_per_epoch
    rows, _ = draw_pairs(torch.arange(images), steps, config.objective.timestep_fraction, np.random.default_rng(0))
    assert (len(rows), config.objective.num_inner_epochs) == (images * trained, theirs["train_num_inner_epochs"])
    assert config.objective.batch_size == theirs["train_batch_size"]
    assert config.optimizer.betas == (0.9, 0.999)
    assert config.optimizer.epsilon == 1e-8

    rewards = torch.linspace(0, 1, 40).square()
    statistics = PromptStatistics(config.advantage.buffer_size, config.advantage.min_count)
    alike = torch.allclose(
        statistics.advantages(["a", "b"] * 20, rewards).float(), (rewards - rewards.mean()) / rewards.std(correction=0)
    )
    assert alike is not theirs["per_prompt_stat_tracking"]


# What config/grpo.py changes for two of its configurations, both on 32 GPUs.
PICKSCORE_SD3 = {
    "pretrained": {"model": "stabilityai/stable-diffusion-3.5-medium", "revision": "main"},
    "resolution": 512,
    "sample__num_steps": 10,
    "sample__eval_num_steps": 40,
    "sample__train_batch_size": 9,
    "sample__num_image_per_prompt": 24,
    "sample__num_batches_per_epoch": 4,
    "train__batch_size": 9,
    "train__gradient_accumulation_steps": 2,
    "train__timestep_fraction": 0.99,
    "train__beta": 0.01,
    "train__ema": True,
    "save_freq": 60,
    "eval_freq": 60,
}
PICKSCORE_SD3_FAST_NOCFG = {
    **PICKSCORE_SD3,
    "sample__guidance_scale": 1.0,
    "sample__num_image_per_prompt": 18,
    "sample__noise_level": 0.8,
    "sample__sde_window_size": 3,
    "sample__sde_window_range": (0, 5),
    "sample__sde_type": "cps",
    "train__clip_range": 1e-5,
    "train__beta": 0.0,
}


@pytest.mark.parametrize(
    ("recipe", "changes"), [("sd35-flow-grpo", PICKSCORE_SD3), ("sd35-mixgrpo", PICKSCORE_SD3_FAST_NOCFG)]
)
def test_a_converted_flow_grpo_configuration_is_the_recipe(recipe: str, changes: dict[str, Any]) -> None:
    """But for memory, the checkpoints and half precision, where the recipes say that they choose otherwise."""
    ours = load_config(recipe)
    converted = _converted("come-from-flow-grpo", recipe, _flow_grpo(**changes), 32)
    pairs = zip(leaves(ours.model_dump()), leaves(converted.model_dump()), strict=True)
    differing = {key for (key, before), (_, after) in pairs if before != after} - {"sampling.window"}
    sizes = {"rollout.batch_size", "objective.batch_size"}
    assert differing == {"dtype", *sizes, "checkpoint.every", "checkpoint.keep"}
    if ours.sampling.window:
        assert converted.sampling.window == ours.sampling.window.model_copy(update={"start": 0})


@pytest.mark.parametrize("gpus", [1, 8])
def test_a_converted_flow_grpo_configuration_has_the_sizes_of_the_original(gpus: int) -> None:
    theirs = _flow_grpo(
        sample__num_steps=6, sample__num_image_per_prompt=3, sample__train_batch_size=3, sample__num_batches_per_epoch=6,
        train__gradient_accumulation_steps=3, train__beta=0.03, sample__global_std=False, sample__same_latent=True,
    )  # fmt: skip
    config = _converted("come-from-flow-grpo", "sd35-flow-grpo", theirs, gpus)
    assert config.rollout.images_per_iteration == 3 * 6 * gpus
    assert config.objective.updates_per_epoch == 2
    assert config.objective.kl_coef == pytest.approx(0.03 / 6)
    assert (config.advantage.kind, config.rollout.shared_noise) == ("group", True)
