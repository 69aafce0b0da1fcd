"""Checkpoints that survive a kill at any moment, and the small files that a run writes beside them.

A checkpoint is a directory `root/iteration-000012/` with `tensors.safetensors`, `state.json` and
`manifest.json` (size and SHA-256 of the other two). It is written under a temporary name, flushed to
the disk and renamed, so it exists as a whole or not at all. A checkpoint of the same iteration is
set aside until then. The manifest detects a faulty disk or an edited file. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import warnings
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from etude.config import TrainConfig, continuation, parse_config
from etude.errors import EtudeError
from etude.files import reason, sync, write_synced
from etude.runs.layout import last_iteration

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"iteration-(\d{6,})")
_TEMPORARY, _SET_ASIDE = ".writing-", ".replaced-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: tensors on the CPU, JSON state, and its directory."""

    iteration: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path


def save_checkpoint(root: Path, iteration: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Writes `root/iteration-<iteration>/` atomically and returns its path.

    Tensors are saved bit for bit, each on its own: aliases become equal copies. A checkpoint of the
    same iteration is replaced. Leftovers of killed saves are removed.

    Raises:
        EtudeError: the state is not JSON (NaN included), or the disk cannot take the checkpoint. In
            that case older checkpoints are intact; the message says so, with place and size.
    """
    own, text = _apart(tensors), _json(state, iteration)
    path = root / f"iteration-{iteration:06d}"
    temporary, old = (path.with_name(f"{prefix}{path.name}") for prefix in (_TEMPORARY, _SET_ASIDE))
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clean(root)
        temporary.mkdir()
        save_file(own, temporary / TENSORS)
        sync(temporary / TENSORS)
        write_synced(temporary / STATE, text)
        files = {file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in _content(temporary)}
        write_synced(temporary / MANIFEST, _json({"iteration": iteration, "files": files}, iteration))
        sync(temporary)
        if path.exists():
            os.rename(path, old)  # a rename replaces no directory that holds something
        os.rename(temporary, path)
        _delete(old)
        sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        needed = sum(tensor.nbytes for tensor in own.values()) + len(text)
        raise EtudeError(
            f"the checkpoint of iteration {iteration} needs {needed / 1e6:.3f} MB in '{root}' and could not be written "
            f"({reason(error)}): make room there and continue with --resume, the previous checkpoint is intact."
        ) from error
    return path


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, each in memory of its own; copied only if they are not so already."""
    own: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        packed = tensor.detach().cpu().contiguous()
        place = packed.untyped_storage().data_ptr()
        own[name] = packed.clone() if place in places else packed
        places.add(place)
    return own


def load_latest(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint under `root`, or None. A warning names each newer, damaged one."""
    for iteration, path in _numbered(root):
        damage = _damage(iteration, path)
        if damage is None:
            try:
                state = json.loads((path / STATE).read_bytes())
                return Checkpoint(iteration, load_file(path / TENSORS), state, path)
            except (ValueError, RecursionError, SafetensorError) as error:
                damage = f"its content cannot be read ({error})"
        warnings.warn(f"checkpoint '{path}' is damaged and not used: {damage}", stacklevel=2)
    return None


def prune(root: Path, keep: int, sound: set[int] | None = None) -> None:
    """Removes old and damaged checkpoints, and leftovers of killed saves.

    The newest `keep` whole checkpoints stay. Damaged ones stay only if no whole one is newer. The
    iterations in `sound` are not read again; those found to be whole are added.
    """
    known, count = set() if sound is None else sound, 0
    _clean(root)
    for iteration, path in _numbered(root):
        if count < keep and (iteration in known or _damage(iteration, path) is None):
            known.add(iteration)
            count += 1
        elif count:  # renamed first, so that a kill halfway leaves nothing that looks like a checkpoint
            doomed = path.with_name(f"{_TEMPORARY}{path.name}-old")
            _delete(doomed)
            os.rename(path, doomed)
            _delete(doomed)


def newest_whole(root: Path, sound: Container[int] = ()) -> int | None:
    """The iteration of the newest whole checkpoint under `root`, or None. Those in `sound` are not read."""
    return next((number for number, path in _numbered(root) if number in sound or _damage(number, path) is None), None)


def _damage(iteration: int, path: Path) -> str | None:
    """The first contradiction to the manifest of a checkpoint, in words; None for a whole one."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["iteration"] != iteration:
            return f"{MANIFEST} is of iteration {manifest['iteration']}"
        for file in _content(path):
            expected, size = manifest["files"][file.name], file.stat().st_size
            if size != expected["bytes"]:
                return f"{file.name} has {size} bytes instead of {expected['bytes']}"
            if _digest(file) != expected["sha256"]:
                return f"{file.name} does not have the SHA-256 that {MANIFEST} gives"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read ({reason(error)})"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} is not the JSON that was written"
    return None


def _numbered(root: Path) -> list[tuple[int, Path]]:
    """Checkpoints by iteration, newest first. One that was set aside counts until its replacement exists."""
    paths: dict[int, Path] = {}
    for entry in sorted(root.iterdir(), reverse=True) if root.is_dir() else ():  # ".replaced-..." after "iteration-..."
        if match := _NAME.fullmatch(entry.name.removeprefix(_SET_ASIDE)):
            paths.setdefault(int(match[1]), entry)
    return sorted(paths.items(), reverse=True)


def _content(path: Path) -> tuple[Path, Path]:
    """The files of a checkpoint beside its manifest."""
    return path / TENSORS, path / STATE


def _json(value: Mapping[str, Any], iteration: int) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, indent=1).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise EtudeError(f"the state of iteration {iteration} cannot be written as JSON: {error}.") from None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _clean(root: Path) -> None:
    """Removes the leftovers of a killed save, and puts back the checkpoint that it had set aside."""
    for entry in list(root.iterdir()) if root.is_dir() else ():
        place = entry.with_name(entry.name.removeprefix(_SET_ASIDE))
        if place != entry and not os.path.lexists(place):
            os.rename(entry, place)
        elif place != entry or entry.name.startswith(_TEMPORARY):
            _delete(entry)


def _delete(path: Path) -> None:
    """Removes a directory with its content, a link without its target, or nothing."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


class Checkpoints:
    """The checkpoints of one run. `sound`: iterations whose checkpoints this object wrote or loaded."""

    def __init__(self, out: Path, config: TrainConfig) -> None:
        self.out, self.root, self.config = out, out / "checkpoints", config
        self.sound: set[int] = set()

    def save(self, iteration: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Writes a checkpoint with the configuration, and removes old ones."""
        save_checkpoint(self.root, iteration, tensors, {"config": self.config.model_dump(mode="json"), **state})
        self.sound.add(iteration)
        self.prune()

    def prune(self) -> None:
        """Removes old checkpoints; a killed run may have left one too many."""
        prune(self.root, self.config.checkpoint.keep, self.sound)

    def peek(self) -> tuple[int, dict[str, Any]] | None:
        """Iteration and state of the newest checkpoint whose state is whole; its tensors are not read."""
        for iteration, path in _numbered(self.root):
            with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                data, manifest = (path / STATE).read_bytes(), json.loads((path / MANIFEST).read_bytes())
                if hashlib.sha256(data).hexdigest() == manifest["files"][STATE]["sha256"]:
                    return iteration, dict(json.loads(data))
        return None

    def load(self) -> Checkpoint | None:
        """The newest sound checkpoint; None if none was ever written.

        Raises:
            EtudeError: all checkpoints are damaged or gone, or the newest sound one belongs to a
                run with another configuration (`continuation`). A setting that it lacks counts as its default.
        """
        checkpoint = load_latest(self.root)
        if checkpoint is None:
            if self.root.is_dir() and any(self.root.glob("iteration-*")):
                raise EtudeError(
                    f"no checkpoint in '{self.root}' is sound, so the run cannot be resumed: start it again in another directory."
                )
            done = last_iteration(self.out / "metrics.jsonl")
            if done > 0:  # the first checkpoint is that of iteration 0
                raise EtudeError(
                    f"the run in '{self.out}' has done {done} iterations, but its checkpoints are gone from '{self.root}': put them "
                    "back, or start another run in another directory."
                )
            return None
        stored = checkpoint.state.get("config") if isinstance(checkpoint.state, dict) else None
        if not isinstance(stored, dict):
            raise EtudeError(
                f"'{checkpoint.path}' does not say whose run it is: start another run in another directory."
            )
        change = continuation(parse_config(stored, f"the configuration in '{self.root}'"), self.config)
        if change is not None:
            key, old, new = change
            raise EtudeError(
                f"the run in '{self.out}' has {key} = {old!r}, but {new!r} was given: resume it with its own "
                "config.yaml, or start another run in another directory."
            )
        self.sound.add(checkpoint.iteration)
        return checkpoint

    def remaining(self) -> str:
        """The checkpoint that a failed run can continue from, in words."""
        newest = newest_whole(self.root, self.sound)  # a process that does not write must look on the disk
        if newest is None:
            return "no checkpoint was written yet"
        return f"intact checkpoint: iteration {newest} in '{self.root}', --resume continues from it"

    def advice(self) -> str:
        """The command that continues an interrupted run, in words."""
        command = f"`etude train --resume --out {shlex.quote(str(self.out))}`"
        newest = newest_whole(self.root, self.sound)
        if newest is None:
            return f"there is no checkpoint yet, and {command} starts over"
        return f"{command} continues from the checkpoint of iteration {newest}"
