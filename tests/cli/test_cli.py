"""The command line teaches, fails in one sentence with the right exit code, and passes on what it was given."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from PIL import Image
from typer.models import OptionInfo
from typer.testing import CliRunner, Result

from etude.cli.app import app
from etude.cli.options import expanded
from etude.cli.theory import app as theory_app
from etude.cli.training_display import TrainingDisplay
from etude.config import TrainConfig, load_config, recipe_names, recipe_text
from etude.config.algorithm import algorithm
from etude.policies import load_policy
from etude.report.grids import image_grid
from etude.sampling.solvers import Solver
from etude.training.progress import SilentDisplay
from support.tiny import save_flux, save_stable_diffusion

COMMANDS = [
    "train",
    "recipes",
    "gap",
    "sample",
    "check-model",
    "report",
    "models",
    "serve-reward",
    "study",
    "race",
    "advise",
    "watch",
]


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="etude")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def sentence(result: Result, code: int) -> str:
    """The one line on stderr of a command that failed."""
    assert result.exit_code == code, result.output
    lines = [line for line in plain(result.stderr).splitlines() if line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.output
    return lines[0]


class FakeTrainer:
    """Remembers what the command line made of its arguments."""

    made: Any

    def __init__(self, config: TrainConfig, **options: Any) -> None:
        type(self).made = (config, options)

    def train(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeTrainer]:
    module = types.ModuleType("etude.training.trainer")
    module.Trainer = FakeTrainer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "etude.training.trainer", module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return FakeTrainer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stable_diffusion(tmp_path_factory.mktemp("model") / "sd")


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom etude.cli.app import main\nsys.argv = ['etude', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'scipy', 'matplotlib', 'PIL', 'pydantic', 'etude.theory'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    for command in [*COMMANDS, "theory"]:
        assert f" {command} " in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_and_explains_every_option(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    text = plain(result.stdout)
    assert f"etude {command}" in text.split("Example", 1)[1]
    assert "--debug" in text
    options = re.findall(r"^│[ *]+(--[a-z]+) .*  (\S.*?) *│$", text, flags=re.MULTILINE)
    assert options
    assert [option for option, words in options if len(words.split()) < 3] == []


def test_the_version_is_that_of_the_package() -> None:
    from etude import __version__

    assert run("--version").stdout == f"etude {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ["'trian'", "'train'", "(see `etude --help`)"]),
        (["train"], ["give a RECIPE", "(see `etude train --help`)"]),
        (["train", "emoji-ddpo", "--resume"], ["--resume needs --out"]),
        (["train", "emoji-ddpo", "--uot", "x"], ["--uot", "--out"]),
        (["train", "emoji-ddpo", "extra"], ["extra"]),
        (["gap"], ["model"]),
        (["gap", "emoji-sd", "--eta", "much"], ["--eta", "'much'"]),
        (["sample", "emoji-sd"], ["--prompt"]),
        (["sample", "emoji-sd", "--prompt", "x", "--images", "0"], ["--images", "0"]),
        (["sample", "emoji-sd", "--prompt", "x", "--seed", "-1"], ["--seed", "-1"]),
        (["sample", "emoji-sd", "--prompt", "x", "--eta", "0.5", "--eta", "nan"], ["--eta", "nan is not a finite"]),
        (["sample", "emoji-sd", "--prompt", "x", "--eta", "-1"], ["--eta", "-1"]),
        (["sample", "emoji-sd", "--prompt", "x", "--guidance", "-inf"], ["--guidance", "-inf is not a finite"]),
        (["sample", "emoji-sd", "--prompt", "x", "--resolution", "0"], ["--resolution", "0"]),
        (["gap", "emoji-sd", "--guidance", "nan"], ["--guidance", "nan is not a finite"]),
        (["gap", "emoji-sd", "--guidance", "inf"], ["--guidance", "inf is not a finite"]),
        (["gap", "emoji-sd", "--guidance", "-3"], ["--guidance", "-3 is not a finite"]),
        (["gap", "emoji-sd", "--eta", "inf"], ["--eta", "inf is not a finite"]),
        (["sample", "emoji-sd", "--prompt", "x", "--solver", "heun", "--eta", "0.5"], ["--solver heun", "--eta"]),
        (
            ["sample", "emoji-sd", "--prompt", "x", "--lora", "a", "--lora", "b"],
            ["--lora is given 2 times", "takes one value"],
        ),
        (["gap", "emoji-sd", "--seed", "1", "--eta", "1", "--eta", "2", "--seed=1"], ["--seed is given 2 times"]),
        (["train", "emoji-ddpo", "--model", "a", "--model", "b"], ["--model is given 2 times"]),
        (["bench", "emoji-sd", "--protocol", "a", "--protocol", "b"], ["--protocol is given 2 times"]),
        (["preferences", "draw", "emoji-sd", "--out", "a", "--out", "b"], ["--out is given 2 times"]),
        (
            ["preferences", "draw", "emoji-sd", "--out", "a", "--solver", "heun", "--eta", "1"],
            ["--solver heun", "--eta"],
        ),
        (["theory", "peers", "--steps", "5", "--steps", "6"], ["--steps is given 2 times"]),
        (["report"], ["directory"]),
        (["serve-reward"], ["name"]),
        (["serve-reward", "colorfulness", "--port", "65536"], ["--port", "65536"]),
    ],
)
def test_misuse_is_one_sentence_and_exit_code_2(arguments: list[str], parts: list[str]) -> None:
    message = sentence(run(*arguments), 2)
    assert [part for part in parts if part.lower() not in message.lower()] == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "emoji-dpo"], ["unknown recipe 'emoji-dpo'", "did you mean 'emoji-ddpo'"]),
        (["train", "absent.yaml"], ["'absent.yaml' does not exist"]),
        (["train", "emoji-ddpo", "--set", "sampling.eat=1"], ["'sampling.eat'", "did you mean 'sampling.eta'"]),
        (["train", "emoji-ddpo", "--set", "sampling.eta=-0.5"], ["sampling.eta = -0.5"]),
        (["train", "emoji-ddpo", "--set", "sampling.num_steps=0"], ["sampling.num_steps = 0"]),
        (["recipes", "sd15"], ["unknown recipe 'sd15'", "sd15-ddpo"]),
        (["gap", "emoji-sd", "--json", "absent/gap.json"], ["'absent' does not exist"]),
        (["gap", "emoji-sd", "--json", "."], ["--json '.' is a directory"]),
        (["sample", "emoji-sd", "--prompt", "x", "--out", "absent/x.png"], ["--out", "'absent' does not exist"]),
        (["sample", "emoji-sd", "--prompt", "x", "--kernel", "gdim"], ["unknown kernel 'gdim'", "'gddim'"]),
        (["sample", "emoji-sd", "--prompt", "x", "--steps", "0"], ["0"]),
        (["sample", "emoji-sd", "--prompt", "x", "--solver", "hein"], ["unknown solver 'hein'", "did you mean 'heun'"]),
        (["sample", "emoji-sd", "--prompt", "x", "--kernel", "flow_sde", "--eta", "0.7"], ["rectified flow"]),
        (["gap", "emoji-sd", "--kernel", "gdim"], ["unknown kernel 'gdim'", "'gddim'"]),
        (["report", "absent"], ["absent"]),
        (["serve-reward", "colourfulness"], ["did you mean 'colorfulness'"]),
        (["serve-reward", "colorfulness", "--host", "0.0.0.0"], ["0.0.0.0", "there is no token", "--insecure"]),
        (
            ["serve-reward", "colorfulness", "--insecure", "--host", "no such host"],
            ["no such host", "cannot be listened on"],
        ),
        (["serve-reward", "colorfulness", "--token-env", "ABSENT_TOKEN"], ["ABSENT_TOKEN", "not set"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_1(
    arguments: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = sentence(run(*arguments), 1)
    assert [part for part in parts if part not in message] == []
    assert list(tmp_path.iterdir()) == []


def test_bad_input_to_a_real_model_is_one_sentence(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n")
    for arguments, part in [
        (["--reward", "colourfulness"], "did you mean 'colorfulness'"),
        (["--reward", "colorfulness", "--kernel", "ddim", "--eta", "9"], "largest legal eta"),
        (["--reward", "colorfulness", "--samples", "1"], "at least 2"),
        (["--reward", "colorfulness", "--prompts", tmp_path / "empty.txt"], "holds no prompt"),
        (["--reward", "colorfulness", "--lora", tmp_path / "absent"], "absent"),
    ]:
        assert part in sentence(run("gap", model, *arguments), 1)


def test_debug_adds_the_traceback_wherever_it_stands() -> None:
    for arguments in (["--debug", "recipes", "absent"], ["recipes", "absent", "--debug"]):
        result = run(*arguments)
        assert result.exit_code == 1
        assert "Traceback" in result.stderr
        assert plain(result.stderr).splitlines()[-1].startswith("error: unknown recipe 'absent'")


@pytest.mark.parametrize(
    ("raised", "code", "part"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("out of\nmemory"), 1, "unexpected RuntimeError (out of memory): this is a defect, --debug shows"),
    ],
)
def test_an_interrupt_or_a_defect_is_one_sentence(
    trainer: type[FakeTrainer], monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, part: str
) -> None:
    def fail(self: FakeTrainer) -> None:
        raise raised

    monkeypatch.setattr(trainer, "train", fail)
    assert part in sentence(run("train", "emoji-ddpo", "--quiet"), code)


def test_recipes_prints_the_file_that_train_takes(tmp_path: Path) -> None:
    listing = run("recipes").stdout
    for name in recipe_names():
        config, comment = load_config(name), recipe_text(name).splitlines()[0].removeprefix("# ")
        solver = f"rollouts by {config.sampling.solver}, gap of " if config.sampling.solver else ""
        essence = f"{algorithm(config.model_dump())} on {config.model}, {solver}{config.sampling.kernel} at eta"
        assert re.search(
            rf"^{name}\n    {re.escape(comment)}\n    {re.escape(essence)} .*", listing, flags=re.MULTILINE
        )
    assert "emoji-sd, gddim at eta 1.2, reward: colorfulness\n" in listing
    file = tmp_path / "mine.yaml"
    file.write_text(run("recipes", "emoji-ddpo").stdout)
    assert load_config(str(file)) == load_config("emoji-ddpo")
    keys = run("recipes", "--keys").stdout
    assert "objective.clip_nats = None\n" in keys


def test_train_passes_on_what_it_was_given(trainer: type[FakeTrainer]) -> None:
    result = run("train", "emoji-ddpo", "--set", "seed=3", "--set", "sampling.eta=0.5", "--out", "runs/a")
    assert result.exit_code == 0
    config, options = trainer.made
    assert config == load_config("emoji-ddpo", ["seed=3", "sampling.eta=0.5"])
    assert options["out"] == Path("runs/a")
    assert options["resume"] is False
    assert isinstance(options["display"], TrainingDisplay)
    assert "report: runs/a/report.html" in result.stdout


def test_a_model_and_rewards_take_the_place_of_the_recipes(trainer: type[FakeTrainer]) -> None:
    url = "http://127.0.0.1:8000/score"
    arguments = ["--model", "no", "--reward", "my.module:fn", "--reward", f"{url}#timeout=9=0.5", "--quiet"]
    assert run("train", "emoji-ddpo", *arguments).exit_code == 0
    config = trainer.made[0]
    assert (config.model, config.rewards) == ("no", {"my.module:fn": 1.0, f"{url}#timeout=9": 0.5})
    assert run("train", "emoji-ddpo", "--set", f"rewards.{url}#timeout=9=0.25", "--quiet").exit_code == 0
    assert trainer.made[0].rewards == {"colorfulness": 1.0, f"{url}#timeout=9": 0.25}


def test_a_quiet_run_prints_nothing(trainer: type[FakeTrainer]) -> None:
    result = run("train", "emoji-ddpo", "--quiet")
    assert result.output == ""
    assert isinstance(trainer.made[1]["display"], SilentDisplay)
    assert re.fullmatch(r"runs/emoji-ddpo-\d{8}-\d{6}", str(trainer.made[1]["out"]))


def test_only_the_first_of_several_processes_prints(
    trainer: type[FakeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run("train", "emoji-ddpo", "--out", "runs/a").output == ""
    assert "several processes need --out" in sentence(run("train", "emoji-ddpo"), 2)


def test_a_lone_process_speaks_whatever_number_is_left_in_the_environment(
    trainer: type[FakeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert "run: runs/a" in run("train", "emoji-ddpo", "--out", "runs/a").output
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "run: runs/b" in run("train", "emoji-ddpo", "--out", "runs/b").output


def test_a_command_that_an_error_names_can_be_pasted(trainer: type[FakeTrainer], tmp_path: Path) -> None:
    stored(tmp_path / "ru ns" / "x", "seed=7")
    message = sentence(run("train", "--set", "seed=8", "--out", "ru ns/x", "--resume"), 1)
    assert "`etude train --resume --out 'ru ns/x'`" in message


def test_a_model_may_be_called_by_a_number(trainer: type[FakeTrainer]) -> None:
    for name in ("1000", "no", "1e5", "\U0001f600 #1"):
        run("train", "emoji-ddpo", "--model", name, "--out", f"runs/{name}")
        assert trainer.made[0].model == name


def stored(directory: Path, *overrides: str) -> TrainConfig:
    config = load_config("emoji-ddpo", list(overrides))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return config


def test_a_resumed_run_takes_its_own_configuration(trainer: type[FakeTrainer], tmp_path: Path) -> None:
    config = stored(tmp_path / "a", "seed=7", "sampling.eta=0.8")
    for arguments in ([], ["emoji-ddpo", "--set", "seed=7", "--set", "sampling.eta=0.8"], ["--set", "seed=7"]):
        result = run("train", *arguments, "--out", "a", "--resume", "--quiet")
        assert result.exit_code == 0, result.output
        assert trainer.made == (config, trainer.made[1])
        assert trainer.made[1]["resume"] is True


def test_a_resumed_run_may_have_more_iterations_and_not_fewer(trainer: type[FakeTrainer], tmp_path: Path) -> None:
    config = stored(tmp_path / "a", "iterations=7")
    assert run("train", "--set", "iterations=9", "--out", "a", "--resume", "--quiet").exit_code == 0
    assert trainer.made[0] == config.model_copy(update={"iterations": 9})
    message = sentence(run("train", "--set", "iterations=5", "--out", "a", "--resume"), 1)
    assert "iterations is 7 in 'a/config.yaml' but 5 on the command line" in message


def test_changed_inputs_are_accepted_of_a_resumed_run_alone(trainer: type[FakeTrainer], tmp_path: Path) -> None:
    stored(tmp_path / "a")
    for given in (False, True):
        arguments = ["--accept-changes"] * given
        assert run("train", "--out", "a", "--resume", "--quiet", *arguments).exit_code == 0
        assert trainer.made[1]["accept_changes"] is given
    assert "--accept-changes needs --resume" in sentence(run("train", "emoji-ddpo", "--accept-changes"), 2)


def test_a_resumed_run_that_would_differ_names_the_first_key(trainer: type[FakeTrainer], tmp_path: Path) -> None:
    stored(tmp_path / "a", "seed=7")
    message = sentence(run("train", "--set", "sampling.eta=3", "--set", "lora.rank=1", "--out", "a", "--resume"), 1)
    assert "sampling.eta is 1.2 in 'a/config.yaml' but 3.0" in message
    message = sentence(run("train", "emoji-ddpo", "--out", "a", "--resume"), 1)
    assert "seed is 7" in message
    message = sentence(run("train", "--set", "rewards.alignment=1", "--out", "a", "--resume"), 1)
    assert "rewards is {'colorfulness': 1.0}" in message
    stored(tmp_path / "b", "sampling.window.size=2")
    message = sentence(run("train", "--set", "sampling.window.size=3", "--out", "b", "--resume"), 1)
    assert "sampling.window.size is 2 in 'b/config.yaml' but 3" in message
    message = sentence(run("train", "emoji-ddpo", "--out", "b", "--resume"), 1)
    assert "sampling.window is {'strategy': 'progressive', 'size': 2," in message


def test_resuming_nothing_is_said(trainer: type[FakeTrainer], tmp_path: Path) -> None:
    assert "no run to resume" in sentence(run("train", "--out", "absent", "--resume"), 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "no run to resume" in sentence(run("train", "emoji-ddpo", "--out", "mine", "--resume"), 1)
    (tmp_path / "file").write_text("mine")
    assert "no run to resume" in sentence(run("train", "emoji-ddpo", "--out", "file", "--resume"), 1)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".config.yaml.writing").write_text("mod")  # killed before it had written anything whole
    for out in ("new", "killed"):
        result = run("train", "emoji-ddpo", "--out", out, "--resume", "--quiet")
        assert result.exit_code == 0
        assert f"nothing to resume in '{out}': starting the run there" in result.stderr


def test_gap_prints_and_writes_the_same_numbers(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("red heart\npizza\n")
    target = tmp_path / "gap.json"
    result = run(
        "gap", model, "--eta", 0, "--eta", 1.2, "--steps", 3, "--reward", "colorfulness", "--samples", 4,
        "--prompts", tmp_path / "prompts.txt", "--json", target,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(target.read_text())["rows"]
    assert [(row["eta"], row["num_steps"]) for row in rows] == [(0, 3), (1.2, 3)]
    assert rows[0]["gap"]["mean"] == rows[0]["gap"]["low"] == rows[0]["gap"]["high"] == 0
    assert len([line for line in result.stdout.splitlines() if " colorfulness " in line]) == 2
    assert "0 [0, 0]" in result.stdout


def test_sample_draws_a_row_for_every_eta(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.png"
    result = run("sample", model, "--prompt", "a", "--steps", 2, "--out", target)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{target}\n"
    with Image.open(target) as one:
        small = one.size
    arguments = ["--prompt", "a", "--prompt", "b", "--images", 2, "--eta", 0, "--eta", 1, "--eta", 2]
    assert run("sample", model, *arguments, "--steps", 2, "--out", target).exit_code == 0
    with Image.open(target) as grid:
        assert grid.size[0] > 4 * small[0]
        assert grid.size[1] > 3 * small[1]
    assert list(tmp_path.iterdir()) == [target]


@pytest.fixture(scope="module")
def flow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux(tmp_path_factory.mktemp("model") / "flux")


@pytest.mark.parametrize("solver", ["ddim", "euler", "heun", "dpmsolver++", "unipc"])
def test_sample_draws_what_the_solver_of_that_name_does(
    model: Path, flow_model: Path, tmp_path: Path, solver: str
) -> None:
    for index, directory in enumerate((model, flow_model)):
        target = tmp_path / f"{index}.png"
        result = run(
            "sample", directory, "--prompt", "a", "--steps", 4, "--solver", solver, "--eta", 0, "--out", target
        )
        assert result.exit_code == 0, result.output
        policy = load_policy(directory)
        expected = image_grid(Solver(solver, 4).draw(policy, ["a"]), 1)
        with Image.open(target) as drawn:
            assert drawn.tobytes() == expected.tobytes()


def test_every_kernel_draws_from_a_flow_model_up_to_its_largest_eta(flow_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.png"
    arguments = ["sample", flow_model, "--prompt", "a", "--steps", 3, "--out", target]
    for kernel, eta in [("gddim", 1.2), ("ddim", 1.0), ("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.8)]:
        result = run(*arguments, "--kernel", kernel, "--eta", 0, "--eta", eta)
        assert result.exit_code == 0, result.output
    target.unlink()
    for kernel, part in [("cps", "at most 1"), ("ddim", "largest legal eta")]:
        assert part in sentence(run(*arguments, "--kernel", kernel, "--eta", 0, "--eta", 9), 1)
    assert not target.exists()


def test_the_resolution_is_that_of_the_images(flow_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.png"
    sizes = []
    for resolution in (8, 16):
        result = run("sample", flow_model, "--prompt", "a", "--steps", 2, "--resolution", resolution, "--out", target)
        assert result.exit_code == 0, result.output
        with Image.open(target) as image:
            sizes.append(image.size[0])
    assert sizes[1] - sizes[0] == 8


def test_a_dry_run_prints_a_recipe_and_writes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = ["--set", f"model={model}", "--set", "lora.targets=[to_q]", "--set", "iterations=3"]
    result = run("train", "emoji-ddpo", *sets, "--dry-run")
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == []
    config = load_config("emoji-ddpo", sets[1::2])
    assert result.stdout.startswith(config.to_yaml())
    rollout = config.rollout.images_per_iteration * config.sampling.num_steps
    assert re.search(rf"^# rollout +{rollout:,} +3 +{3 * rollout:,}$", result.stdout, flags=re.MULTILINE)
    assert "rank" in sentence(run("train", "emoji-ddpo", "--set", "lora.rank=-1", "--dry-run"), 1)


def test_the_gap_of_a_flow_model_is_measured_at_the_resolution_asked_for(flow_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("red heart\npizza\n")
    target = tmp_path / "gap.json"
    arguments = ["gap", flow_model, "--steps", 3, "--reward", "colorfulness", "--samples", 2, "--json", target]
    arguments += ["--prompts", tmp_path / "prompts.txt", "--resolution", 16]
    result = run(*arguments, "--kernel", "flow_sde", "--eta", 0.7)
    assert result.exit_code == 0, result.output
    settings = json.loads(target.read_text())["settings"]
    assert (settings["kernel"], settings["resolution"]) == ("flow_sde", 16)
    assert "at most 1" in sentence(run(*arguments, "--kernel", "cps", "--eta", 2), 1)


@pytest.mark.parametrize(("rank", "shared", "told"), [("0", True, True), ("1", True, False), ("1", False, True)])
def test_a_failure_of_all_processes_is_told_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: str, shared: bool, told: bool
) -> None:
    from etude.errors import EtudeError
    from etude.training.processes import SharedFailureError

    def fail(directory: Path) -> None:
        raise (SharedFailureError if shared else EtudeError)("process 1: no.")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("etude.report.write_report", fail)
    result = run("report", tmp_path)
    assert result.exit_code == 1
    assert ("process 1: no." in result.stderr) is told


def _callbacks(application: typer.Typer) -> Iterator[Any]:
    yield getattr(application.registered_callback, "callback", None)
    yield from (command.callback for command in application.registered_commands)
    for group in application.registered_groups:
        yield from _callbacks(group.typer_instance)


def test_every_option_for_a_path_takes_a_tilde_that_the_shell_has_left() -> None:
    options = {
        (callback.__name__, name): option.callback
        for callback in filter(None, [*_callbacks(app), *_callbacks(theory_app)])
        for name, hint in get_type_hints(callback, include_extras=True).items()
        for option in getattr(hint, "__metadata__", ())
        if isinstance(option, OptionInfo) and Path in (hint.__origin__, *get_args(hint.__origin__))
    }
    assert {("study", "out"), ("theory", "out"), ("training", "out"), ("train", "out")} <= options.keys()
    assert [place for place, callback in options.items() if callback is not expanded] == []
