"""Results of a benchmark: ratios of interleaved measurements, as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from etude.runs.environment import processor

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Ratio:
    """Median and range of the ratios of pairs, each measured one right after the other."""

    median: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
        """The ratios numerators[i] / denominators[i].

        Raises:
            ValueError: there is no pair, or the two lists differ in length.
        """
        ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
        if not ratios:
            raise ValueError("a ratio needs at least one pair of measurements.")
        return cls(statistics.median(ratios), min(ratios), max(ratios), len(ratios))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Headline:
    """A number that a benchmark measures, with its target, if any."""

    name: str
    ratio: Ratio
    target: float | None = None
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Whether the target is met, or there is none."""
        if self.target is None:
            return True
        return self.ratio.median <= self.target if self.at_most else self.ratio.median >= self.target

    @property
    def bound(self) -> str:
        """The target in words, empty if there is none."""
        return "" if self.target is None else f"at {'most' if self.at_most else 'least'} {self.target:g}"

    @property
    def verdict(self) -> str:
        return "" if self.target is None else "met" if self.met else "missed"

    def __str__(self) -> str:
        return f"{self.name}: {self.ratio}" + (f", target {self.bound}: {self.verdict}" if self.bound else "")

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Headline:
        return cls(tree["name"], Ratio(**tree["ratio"]), tree["target"], tree["at_most"])


@dataclass(frozen=True)
class Result:
    """The result of one benchmark.

    Attributes:
        columns: names of the table's columns.
        rows: rows of the table, as text.
        settings: all settings of the benchmark, the seed included.
        measurements: every single timing, from which another summary can be computed.
        versions: versions of the libraries on each side.
        further: other numbers for the summary.
    """

    benchmark: str
    headline: Headline
    columns: list[str]
    rows: list[list[str]]
    settings: dict[str, Any]
    measurements: dict[str, Any]
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    further: list[Headline] = field(default_factory=list)

    @property
    def headlines(self) -> list[Headline]:
        return [self.headline, *self.further]

    @property
    def met(self) -> bool:
        """Whether every target is met."""
        return all(one.met for one in self.headlines)

    def as_json(self) -> dict[str, Any]:
        """A plain tree: the fields, plus date, machine and etude's own version."""
        return {
            **asdict(self),
            "headline": self.headline.as_json(),
            "further": [one.as_json() for one in self.further],
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "machine": machine(),
            "etude": version("etude"),
        }

    def as_markdown(self) -> str:
        """The table and its origin, for the documentation."""
        found = self.as_json()
        where = found["machine"]
        load = " or ".join(dict.fromkeys(f"{one:.1f}" for one in where["load"]))
        origin = f"{found['date']}, etude {found['etude']}, {where['processor']}, {where['cores']} cores, Python {where['python']}, load {load}"
        stated = "\n\n".join(f"**{one}.**" for one in self.headlines)
        return f"{stated}\n\n{markdown_table(self.columns, self.rows)}\n\n{origin}.\n"

    def write(self, directory: Path = RESULTS) -> Path:
        """Writes `<benchmark>.json` and `<benchmark>.md`; returns the path of the first."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.benchmark}.json"
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(self.as_markdown(), encoding="utf-8")
        return path


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """Rows of text under their columns."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows))


def machine() -> dict[str, Any]:
    """The machine. `load` is the 1-minute load average, which shows whether the machine was quiet."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": [round(os.getloadavg()[0], 2)],
    }


def milliseconds(values: Sequence[float]) -> str:
    """The median, in ms, of timings in seconds."""
    return f"{1e3 * statistics.median(values):.1f}"
