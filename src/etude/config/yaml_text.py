"""YAML from files that a stranger may have written: plain values only, and a limited number of them.

Values are what they look like, as in YAML 1.2: `010` is ten, `1:30`, `2026-01-02`, `yes` and `off`
are texts, and so is whatever stands in quotes. `1e-4` is a number, and `1_000` is one, in options of
commands, too. A `#` begins a comment in a file, and nowhere else.

An alias repeats the content of its anchor, and a chain of aliases multiplies ("billion laughs"). So
the size of a document with its aliases written out is computed before any value is created.
"""

from __future__ import annotations

import re
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
_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_LOOKS = {
    "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(rf"[-+]?(?:{_DIGITS}|0x[0-9a-fA-F]+)\Z"),
    "float": re.compile(
        rf"(?:[-+]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
    "merge": re.compile(r"<<\Z"),
}
"""The look of a value by its type, the first that fits; any other value without quotes is a text."""
_WORD = re.compile(r"(?:yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)\Z")


class Word(str):
    """A text without quotes that YAML 1.1 takes for true or false."""


class _Loader(yaml.SafeLoader):
    """Reads a value without quotes by `_LOOKS`, also behind a tag such as `!!int`."""

    def number(self, node: yaml.ScalarNode) -> Any:
        """The truth value or number of a scalar; ValueError if it does not look like one."""
        text, name = str(self.construct_scalar(node)), node.tag.removeprefix(_TAG)
        if not _LOOKS[name].match(text):
            raise ValueError(f"'{text[:60]}' is no {name}")
        digits = text.replace("_", "")
        if name == "bool":
            return text.lower() == "true"
        if name == "int":
            return int(digits, 16 if "x" in digits else 10)
        return float(digits.lower().replace(".inf", "inf").replace(".nan", "nan"))

    def text(self, node: yaml.ScalarNode) -> str:
        """The text of a scalar, a `Word` where it may be meant otherwise."""
        text = str(self.construct_scalar(node))
        return Word(text) if node.style is None and _WORD.match(text) else text


_Loader.yaml_implicit_resolvers = {None: [(_TAG + name, look) for name, look in _LOOKS.items()]}
_Loader.add_constructor(f"{_TAG}str", _Loader.text)
for _name in ("bool", "int", "float"):
    _Loader.add_constructor(_TAG + _name, _Loader.number)


class _Dumper(yaml.SafeDumper):
    """Puts every text in quotes that `_Loader`, or a reader of YAML 1.1, would take for something else."""


for _name, _look in _LOOKS.items():
    _Dumper.add_implicit_resolver(_TAG + _name, _look, None)


def dump_yaml(tree: Any) -> str:
    """A tree of plain values as a YAML document, which `parse_yaml` reads back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


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


def parse_yaml(text: str, place: str, comments: bool = True) -> Any:
    """The values of a YAML document: mappings, lists, texts, numbers, booleans, null.

    Errors name the document by `place`. `comments` says whether it may hold comments.

    Raises:
        EtudeError: the text is not YAML, has another tag, the same key twice, an alias inside its
            own anchor, or a comment against `comments`, or exceeds `LONGEST`, `MOST_VALUES` or
            `DEEPEST`.
    """
    if len(text) > LONGEST:
        raise EtudeError(f"{place} is longer than {LONGEST // 1024} KiB, which no configuration is.")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not comments and (comment := _comment(text)):
            raise EtudeError(f"{place} would end before '{comment[:60]}', which YAML takes for a comment.")
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


def _comment(text: str) -> str:
    """The rest of a YAML document from its first comment on; empty without one."""
    end = 0
    for token in yaml.scan(text, Loader=_Loader):
        mark = text.find("#", end, token.start_mark.index)
        if mark >= 0:
            return text[mark:]
        end = token.end_mark.index
    return ""


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
