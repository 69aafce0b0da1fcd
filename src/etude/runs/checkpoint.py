"""Checkpoints that survive a kill at any moment, and the small files that a run writes beside them.

A checkpoint is a directory `root/iteration-000012/` with `tensors.safetensors`, `state.json` and
`manifest.json` (size and SHA-256 of the other two). It is written under a temporary name beside its
place, flushed to the disk, and renamed, so it exists as a whole or not at all. A checkpoint of the
same iteration is set aside until then. The manifest detects damage that a rename cannot prevent: a
faulty disk, an edited file. Nothing is pickled.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from etude.config import TrainConfig, difference, parse_config
from etude.errors import EtudeError
from etude.files import reason, sync, write_synced
from etude.runs.layout import last_iteration

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_CONTENT = (TENSORS, STATE)
_NAME = re.compile(r"iteration-(\d{6,})")
_TEMPORARY, _SET_ASIDE = ".writing-", ".replaced-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as `load_latest` reads it: tensors on the CPU, JSON state, and its directory."""

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
    own = _apart(tensors)
    text = _json(state, iteration)
    path = root / f"iteration-{iteration:06d}"
    temporary = root / f"{_TEMPORARY}{path.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clean(root)
        temporary.mkdir()
        save_file(own, temporary / TENSORS)
        sync(temporary / TENSORS)
        write_synced(temporary / STATE, text)
        write_synced(temporary / MANIFEST, _json({"iteration": iteration, "files": _listing(temporary)}, iteration))
        sync(temporary)
        _replace_directory(temporary, path)
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
    """The tensors as safetensors requires them: on the CPU, contiguous, each in memory of its own.

    A tensor is copied only if it is not so already.
    """
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
        try:
            return _load(iteration, path)
        except _DamagedError as error:
            warnings.warn(f"checkpoint '{path}' is damaged and not used: {error}", stacklevel=2)
    return None


def prune(root: Path, keep: int, sound: set[int] | None = None) -> None:
    """Removes old and damaged checkpoints, and leftovers of killed saves.

    The newest `keep` whole checkpoints stay. Damaged ones stay only if no whole one is newer.

    Args:
        root: directory of the checkpoints.
        keep: number of whole checkpoints that stay.
        sound: iterations whose checkpoints are known to be whole, since they were just written or
            loaded; they are not read again. Iterations found to be whole are added.
    """
    known, count = set() if sound is None else sound, 0
    if root.is_dir():
        _clean(root)
    for iteration, path in _numbered(root):
        if count >= keep:
            _remove_directory(path)
        elif iteration in known or _is_whole(iteration, path):
            known.add(iteration)
            count += 1
        elif count:
            _remove_directory(path)


def newest_whole(root: Path, sound: Container[int] = ()) -> int | None:
    """The iteration of the newest whole checkpoint under `root`, or None.

    Checkpoints of the iterations in `sound` are known to be whole and are not read.
    """
    return next(
        (iteration for iteration, path in _numbered(root) if iteration in sound or _is_whole(iteration, path)), None
    )


class _DamagedError(Exception):
    """A checkpoint cannot be used, for the reason in the message."""


def _load(iteration: int, path: Path) -> Checkpoint:
    _verify(iteration, path)
    try:
        state = json.loads((path / STATE).read_bytes())
        tensors = load_file(path / TENSORS)
    except (ValueError, RecursionError, SafetensorError) as error:
        raise _DamagedError(f"its content cannot be read ({error})") from None
    return Checkpoint(iteration, tensors, state, path)


def _verify(iteration: int, path: Path) -> None:
    """Compares the files of a checkpoint with its manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["iteration"] != iteration:
            raise _DamagedError(f"{MANIFEST} is of iteration {manifest['iteration']}")
        expected = {name: (manifest["files"][name]["bytes"], manifest["files"][name]["sha256"]) for name in _CONTENT}
        for name in _CONTENT:
            file = path / name
            if file.stat().st_size != expected[name][0]:
                raise _DamagedError(f"{name} has {file.stat().st_size} bytes instead of {expected[name][0]}")
            if _digest(file) != expected[name][1]:
                raise _DamagedError(f"{name} does not have the SHA-256 that {MANIFEST} gives")
    except FileNotFoundError as error:
        raise _DamagedError(f"{Path(error.filename).name} is missing") from None
    except OSError as error:
        raise _DamagedError(f"it cannot be read ({reason(error)})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _DamagedError(f"{MANIFEST} is not the JSON that was written") from None


def _is_whole(iteration: int, path: Path) -> bool:
    try:
        _verify(iteration, path)
    except _DamagedError:
        return False
    return True


def _numbered(root: Path) -> list[tuple[int, Path]]:
    """Checkpoints by iteration, newest first.

    A checkpoint that was set aside counts until its replacement exists.
    """
    if not root.is_dir():
        return []
    paths: dict[int, Path] = {}
    for entry in sorted(root.iterdir(), reverse=True):  # ".replaced-..." after "iteration-..."
        match = _NAME.fullmatch(entry.name.removeprefix(_SET_ASIDE))
        if match:
            paths.setdefault(int(match[1]), entry)
    return sorted(paths.items(), reverse=True)


def _listing(path: Path) -> dict[str, dict[str, Any]]:
    return {name: {"bytes": (path / name).stat().st_size, "sha256": _digest(path / name)} for name in _CONTENT}


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
    for entry in list(root.iterdir()):
        place = entry.with_name(entry.name.removeprefix(_SET_ASIDE))
        if place != entry and not os.path.lexists(place):
            os.rename(entry, place)
        elif place != entry or entry.name.startswith(_TEMPORARY):
            _delete(entry)


def _replace_directory(source: Path, target: Path) -> None:
    """Moves `source` to `target`; an old `target`, which a rename cannot replace, is set aside first."""
    old = target.with_name(f"{_SET_ASIDE}{target.name}")
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    if os.path.lexists(old):
        _delete(old)


def _remove_directory(path: Path) -> None:
    """Renames a checkpoint, then removes it: a kill halfway leaves nothing that looks like one."""
    doomed = path.with_name(f"{_TEMPORARY}{path.name}-old")
    if os.path.lexists(doomed):
        _delete(doomed)
    os.rename(path, doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """Removes a directory with its content, or a link without its target."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        sound: iterations whose checkpoints are known to be whole: written or loaded by this object.
    """

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

    def load(self) -> Checkpoint | None:
        """The newest sound checkpoint; None if none was ever written.

        Raises:
            EtudeError: all checkpoints are damaged or gone, or the newest sound one belongs to a
                run with another configuration.
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
        self._check_same_run(stored)
        self.sound.add(checkpoint.iteration)
        return checkpoint

    def remaining(self) -> str:
        """The checkpoint that a failed run can continue from, in words."""
        newest = self._newest()
        if newest is None:
            return "no checkpoint was written yet"
        return f"intact checkpoint: iteration {newest} in '{self.root}', --resume continues from it"

    def advice(self) -> str:
        """The command that continues an interrupted run, in words."""
        command = f"`etude train --resume --out {shlex.quote(str(self.out))}`"
        newest = self._newest()
        if newest is None:
            return f"there is no checkpoint yet, and {command} starts over"
        return f"{command} continues from the checkpoint of iteration {newest}"

    def _newest(self) -> int | None:
        """The newest whole checkpoint on the disk: a process that does not write must look there."""
        return newest_whole(self.root, self.sound)

    def _check_same_run(self, stored: dict[str, Any]) -> None:
        """Refuses the checkpoint of another run. A setting that it lacks counts as its default."""
        change = difference(parse_config(stored, f"the configuration in '{self.root}'"), self.config)
        if change is not None:
            key, old, new = change
            raise EtudeError(
                f"the run in '{self.out}' has {key} = {old!r}, but {new!r} was given: resume it with its own "
                "config.yaml, or start another run in another directory."
            )
