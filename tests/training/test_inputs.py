"""A resumed run is the same run: what it reads by name must be what it was, and a change is refused before anything is loaded."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from etude.config import TrainConfig, parse_config
from etude.errors import EtudeError
from etude.policies.loading import load_source
from etude.policies.source import ModelSource
from etude.prompts import PromptSet, load_prompts
from etude.registry import KERNELS, REWARDS
from etude.rewards import register
from etude.runs.checkpoint import Checkpoints, save_checkpoint
from etude.training import durability, trainer
from etude.training.blueprint import Blueprint
from etude.training.inputs import Inputs, prompts_digest
from etude.training.trainer import Trainer
from support.fuzzing import contents
from support.small_runs import brief_settings, train_until
from support.tiny import stable_diffusion

REWARD = "from measured_helper import level\n\ndef bright(images, prompts, **metadata): return level(images)\n"
HELPER = "def level(images): return images.float().mean((1, 2, 3)) / 255\n"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run that ended in its second iteration, and everything that it reads."""
    root = tmp_path_factory.mktemp("begun")
    (root / "measured.py").write_text(REWARD)
    (root / "measured_helper.py").write_text(HELPER)
    (root / "train.jsonl").write_text("".join(json.dumps({"prompt": p, "tag": 1}) + "\n" for p in ("sun", "pizza")))
    (root / "eval.txt").write_text("moon\ncake\nlion\nsea\n")
    settings = brief_settings(root) | {
        "model": "sd",
        "prompts": {"train": "train.jsonl", "evaluation": "eval.txt"},
        "rewards": {"measured:bright": 1.0},
    }
    (root / "settings.json").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        enter(root, patch)
        train_until(Trainer(parse_config(settings), Path("run")), 2)
    return root


def enter(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Makes a directory the working directory, as if the program started there."""
    patch.chdir(root)
    patch.syspath_prepend(root)
    for name in ("measured", "measured_helper"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


@pytest.fixture
def config(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """The configuration of the run in `run`, of which the working directory is a copy of its own."""
    shutil.copytree(begun, tmp_path / "here")
    enter(tmp_path / "here", monkeypatch)
    return parse_config(json.loads(Path("settings.json").read_text()))


def append(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text() + text)


def train_weights(path: Path) -> None:
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path)


def shift_levels(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.02}))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("eval.txt", lambda path: path.write_text("moon\nstar\nlion\nsea\n"), "prompts.evaluation 'eval.txt' has changed"),
        ("train.jsonl", append('{"prompt": "star"}\n'), "prompts.train 'train.jsonl' has changed"),
        ("train.jsonl", lambda path: path.write_text(path.read_text().replace("1", "2")), "prompts.train 'train.jsonl' has"),
        ("sd/vae/diffusion_pytorch_model.safetensors", train_weights, "of model 'sd' has changed"),
        ("sd/text_encoder/model.safetensors", train_weights, "text_encoder/model.safetensors of model 'sd' has changed"),
        ("sd/scheduler/scheduler_config.json", shift_levels, "scheduler/scheduler_config.json of model 'sd' has changed"),
        ("sd/tokenizer/tokenizer_config.json", Path.unlink, "tokenizer/tokenizer_config.json of model 'sd' is gone"),
        ("sd/unet/added_tokens.json", lambda path: path.write_text("{}"), "unet/added_tokens.json of model 'sd' is new"),
        ("measured.py", append("# as before\n"), "measured.py of reward 'measured:bright' has changed"),
        ("measured_helper.py", append("# as before\n"), "measured_helper.py of reward 'measured:bright' has changed"),
    ],
)  # fmt: skip
def test_a_resumed_run_whose_input_has_changed_is_refused_before_its_model_is_loaded(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, file: str, change: Callable[[Path], Any], said: str
) -> None:
    change(Path(file))
    monkeypatch.setattr(trainer, "load_source", lambda *arguments: pytest.fail("the model is loaded"))
    before = contents(Path("run"))
    with pytest.raises(EtudeError) as refused:
        Trainer(config, "run", resume=True)
    assert said in str(refused.value)
    assert "its checkpoint of iteration 1, so that it would not go on as the same run" in str(refused.value)
    assert "`etude train --resume --accept-changes --out run`" in str(refused.value)
    assert contents(Path("run")) == before


def test_a_policy_that_is_given_is_compared_with_the_model_that_the_run_began_with(config: TrainConfig) -> None:
    shutil.copytree("sd", "same")
    shutil.copytree("sd", "other")
    train_weights(Path("other/unet/diffusion_pytorch_model.safetensors"))
    same, other = (load_source(replace(ModelSource.of(config), name=name), outline=True) for name in ("same", "other"))
    assert not Blueprint(config, Path("run"), resume=True, policy=same).inputs.accepted
    with pytest.raises(EtudeError, match=r"unet/diffusion_pytorch_model\.safetensors of model 'sd' has changed"):
        Blueprint(config, Path("run"), resume=True, policy=other)


def test_what_a_run_does_not_read_may_change(config: TrainConfig) -> None:
    append("\n# four more are to come\n")(Path("eval.txt"))
    Path("sd/README.md").write_text("A tiny model.")
    shutil.copy("sd/unet/diffusion_pytorch_model.safetensors", "sd/unet/diffusion_pytorch_model.fp16.safetensors")
    for path in Path().rglob("*"):
        path.touch()
    assert Blueprint(config, Path("run"), resume=True).inputs.digests.keys() >= {
        "prompts.train 'train.jsonl'", "prompts.evaluation 'eval.txt'", "model 'sd'", "reward 'measured:bright'"
    }  # fmt: skip


def test_evaluation_prompts_beyond_its_images_may_change_too(config: TrainConfig) -> None:
    append("star\n")(Path("eval.txt"))  # the fifth, for four images
    assert not Blueprint(config, Path("run"), resume=True).inputs.accepted


def test_an_accepted_change_is_told_kept_and_printed_on_the_card(config: TrainConfig) -> None:
    Path("eval.txt").write_text("moon and stars\ncake\nlion\nsea\n")
    clause = "prompts.evaluation 'eval.txt' has changed"
    with pytest.warns(UserWarning, match=f"{clause}, and the run goes on with it"):
        summary = Trainer(config, "run", resume=True, accept_changes=True).train()
    assert summary["changed_inputs"] == [f"{clause} after iteration 1"]
    assert f"{clause} after iteration 1" in Path("run/lora/README.md").read_text()
    again = Blueprint(config, Path("run"), resume=True).inputs  # the change is now the run's own
    assert again.changes == summary["changed_inputs"]
    assert again.accepted == []


def test_a_checkpoint_without_digests_resumes_with_one_line(config: TrainConfig) -> None:
    found = Checkpoints(Path("run"), config).load()
    assert found is not None
    state = {name: value for name, value in found.state.items() if name not in {"inputs", "changed_inputs"}}
    save_checkpoint(found.path.parent, found.iteration, found.tensors, state)
    append("star\n")(Path("measured.py"))
    Path("measured.py").write_text(REWARD)
    resumed = Trainer(config, "run", resume=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        resumed.durability.restore(resume=True)
    assert ["kept no digests" in str(warning.message) for warning in told] == [True]
    assert resumed.ledger.iteration == 1


def test_processes_that_read_different_inputs_are_refused(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    other = iter([0, 1])  # the second exchange is that of the inputs
    monkeypatch.setattr(durability, "gather", lambda accelerator, own, count: torch.cat([own, own + next(other)]))
    with pytest.raises(EtudeError, match="do not read the same prompts, model and rewards"):
        Trainer(config, "run", resume=True).durability.restore(resume=True)


def test_a_model_of_the_hub_is_read_at_the_commit_that_the_run_began_with(tmp_path: Path) -> None:
    config, commit = parse_config({"model": "owner/name@main"}), "a" * 40
    inputs = {"model 'owner/name@main'": {"commit": commit}}
    save_checkpoint(tmp_path / "checkpoints", 3, {}, {"config": config.model_dump(mode="json"), "inputs": inputs})
    resumed = Inputs(config, tmp_path, resume=True)
    source = ModelSource.of(config)
    assert resumed.pinned(source) == replace(source, name=f"owner/name@{commit}")
    assert Inputs(config, tmp_path).pinned(source) == source
    resumed.take(inputs)
    with pytest.raises(EtudeError, match="commit of model 'owner/name@main' has changed"):
        resumed.take({"model 'owner/name@main'": {"commit": "b" * 40}})


def test_a_resumed_run_does_not_follow_a_branch_of_the_hub_that_has_moved_on(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, commits = tmp_path / "models--owner--tiny", ("a" * 40, "b" * 40)
    for seed, commit in enumerate(commits):
        stable_diffusion(seed).save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    branch = repository / "refs" / "main"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    of_the_hub = config.model_copy(update={"model": "owner/tiny"})
    branch.write_text(commits[0])
    train_until(Trainer(of_the_hub, "hub"), 2)
    branch.write_text(commits[1])
    assert Trainer(of_the_hub, "another").policy.revision == commits[1]
    resumed = Trainer(of_the_hub, "hub", resume=True)
    assert resumed.train()["model_revision"] == commits[0]
    pinned = stable_diffusion(0).unet.conv_in.weight
    assert torch.equal(resumed.policy.pipeline.unet.conv_in.weight, pinned)


def test_a_server_that_computes_another_reward_is_refused_before_anything_is_written(config: TrainConfig) -> None:
    def distant(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.float().mean((1, 2, 3))

    register("distant")(distant)
    served = config.model_copy(update={"rewards": {"distant": 1.0}})
    distant.served = "one"  # type: ignore[attr-defined]
    train_until(Trainer(served, "served"), 1)
    distant.served = "two"  # type: ignore[attr-defined]
    before = contents(Path("served"))
    with pytest.raises(EtudeError, match="what the server of reward 'distant' computes has changed"):
        Trainer(served, "served", resume=True).train()
    assert contents(Path("served")) == before


def test_damaged_state_counts_as_no_checkpoint(config: TrainConfig) -> None:
    state = Path("run/checkpoints/iteration-000001/state.json")
    state.write_text(state.read_text().replace("prompts.train", "prompts.tarin"))
    found = Checkpoints(Path("run"), config).peek()
    assert found is not None
    assert found[0] == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"tag": [1, 1]}),
        ({"tag": [1, 2]}, {"tag": [2, 1]}),
        ({"tag": [b"a", b"b"]}, {"tag": [b"a", b"c"]}),
        ({"tag": [torch.zeros(2)] * 2}, {"tag": [torch.ones(2)] * 2}),
        ({"tag": [{1, 2}, None]}, {"tag": [{1, 3}, None]}),
    ],
)
def test_the_digest_of_prompts_tells_their_metadata_apart(one: dict[str, Any], other: dict[str, Any]) -> None:
    digests = [prompts_digest(PromptSet(["a", "b"], metadata)) for metadata in (one, one, other)]
    assert digests[0] == digests[1] != digests[2]
    assert prompts_digest(PromptSet(["b", "a"], one)) not in digests


def test_fields_in_another_order_are_the_same_metadata() -> None:
    assert prompts_digest(PromptSet(["a"], {"x": [1], "y": [2]})) == prompts_digest(
        PromptSet(["a"], {"y": [2], "x": [1]})
    )


def test_code_of_the_user_has_files_and_code_of_etude_or_of_this_process_has_none(config: TrainConfig) -> None:
    assert list(REWARDS.files("measured:bright")) == ["measured.py", "measured_helper.py"]
    register("mine")(lambda images, prompts: images.float().mean((1, 2, 3)))
    assert [REWARDS.files(name) for name in ("mine", "colorfulness", "json:dumps")] == [{}, {}, {}]
    assert KERNELS.files("etude.sampling.kernels:GDDIM") == {}


def test_a_function_of_prompts_is_compared_by_what_it_returns(config: TrainConfig) -> None:
    assert prompts_digest(load_prompts("eval.txt")) == prompts_digest(PromptSet(["moon", "cake", "lion", "sea"]))
