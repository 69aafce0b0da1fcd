"""Turning what users write (numbers, lists) into float64 arrays, with an error that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from etude.errors import EtudeError

Array: TypeAlias = npt.NDArray[np.float64]
Numbers: TypeAlias = npt.ArrayLike


def array(value: Any, name: str) -> Array:
    """`value` as a finite float64 array; `name` is what the error calls it."""
    try:
        out = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise EtudeError(f"{name} must be numbers, got {value!r}: pass a number or an array of numbers.") from None
    if not np.all(np.isfinite(out)):
        raise EtudeError(f"{name} must be finite, got {value!r}: replace the infinite or missing entries.")
    return out


def checked(value: Any, name: str, ok: Callable[[Array], npt.NDArray[np.bool_]], rule: str) -> Array:
    """`array(value)` whose every entry satisfies `ok`; the error quotes the first entry that does not, and `rule`."""
    out = array(value, name)
    wrong = out[~ok(out)]
    if wrong.size:
        raise EtudeError(f"{name} is {wrong.flat[0]:g}, but it must be {rule}.")
    return out


def nonnegative(value: Any, name: str) -> Array:
    return checked(value, name, lambda x: x >= 0, "zero or more")


def positive(value: Any, name: str) -> Array:
    return checked(value, name, lambda x: x > 0, "greater than zero")


def number(value: Any, name: str) -> float:
    """`value` as one finite float."""
    out = array(value, name)
    if out.ndim:
        raise EtudeError(f"{name} has shape {out.shape}, but it must be one number: pass them one at a time.")
    return float(out)


def whole(value: Any, name: str, least: int = 1) -> int:
    """`value` as an int of at least `least`."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not is_number or not np.isfinite(value) or value != int(value) or value < least:
        raise EtudeError(f"{name} is {value!r}, but it must be a whole number of at least {least}.")
    return int(value)
