"""Prompt sets: the built-in ones, a file, a function, or a dataset.

`animals` is the set of DDPO (arXiv 2305.13301); `animals-eval` lists other animals. The emoji sets
are Unicode CLDR English short names; `emoji-train` and `emoji-eval` have no name in common.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from etude.errors import EtudeError, brief, brief_value, unknown
from etude.prompts.prompt_file import REMEDY, read_entries
from etude.registry import import_callable
from etude.undisturbed import undisturbed

_SETS = Path(__file__).parent / "sets"
_HUB = "hub:"
_HUB_OPTIONS = ("column", "config", "data_files", "metadata", "revision", "split")
PARTS = ("train", "eval")
"""Parts of a source, named after a `#`: nine tenths of its prompts, and the rest."""
_RESERVED = {"groups", "images", "prompts", "self"}  # names of a reward's own arguments


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order, repeats kept, with their other fields.

    Attributes:
        metadata: by name, a list with an entry for each prompt (None where a prompt has none).
            Rewards get the lists as keyword arguments.

    Raises:
        EtudeError: a list has another length, or a name is that of a reward's own argument.
    """

    texts: list[str]
    metadata: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in self.metadata.items():
            if name in _RESERVED:
                raise EtudeError(
                    f"prompts have a field '{name}', as a reward's own argument is called: rename the field."
                )
            if len(values) != len(self.texts):
                raise EtudeError(f"there are {len(self.texts)} prompts but {len(values)} entries in '{name}'.")

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Iterable[int]) -> PromptSet:
        """The prompts at some places; a place may occur more than once."""
        places = list(indices)
        columns = {name: [values[i] for i in places] for name, values in self.metadata.items()}
        return PromptSet([self.texts[i] for i in places], columns)

    def head(self, count: int) -> PromptSet:
        """The first `count` prompts, or all if there are fewer."""
        return self.select(range(min(count, len(self))))


def prompt_set_names() -> list[str]:
    """Names of the built-in prompt sets."""
    return sorted(path.stem for path in _SETS.glob("*.txt"))


def load_prompts(source: str) -> PromptSet:
    """The prompts of a source, in order, without surrounding blanks.

    | source | prompts |
    | --- | --- |
    | `emoji-train` | a built-in set; it wins over a file of the same name (write `./name` for the file) |
    | `set.jsonl` | UTF-8, one JSON object per line: its field `prompt`, and its other fields as metadata |
    | `set.json` | a list of texts, or of such objects; JSON is known by its content, too |
    | `set.csv`, `set.tsv` | a table: its column `prompt`, and its other columns as metadata |
    | `set.txt`, any other file | UTF-8, one prompt per line; blank lines and lines that begin with `#` are skipped |
    | `package.module:function` | the function's return value: strings, or dicts like the objects of a JSONL file |
    | `hub:owner/name?split=train&column=prompt&metadata=tag` | a dataset of `datasets.load_dataset`, from the hub or a directory |
    | any of these and `#train` or `#eval` | nine tenths of its prompts, or the rest (`part_of`); a file of that name wins |

    Raises:
        EtudeError: the source does not exist or cannot be read, holds no prompt, or holds something
            other than prompts.
    """
    is_file = os.path.exists(os.path.expanduser(source))
    whole, mark, part = source.rpartition("#")
    if mark and part in PARTS and not is_file:
        prompts = load_prompts(whole)
        selection = prompts.select(i for i, text in enumerate(prompts.texts) if part_of(text) == part)
        if not selection.texts:
            raise EtudeError(
                f"prompts '{source}' are none: all {len(prompts)} of '{whole}' belong to the other part; "
                "give more prompts, or two sources."
            )
        return selection
    if source in prompt_set_names():
        return _from_entries(read_entries(str(_SETS / f"{source}.txt")))
    if source.startswith(_HUB):
        prompts = _from_hub(source)
    elif re.fullmatch(r"[\w.]+:[\w.]+", source) and not is_file:
        prompts = _from_function(source)
    else:
        prompts = _from_file(source)
    if not prompts.texts:
        remedy = "in a text file one per line; blank lines and # comments are skipped"
        raise EtudeError(f"prompt source '{source}' holds no prompt: give at least one ({remedy}).")
    return prompts


def part_of(text: str) -> str:
    """The part of its source to which a prompt belongs: "eval" for about one in ten, else "train".

    It depends on the prompt's words alone (SHA-256; case and blanks do not count). Repeats therefore
    stay together, and a new prompt does not move any other.
    """
    return "eval" if hashlib.sha256(_words(text).encode()).digest()[0] * 10 < 256 else "train"


def overlap(trained: PromptSet, evaluated: PromptSet) -> list[str]:
    """The evaluated prompts that are also trained on, without repeats, case and blanks ignored."""
    known = {_words(text) for text in trained.texts}
    return list(dict.fromkeys(text for text in evaluated.texts if _words(text) in known))


def clusters(texts: Iterable[str]) -> list[int]:
    """The index of the first prompt with the same words, for each prompt. Case and blanks do not count.

    Images of one prompt are not independent, wherever it stands in its source.
    """
    first: dict[str, int] = {}
    return [first.setdefault(_words(text), i) for i, text in enumerate(texts)]


def _words(text: str) -> str:
    return " ".join(text.casefold().split())


def _from_file(source: str) -> PromptSet:
    if not source:
        raise unknown("prompt set or file", source, prompt_set_names())
    try:
        return _from_entries(read_entries(source))
    except FileNotFoundError:
        if Path(source).suffix or len(Path(source).parts) > 1:
            known = ", ".join(prompt_set_names())
            remedy = f"give a file ({REMEDY}), or a built-in set ({known})"
            raise EtudeError(f"prompt file '{source}' does not exist: {remedy}.") from None
        raise unknown("prompt set or file", source, prompt_set_names()) from None


def _from_function(source: str) -> PromptSet:
    wanted = "module:function, where function() returns a list of strings, or of dicts with a field 'prompt'"
    function = import_callable(source, "prompts", wanted)
    try:
        with undisturbed():
            records = copy.deepcopy(function())  # the function's module may change its own later
    except Exception as error:  # a user's code raises anything; the error names the function
        raise EtudeError(f"prompts '{source}' failed: {type(error).__name__}: {brief(error)}") from error
    if isinstance(records, (str, bytes, dict)) or not isinstance(records, Sequence):
        raise EtudeError(f"prompts '{source}' returned {type(records).__name__}; give {wanted}.")
    return _from_entries({f"prompts '{source}', entry {i}": record for i, record in enumerate(records)})


def _from_hub(source: str) -> PromptSet:
    name, _, query = source.removeprefix(_HUB).partition("?")
    pairs = [part.partition("=")[::2] for part in query.split("&") if part]
    options = dict(pairs)
    if len(options) < len(pairs):
        raise EtudeError(f"prompts '{source}' give an option twice: leave one out.")
    for option in options:
        if option not in _HUB_OPTIONS:
            raise unknown("option of a dataset of prompts", option, _HUB_OPTIONS)
    if not name:
        raise EtudeError(f"prompts '{source}' name no dataset: give hub:owner/name, or hub: and a directory.")
    if find_spec("datasets") is None:
        raise EtudeError(f"prompts '{source}' need the package datasets: pip install 'etude[datasets]'.")
    from datasets import load_dataset

    split, revision = options.get("split", "train"), options.get("revision")
    files = {"data_files": options["data_files"]} if "data_files" in options else {}
    try:
        dataset = load_dataset(name, options.get("config"), split=split, revision=revision, **files)
    except Exception as error:  # the library passes on whatever its readers raise
        raise EtudeError(f"prompts '{source}' cannot be loaded ({type(error).__name__}: {brief(error)}).") from error
    column = options.get("column", "prompt")
    extra = [name for name in options.get("metadata", "").split(",") if name]
    for wanted in (column, *extra):
        if wanted not in dataset.column_names:
            raise unknown(f"column of the dataset '{name}'", wanted, dataset.column_names)
    texts = [_text(value, f"prompts '{source}', row {i}") for i, value in enumerate(dataset[column])]
    return PromptSet(texts, {name: list(dataset[name]) for name in extra})


def _from_entries(entries: Mapping[str, Any]) -> PromptSet:
    """The prompts in strings, or in dicts with a field `prompt`, by place; errors name the place."""
    texts, extras = [], []
    for place, record in entries.items():
        fields = record if isinstance(record, dict) else {"prompt": record}
        texts.append(_text(fields.get("prompt"), place))
        extras.append({name: value for name, value in fields.items() if name != "prompt"})
    names = dict.fromkeys(str(name) for extra in extras for name in extra)
    return PromptSet(texts, {name: [extra.get(name) for extra in extras] for name in names})


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise EtudeError(f"{place}: its prompt is {brief_value(value)}; give a text that is not empty.")
    half = re.search("[\ud800-\udfff]", value)  # JSON may hold half a character; a file, tokenizer or page cannot
    if half or "\0" in value:
        problem = "half of a surrogate pair; give whole characters" if half else "a NUL character; remove it"
        raise EtudeError(f"{place}: its prompt {brief_value(value)} holds {problem}.")
    return value.strip()
