"""YAML from files that a stranger may have written: plain values only, and a limited number of them.

An alias repeats the content of its anchor, and a chain of aliases multiplies ("billion laughs"). So
the size of a document with its aliases written out is computed before any value is created.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from etude.errors import EtudeError, brief

LONGEST = 1 << 18
"""Largest size of a file in bytes. Recipes have about 3,000."""
MOST_VALUES = 20_000
"""Largest number of values in a document, repetitions by aliases included."""
DEEPEST = 40
"""Largest depth of a document in levels."""
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


def read_yaml_text(path: Path, place: str) -> str:
    """The text of a file of at most `LONGEST` bytes.

    Raises:
        EtudeError: the file cannot be read, is too long, or is not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(LONGEST + 1)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise EtudeError(f"{place} cannot be read as UTF-8 text: {brief(error, 120)}.") from None
    if len(data) > LONGEST:
        raise EtudeError(f"{place} is longer than {LONGEST // 1024} KiB, which no configuration is: check the file.")
    return text


def parse_yaml(text: str, place: str) -> Any:
    """The values of a YAML document: mappings, lists, texts, numbers, booleans, null.

    Errors name the document by `place`.

    Raises:
        EtudeError: the text is not YAML, has another tag, the same key twice, or an alias inside
            its own anchor, or exceeds `LONGEST`, `MOST_VALUES` or `DEEPEST`.
    """
    if len(text) > LONGEST:
        raise EtudeError(f"{place} is longer than {LONGEST // 1024} KiB, which no configuration is.")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, place, {})
        return loader.construct_document(node)
    except EtudeError:
        raise
    except RecursionError:
        raise EtudeError(f"{place} nests values deeper than {DEEPEST} levels.") from None
    # PyYAML passes on the errors of int() and float() for a scalar with an explicit tag.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise EtudeError(f"{place} is not valid YAML: {brief(error)}.") from None


def _size(node: yaml.Node, place: str, sizes: dict[int, int], depth: int = 1) -> int:
    """Number of values in a node, walked once; an anchor's content counts again at every alias."""
    line = f"{place}, line {node.start_mark.line + 1}"
    if node.tag not in _PLAIN:
        raise EtudeError(
            f"{line}: a value of the type '{brief(ValueError(node.tag), 60)}' is no setting: write a number, or a text in quotes."
        )
    if depth > DEEPEST:
        raise EtudeError(f"{place} nests values deeper than {DEEPEST} levels.")
    if sizes.get(id(node)) == 0:  # still being counted
        raise EtudeError(f"{line}: an alias stands for a value that contains it: write the value out.")
    if id(node) not in sizes:
        sizes[id(node)] = 0
        children = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
            seen = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
                if key.value in seen:
                    at = f"{place}, line {key.start_mark.line + 1}"
                    raise EtudeError(f"{at}: the key '{key.value[:60]}' is there twice: remove one.")
                seen.add(key.value)
        total = 1 + sum(_size(child, place, sizes, depth + 1) for child in children)
        if total > MOST_VALUES:
            raise EtudeError(f"{place} stands for more than {MOST_VALUES} values, aliases written out.")
        sizes[id(node)] = total
    return sizes[id(node)]
