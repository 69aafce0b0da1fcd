"""Laws of what may run and what may be read, as SECURITY.md states them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "etude"
WITHOUT_WEIGHTS = {"CLIPConfig", "Qwen2VLConfig", "Qwen2VLImageProcessorPil", "AutoTokenizer", "config_class"}
"""Classes that have no weights: configurations, tokenizers and an image processor."""
WITHOUT_WEIGHTS_IN = {"policies/outline.py": "cls", "rewards/models/clip.py": "kind"}
"""Variables that hold a class without weights, by file: the outline has just asked; a tokenizer or image processor."""


def calls(code: str) -> Iterator[tuple[ast.Call, str, str]]:
    """Every call of a method: the call, the method's name, and the last name before it."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            yield node, node.func.attr, owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")


def mistakes(code: str) -> Iterator[str]:
    """Networks that could be read from a pickle, and code that a checkpoint could bring along."""
    for call, method, owner in calls(code):
        told = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        handed_on = None in told and owner == "kind"  # `**how` of rewards.checkpoints, whose callers are judged
        if told.get("trust_remote_code", "False") != "False":
            yield f"{method}(trust_remote_code=...)"
        reads = method == "from_pretrained" and owner not in WITHOUT_WEIGHTS and not handed_on
        if reads and told.get("use_safetensors") != "True":
            yield f"{owner}.from_pretrained() without use_safetensors=True"


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("AutoModel.from_pretrained(x)", ["AutoModel.from_pretrained() without use_safetensors=True"]),
        ("AutoModel.from_pretrained(x, use_safetensors=True)", []),
        ("AutoTokenizer.from_pretrained(x, trust_remote_code=True)", ["from_pretrained(trust_remote_code=...)"]),
    ],
)
def test_the_law_is_found_broken_where_it_is(code: str, wrong: list[str]) -> None:
    assert list(mistakes(code)) == wrong


def test_networks_are_read_from_safetensors_and_no_checkpoint_brings_code() -> None:
    found = [
        f"{path.relative_to(SOURCE)}: {mistake}"
        for path in sorted(SOURCE.rglob("*.py"))
        for mistake in mistakes(path.read_text(encoding="utf-8"))
        if mistake.split(".")[0] != WITHOUT_WEIGHTS_IN.get(path.relative_to(SOURCE).as_posix())
    ]
    assert found == []
