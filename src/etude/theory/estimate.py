"""A number that knows its own error."""

from __future__ import annotations

from typing import Any


class Estimate(float):
    """A float with `error` and the `kind` of error it is: a numerical error, or the half-width of a 95 % interval.

    It is an ordinary float everywhere; arithmetic returns plain floats.
    """

    error: float
    kind: str

    def __new__(cls, value: float, error: float, kind: str) -> Estimate:
        self = super().__new__(cls, value)
        self.error, self.kind = float(error), kind
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (float(self), self.error, self.kind)

    @property
    def low(self) -> float:
        return float(self) - self.error

    @property
    def high(self) -> float:
        return float(self) + self.error

    def __repr__(self) -> str:
        return f"{float(self):.6g} ± {self.error:.2g} ({self.kind})"
