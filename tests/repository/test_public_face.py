"""The public face: `import etude` gives every name of the interface, each explains itself, and each example runs."""

from __future__ import annotations

import ast
import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import etude
from etude.registry import ADVANTAGES, KERNELS, OBJECTIVES, POLICIES, REWARDS, WINDOWS

PUBLIC = [name for name in etude.__all__ if name != "__version__"]


def _examples(name: str) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(recurse=False, exclude_empty=True)
    return finder.find(getattr(etude, name), name, globs={})


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_names_help_begins_with_a_sentence_and_teaches_by_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(etude, name)) or ""
    assert text.splitlines()[0].rstrip().endswith((".", ":"))
    assert any(test.examples for test in _examples(name)), f"help(etude.{name}) has no example"


@pytest.mark.filterwarnings("ignore:.*are trained on")
@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of_a_public_name_gives_what_it_prints(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for registry in (ADVANTAGES, KERNELS, OBJECTIVES, POLICIES, REWARDS, WINDOWS):
        monkeypatch.setattr(registry, "registered", dict(registry.registered))
    for example in _examples(name):
        assert doctest.DocTestRunner(verbose=False).run(example).failed == 0


def test_type_checkers_see_every_public_name_at_its_home() -> None:
    (block,) = (node for node in ast.parse(inspect.getsource(etude)).body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {name: etude._PLACES[name] for name in PUBLIC}


def test_the_names_that_others_rely_on_are_public() -> None:
    """The interface: names may gain arguments and move house, but they stay where `import etude` finds them."""
    promised = {
        "CPS", "DDIM", "DanceSDE", "Estimate", "EtudeError", "FlowMatchGDDIMScheduler", "FlowSDE", "GDDIM", "GDDIMScheduler",
        "ODE", "SDE", "TrainConfig", "Trainer", "Window", "load_config", "load_policy", "register_advantage",
        "register_kernel", "register_objective", "register_policy", "register_reward", "register_window", "replay",
        "reward_gap", "rollout", "sample", "score", "train",
    }  # fmt: skip
    assert promised <= set(PUBLIC) <= set(dir(etude))


@pytest.mark.parametrize(
    "use", ["dir(etude)", "etude.EtudeError", "etude.load_config('emoji-ddpo')", "etude.TrainConfig()"]
)
def test_what_needs_no_tensor_loads_no_torch(use: str) -> None:
    script = f"import etude, sys\n{use}\nassert not {{'torch', 'diffusers', 'transformers'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
