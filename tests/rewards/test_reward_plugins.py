"""Rewards that installed packages offer in the entry point group `etude.rewards`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from etude.errors import EtudeError
from etude.rewards import get, names, register, score_one

IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of installed packages: real metadata, found as pip's are."""
    _install(
        tmp_path,
        "good-plugin",
        "good_plugin",
        {"plug_area": "area", "plug_built": "Built", "colorfulness": "area", "plug_twice": "area"},
        "import torch\n"
        "def area(images, prompts, **metadata):\n    return torch.full((len(images),), 5.0)\n"
        "class Built:\n"
        "    made = 0\n"
        "    def __init__(self):\n        Built.made += 1\n"
        "    def __call__(self, images, prompts, **metadata):\n        return torch.full((len(images),), float(Built.made))\n",
    )
    broken = {"plug_broken": "anything", "plug_number": "number", "plug_twice": "anything"}
    _install(tmp_path, "broken-plugin", "broken_plugin", broken, "import a_module_that_is_not_there\n")
    _install(tmp_path, "odd-plugin", "odd_plugin", {"plug_odd": "number", "plug_gone": "gone"}, "number = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


def _install(site: Path, distribution: str, module: str, entries: dict[str, str], code: str) -> None:
    (site / f"{module}.py").write_text(code)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"{name} = {module}:{attribute}" for name, attribute in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[etude.rewards]", *lines]) + "\n")


def test_a_function_of_a_package_is_a_reward_and_a_class_is_built_once(packages: Path) -> None:
    assert {"plug_area", "plug_built", "plug_broken"} <= set(names())
    assert score_one("plug_area", get("plug_area"), IMAGES, ["a", "b"]).tolist() == [5.0, 5.0]
    for _ in range(2):
        assert get("plug_built")(IMAGES, ["a", "b"]).tolist() == [1.0, 1.0]


def test_a_broken_package_is_named_when_its_reward_is_asked_for_and_not_before(packages: Path) -> None:
    get("plug_area"), get("jpeg_compressibility"), names()
    assert "broken_plugin" not in sys.modules
    with pytest.raises(
        EtudeError, match=r"'plug_broken' of the package 'broken-plugin' .* cannot be imported \(ModuleNot"
    ):
        get("plug_broken")


def test_a_package_whose_reward_is_no_function_is_named(packages: Path) -> None:
    with pytest.raises(EtudeError, match=r"'plug_odd' of the package 'odd-plugin' .* is int, which is not callable"):
        get("plug_odd")
    with pytest.raises(
        EtudeError, match=r"'plug_gone' of the package 'odd-plugin' .* cannot be imported \(AttributeError"
    ):
        get("plug_gone")


def test_two_packages_that_offer_one_name_are_both_named(packages: Path) -> None:
    with pytest.raises(EtudeError, match=r"several packages \(broken-plugin, good-plugin\)") as caught:
        get("plug_twice")
    assert "good_plugin:area" in str(caught.value)
    assert get("good_plugin:area")(IMAGES, ["a", "b"]).tolist() == [5.0, 5.0]


def test_built_in_and_registered_rewards_come_before_those_of_packages(packages: Path) -> None:
    assert get("colorfulness")(IMAGES, ["a", "b"]).tolist() == [0.0, 0.0]
    register("plug_area")(lambda images, prompts, **metadata: torch.ones(len(images)))
    assert get("plug_area")(IMAGES, ["a", "b"]).tolist() == [1.0, 1.0]


def test_a_misspelt_name_suggests_one_of_a_package(packages: Path) -> None:
    with pytest.raises(EtudeError, match="did you mean 'plug_area'"):
        get("plug_aera")
