"""Numbers: conversion of what users write to float64 arrays, and a number that knows its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from etude.errors import EtudeError

Array: TypeAlias = npt.NDArray[np.float64]
Numbers: TypeAlias = npt.ArrayLike


def array(value: Any, name: str) -> Array:
    """Convert `value` to a finite float64 array; an error calls it `name`."""
    try:
        out = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise EtudeError(f"{name} must be numbers, got {value!r}: pass a number or an array of numbers.") from None
    if not np.all(np.isfinite(out)):
        raise EtudeError(f"{name} must be finite, got {value!r}: replace the infinite or missing entries.")
    return out


def require(value: Any, name: str, ok: Callable[[Array], npt.NDArray[np.bool_]], rule: str) -> Array:
    """Convert `value` to an array whose entries all pass `ok`; an error quotes the first that does not, and the `rule`."""
    out = array(value, name)
    wrong = out[~ok(out)]
    if wrong.size:
        raise EtudeError(f"{name} is {wrong.flat[0]:g}, but it must be {rule}.")
    return out


def nonnegative(value: Any, name: str) -> Array:
    """Convert `value` to an array of numbers that are zero or more."""
    return require(value, name, lambda x: x >= 0, "zero or more")


def positive(value: Any, name: str) -> Array:
    """Convert `value` to an array of numbers above zero."""
    return require(value, name, lambda x: x > 0, "greater than zero")


def number(value: Any, name: str) -> float:
    """Convert `value` to one finite float."""
    out = array(value, name)
    if out.ndim:
        raise EtudeError(f"{name} has shape {out.shape}, but it must be one number: pass them one at a time.")
    return float(out)


def whole(value: Any, name: str, least: int = 1) -> int:
    """Convert `value` to an int of at least `least`."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not is_number or not np.isfinite(value) or value != int(value) or value < least:
        raise EtudeError(f"{name} is {value!r}, but it must be a whole number of at least {least}.")
    return int(value)


def plain(value: Array) -> Any:
    """Return an array of no dimension as a float, and any other array as it is."""
    return value if np.ndim(value) else float(value)


NUMERICAL = "numerical error"
INTERVAL = "95 % interval"


class Approximation(float):
    """A float with its `error` and the `kind` of that error.

    The error is a bound of the numerical error, or the half-width of a 95 % interval. Arithmetic
    with an approximation returns plain floats.
    """

    error: float
    kind: str

    def __new__(cls, value: float, error: float, kind: str) -> Approximation:
        self = super().__new__(cls, value)
        self.error, self.kind = float(error), kind
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (float(self), self.error, self.kind)

    def __repr__(self) -> str:
        return f"{float(self):.6g} ± {self.error:.2g} ({self.kind})"
