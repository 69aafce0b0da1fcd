"""Reading a run directory, with checks."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictInt, ValidationError

from etude.config.yaml_text import parse_yaml, read_yaml_text
from etude.errors import EtudeError, brief

Interval = dict[str, Any]  # mean, low, high and the other entries of `Estimate.to_dict`
GRIDS = ("before_ode", "after_ode", "before_sde", "after_sde")


class _Checked(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Estimate(_Checked):
    mean: float
    low: float
    high: float


class _Evaluation(_Checked):
    ode: dict[str, _Estimate] | None = None
    sde: dict[str, _Estimate] | None = None
    gap: dict[str, _Estimate] | None = None
    improvement: dict[str, _Estimate] | None = None
    path_kl: _Estimate | None = None


class _Row(_Checked):
    """The checked keys of a row of metrics.jsonl; all but `iteration` may be missing."""

    iteration: StrictInt
    eta: float | list[float] | None = None
    window: dict[Literal["start", "size"], StrictInt] | None = None
    reward: dict[str, dict[str, float]] | None = None
    seconds: dict[str, float] | None = None
    evaluation: _Evaluation | None = None


@dataclass(frozen=True)
class Run:
    """The files of one run."""

    directory: Path
    config_text: str  # text of `config.yaml`
    config: dict[str, Any]  # content of `config.yaml`
    rows: list[dict[str, Any]]  # rows of `metrics.jsonl`, one mapping per iteration
    torn: bool  # whether the last line of the metrics was incomplete and left out
    summary: dict[str, Any]  # content of `summary.json`; empty while the run goes on
    grids: dict[str, bytes]  # PNG bytes of each of `GRIDS` that exists under `samples/`
    prompts: list[str]  # captions of the grids' cells
    strips: dict[int, Path] = field(default_factory=dict)  # by iteration, the row of images of its evaluation
    strip_prompts: list[str] = field(default_factory=list)  # prompts of the images in a row

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
        measured += [name for _, evaluation in self.evaluations for name in evaluation.get("ode") or {}]
        return [name for name in dict.fromkeys([*self.trained, *measured]) if name in measured]

    def setting(self, key: str, section: str | None = None) -> Any:
        """A value of the summary; before there is one, of the configuration (in `section`, if given)."""
        if key in self.summary:
            return self.summary[key]
        tree = self.config.get(section) if section else self.config
        return tree.get(key) if isinstance(tree, dict) else None

    def series(self, *path: str) -> tuple[list[int], list[float]]:
        """Iterations whose row has a number under the keys `path`, and these numbers."""
        values = ((row["iteration"], _follow(row, path)) for row in self.rows)
        points = [(iteration, float(value)) for iteration, value in values if isinstance(value, int | float)]
        return [iteration for iteration, _ in points], [value for _, value in points]

    def estimates(self, *path: str) -> list[tuple[int, Interval]]:
        """(iteration, estimate) of the evaluations that have one under the keys `path`, as `"gap", "alignment"`."""
        estimates = [(i, _follow(evaluation, path)) for i, evaluation in self.evaluations]
        return [(iteration, estimate) for iteration, estimate in estimates if isinstance(estimate, dict)]


def read_run(directory: Path) -> Run:
    """Reads a run directory.

    Raises:
        EtudeError: `directory` is no run, or a file is invalid; the message names file and line.
    """
    if not directory.is_dir():
        raise EtudeError(f"'{directory}' is not a directory: give the output directory of a run.")
    path = directory / "config.yaml"
    if not path.is_file():
        raise EtudeError(f"'{directory}' is not a run: it has no config.yaml; give the output directory of a run.")
    metrics, samples, config_text = (
        directory / "metrics.jsonl",
        directory / "samples",
        read_yaml_text(path, f"'{path}'"),
    )
    config = _expect(parse_yaml(config_text, f"'{path}'"), dict, path)
    rows, torn = parse_metrics(_text(metrics), f"'{metrics}'") if metrics.is_file() else ([], False)
    files = {name: samples / f"{name}.png" for name in GRIDS}
    grids = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    summary, prompts = _read_json(directory / "summary.json", {}), _read_json(samples / "prompts.json", [])
    along = samples / "along"
    strips = {int(file.stem): file for file in sorted(along.glob("*.png")) if re.fullmatch(r"[0-9]{1,18}", file.stem)}
    strip_prompts = _read_json(along / "prompts.json", [])
    return Run(directory, config_text, config, rows, torn, summary, grids, prompts, strips, strip_prompts)


def parse_metrics(text: str, place: str) -> tuple[list[dict[str, Any]], bool]:
    """The rows of `metrics.jsonl`, and whether a torn last line, as a kill leaves it, was left out.

    `place` names the file in the error for a line that is no row of metrics.
    """
    *lines, torn = text.split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            # An int of 300 digits or more may exceed every float.
            row = json.loads(line, parse_int=lambda digits: int(digits) if len(digits) < 300 else float(digits))
        except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python reads
            raise EtudeError(
                f"{place} line {number} is not valid JSON ({brief(error, 120)}): repair or delete that line."
            ) from None
        try:
            _Row.model_validate(row)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key, problem = ".".join(map(str, first["loc"])), first["msg"][:1].lower() + first["msg"][1:]
            told = f"{key!r}: {problem}" if key else problem
            raise EtudeError(f"{place} line {number} is not a row of metrics: {told}.") from None
        rows.append(row)
    return rows, bool(torn)


def _read_json(path: Path, default: Any) -> Any:
    """The content of a file, of the type of the default; the default if there is no file."""
    if not path.is_file():
        return default
    text = _text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EtudeError(f"'{path}' is not valid JSON ({brief(error, 120)}): restore or delete it.") from None
    return _expect(value, type(default), path)


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
