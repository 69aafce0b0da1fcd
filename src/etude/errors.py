"""The error that users see: a sentence with the value, the place and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EtudeError(ValueError):
    """An error that the user can mend: one sentence, which commands print without a traceback.

    `shared` says whether every process of the run raises it, so that only the first need print it.

    Example:
        >>> import etude
        >>> try:
        ...     etude.CPS(eta=2.0)
        ... except etude.EtudeError as error:
        ...     print(error)
        CPS with eta 2 folds back, to less noise than at 1: give at most 1 (all the noise redrawn).
    """

    shared = False


def unknown(kind: str, name: str, known: Iterable[str]) -> EtudeError:
    """The error for an unknown name of a `kind` such as "kernel": the nearest one, and all of them."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1)
    if not choices:
        return EtudeError(f"unknown {kind} '{name}': there is none to choose from.")
    hint = f"did you mean '{near[0]}'? " if near else ""
    return EtudeError(f"unknown {kind} '{name}': {hint}the choices are {', '.join(choices)}.")


def brief_value(value: object, limit: int = 80) -> str:
    """A value as Python writes it, cut at `limit` characters to fit in a sentence."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # beyond 4300 digits Python writes no whole number
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def brief(error: BaseException, limit: int = 300) -> str:
    """An exception's text on one line, cut at `limit` characters to fit in a sentence."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # the text of a user's own exception may itself raise
        text = "it has no text"
    return text if len(text) <= limit else text[: limit - 3] + "..."
