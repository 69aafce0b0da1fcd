"""Prompt sets: one prompt per line, blank lines and lines that begin with `#` are skipped.

`animals` is the set of DDPO (Black et al. 2023, arXiv 2305.13301). The emoji sets are Unicode CLDR English short names;
`emoji-train` and `emoji-eval` have no name in common.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from etude.errors import EtudeError, unknown

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


def prompt_set_names() -> list[str]:
    """Names of the built-in prompt sets."""
    return sorted(entry.name.removesuffix(".txt") for entry in _sets().iterdir() if entry.name.endswith(".txt"))


def load_prompts(source: str) -> list[str]:
    """The prompts of a built-in set or of a UTF-8 text file, in order, surrounding blanks removed; repeats are kept.

    A built-in name wins over a file of the same name; write `./name` for the file.

    Raises:
        EtudeError: the set or file does not exist, is a directory, is not UTF-8 text, or holds no prompt.
    """
    if source in prompt_set_names():
        return _parse((_sets() / f"{source}.txt").read_text(encoding="utf-8"))
    prompts = _parse(_read(source))
    if not prompts:
        raise EtudeError(
            f"prompt file '{source}' holds no prompt: write one per line (blank lines and # comments are skipped)."
        )
    return prompts


def _sets() -> Traversable:
    return resources.files("etude") / "prompt_sets"


def _parse(text: str) -> list[str]:
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def _read(source: str) -> str:
    if not source:
        raise unknown("prompt set or file", source, prompt_set_names())
    path = Path(source)
    if path.is_dir():
        raise EtudeError(f"prompts '{source}' is a directory: give a text file with one prompt per line.")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if path.suffix or len(path.parts) > 1:
            raise EtudeError(
                f"prompt file '{source}' does not exist: give a text file with one prompt per line, "
                f"or a built-in set ({', '.join(prompt_set_names())})."
            ) from None
        raise unknown("prompt set or file", source, prompt_set_names()) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise EtudeError(f"prompt file '{source}' cannot be read ({reason}): check its name and permissions.") from None
    return _decode(data, source)


def _decode(data: bytes, source: str) -> str:
    """UTF-8 with or without a byte order mark; names the line of the first byte that is not text."""
    remedy = "save the prompts as UTF-8 text, one per line"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise EtudeError(f"prompt file '{source}', line {line}: byte 0x{byte:02x} is not UTF-8; {remedy}.") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise EtudeError(f"prompt file '{source}', line {line}: it holds a NUL byte, so it is not text; {remedy}.")
    return text
