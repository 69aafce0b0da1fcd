"""The user's own functions by their import path, `package.module:attribute`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from etude.errors import EtudeError, brief


def import_callable(path: str, kind: str, wanted: str) -> Callable[..., Any]:
    """What the path refers to; modules in the working directory are found too, from now on.

    Args:
        path: `package.module:attribute`, the attribute with dots if it is inside another.
        kind: what it is meant to be, for errors: "reward", "prompts".
        wanted: what to give instead, for errors.

    Raises:
        EtudeError: if the module cannot be imported, or the attribute is missing or not callable.
    """
    module_name, _, attribute = path.partition(":")
    try:
        _make_working_directory_importable()
        module = import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's code runs at import: it may raise anything
        raise EtudeError(
            f"{kind} '{path}': module '{module_name}' cannot be imported ({type(error).__name__}: {brief(error)}); "
            "install it, or run from the directory that holds it."
        ) from error
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        problem = "has no attribute" if found is None else "holds something that is not callable as"
        raise EtudeError(f"{kind} '{path}': module '{module_name}' {problem} '{attribute}'; give {wanted}.")
    made: Callable[..., Any] = found
    return made


def _make_working_directory_importable() -> None:
    """A console script does not see the modules beside the recipe; `python -m` does. Last, so as to shadow nothing.

    For good: what the user's module imports when it is called, helpers beside it among them, must be found then.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
