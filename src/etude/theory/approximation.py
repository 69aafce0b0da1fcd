"""A number that knows its own error."""

from __future__ import annotations

from typing import Any

NUMERICAL = "numerical error"
INTERVAL = "95 % interval"


class Approximation(float):
    """A float with its `error` and the `kind` of that error.

    The error is a bound of the numerical error, or the half-width of a 95 % interval. An
    approximation is an ordinary float everywhere; arithmetic with it returns plain floats.
    """

    error: float
    kind: str

    def __new__(cls, value: float, error: float, kind: str) -> Approximation:
        self = super().__new__(cls, value)
        self.error, self.kind = float(error), kind
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (float(self), self.error, self.kind)

    @property
    def low(self) -> float:
        """Value less its error."""
        return float(self) - self.error

    @property
    def high(self) -> float:
        """Value plus its error."""
        return float(self) + self.error

    def __repr__(self) -> str:
        return f"{float(self):.6g} ± {self.error:.2g} ({self.kind})"
