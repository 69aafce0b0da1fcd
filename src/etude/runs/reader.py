"""Reading a run directory, with checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictInt, ValidationError

from etude.config.yaml_text import parse_yaml, read_yaml_text
from etude.errors import EtudeError, brief

Interval = dict[str, Any]  # mean, low, high and the other entries of `Estimate.to_dict`
GRIDS = ("before_ode", "after_ode", "before_sde", "after_sde")


class _Estimate(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    mean: float
    low: float
    high: float


class _Evaluation(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    ode: dict[str, _Estimate] | None = None
    sde: dict[str, _Estimate] | None = None
    gap: dict[str, _Estimate] | None = None
    improvement: dict[str, _Estimate] | None = None


class _Row(BaseModel):
    """The checked keys of a row of metrics.jsonl; all but `iteration` may be missing."""

    model_config = ConfigDict(extra="allow", strict=True)
    iteration: StrictInt
    eta: float | list[float] | None = None
    window: dict[Literal["start", "size"], StrictInt] | None = None
    reward: dict[str, dict[str, float]] | None = None
    seconds: dict[str, float] | None = None
    evaluation: _Evaluation | None = None


@dataclass(frozen=True)
class Run:
    """The files of one run.

    Attributes:
        directory: directory of the run.
        config_text: text of `config.yaml`.
        config: content of `config.yaml`.
        rows: rows of `metrics.jsonl`, one mapping per iteration.
        torn: whether the last line of the metrics was incomplete and left out.
        summary: content of `summary.json`; empty while the run goes on.
        grids: PNG bytes of each of `GRIDS` that exists under `samples/`.
        prompts: captions of the grids' cells.
    """

    directory: Path
    config_text: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    torn: bool
    summary: dict[str, Any]
    grids: dict[str, bytes]
    prompts: list[str]

    @property
    def evaluations(self) -> list[tuple[int, dict[str, Any]]]:
        """(iteration, evaluation) of the evaluated iterations, in order."""
        return [(row["iteration"], row["evaluation"]) for row in self.rows if row.get("evaluation")]

    @property
    def trained(self) -> list[str]:
        """Names of the rewards that were trained on."""
        return list(self.summary.get("rewards") or self.config.get("rewards") or {})

    @property
    def rewards(self) -> list[str]:
        """Names of all measured rewards, the trained ones first."""
        measured = [name for row in self.rows for name in row.get("reward") or {}]
        for _, evaluation in self.evaluations:
            measured += list(evaluation.get("ode") or {})
        return [name for name in dict.fromkeys([*self.trained, *measured]) if name in measured]

    def setting(self, key: str, section: str | None = None) -> Any:
        """A value of the summary; before there is one, of the configuration (in `section`, if given)."""
        if key in self.summary:
            return self.summary[key]
        tree = self.config.get(section) if section else self.config
        return tree.get(key) if isinstance(tree, dict) else None

    def series(self, *path: str) -> tuple[list[int], list[float]]:
        """Iterations whose row has a number under the keys `path`, and these numbers."""
        values = [(row["iteration"], _follow(row, path)) for row in self.rows]
        points = [(iteration, float(value)) for iteration, value in values if isinstance(value, int | float)]
        return [iteration for iteration, _ in points], [value for _, value in points]

    def intervals(self, quantity: str, reward: str) -> list[tuple[int, Interval]]:
        """(iteration, estimate) of `ode`, `sde`, `gap` or `improvement` for one reward."""
        estimates = [(i, _follow(evaluation, (quantity, reward))) for i, evaluation in self.evaluations]
        return [(iteration, estimate) for iteration, estimate in estimates if isinstance(estimate, dict)]


def read_run(directory: Path) -> Run:
    """Reads a run directory.

    Raises:
        EtudeError: `directory` is no run, or one of its files is invalid; the message names file
            and line.
    """
    if not directory.is_dir():
        raise EtudeError(f"'{directory}' is not a directory: give the output directory of a run.")
    path = directory / "config.yaml"
    if not path.is_file():
        raise EtudeError(f"'{directory}' is not a run: it has no config.yaml; give the output directory of a run.")
    config_text = read_yaml_text(path, f"'{path}'")
    config = parse_yaml(config_text, f"'{path}'")
    metrics = directory / "metrics.jsonl"
    rows, torn = parse_metrics(_text(metrics), f"'{metrics}'") if metrics.is_file() else ([], False)
    summary = _read_json(directory / "summary.json", {})
    prompts = _read_json(directory / "samples" / "prompts.json", [])
    files = {name: directory / "samples" / f"{name}.png" for name in GRIDS}
    return Run(
        directory=directory,
        config_text=config_text,
        config=_expect(config, dict, path),
        rows=rows,
        torn=torn,
        summary=_expect(summary, dict, directory / "summary.json"),
        grids={name: file.read_bytes() for name, file in files.items() if file.is_file()},
        prompts=_expect(prompts, list, directory / "samples" / "prompts.json"),
    )


def parse_metrics(text: str, place: str) -> tuple[list[dict[str, Any]], bool]:
    """The rows of `metrics.jsonl`, and whether a last line without its end was left out: a killed run may have been writing it.

    Raises:
        EtudeError: a line is no row of metrics; `place` names the file.
    """
    lines = text.split("\n")
    torn = bool(lines.pop())
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, parse_int=_number)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python reads
            raise EtudeError(
                f"{place} line {number} is not valid JSON ({brief(error, 120)}): repair or delete that line."
            ) from None
        try:
            _Row.model_validate(row)
        except ValidationError as error:
            raise EtudeError(f"{place} line {number} is not a row of metrics: {_problem(error)}.") from None
        rows.append(row)
    return rows, torn


def _number(digits: str) -> int | float:
    """An int; from 300 digits on a float, since such an int may exceed every float."""
    return int(digits) if len(digits) < 300 else float(digits)


def _problem(error: ValidationError) -> str:
    first: Mapping[str, Any] = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place and repr(place) + ': '}{first['msg'][:1].lower()}{first['msg'][1:]}"


def _read_json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise EtudeError(f"'{path}' is not valid JSON ({brief(error, 120)}): restore or delete it.") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EtudeError(f"'{path}' cannot be read as UTF-8 text: {error}.") from None


def _expect(value: Any, kind: type, path: Path) -> Any:
    if not isinstance(value, kind):
        raise EtudeError(
            f"'{path}' holds a {type(value).__name__} where a {kind.__name__} belongs: restore or delete it."
        )
    return value


def _follow(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
