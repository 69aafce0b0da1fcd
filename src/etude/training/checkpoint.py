"""Checkpoints that survive a kill at any moment, and the small files that a run writes beside them.

A checkpoint is a directory `root/iteration-000012/` with `tensors.safetensors`, `state.json` and `manifest.json` (size
and SHA-256 of the other two). It is written under a temporary name next to its place, flushed to the disk, and renamed:
it is there as a whole or not at all, and one that it replaces is set aside until then. What a rename cannot protect from
(a damaged disk, an edited file) the manifest detects. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from etude.errors import EtudeError
from etude.sharding import part, whole

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_CONTENT = (TENSORS, STATE)
_NAME = re.compile(r"iteration-(\d{6,})")
_TEMPORARY, _SET_ASIDE = ".writing-", ".replaced-"
_LIKE_THE_PARAMETER = {"exp_avg", "exp_avg_sq", "state1", "state2"}
"""Entries of an optimiser's state that have the parameter's shape, in torch and in bitsandbytes."""
_ANOTHER = "the checkpoint belongs to another model or LoRA rank, start anew in another --out"


@dataclass(frozen=True)
class Checkpoint:
    """What `load_latest` found: tensors on the CPU, JSON state, and where it was."""

    iteration: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path


def save_checkpoint(root: Path, iteration: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Writes `root/iteration-<iteration>/` atomically and returns its path.

    Tensors are kept bit for bit, each on its own (aliases become equal copies). A checkpoint of the same number is
    replaced. Leftovers of killed saves are removed.

    Raises:
        EtudeError: the state is not JSON (NaN included), or the disk cannot take the checkpoint: the message says where,
            how much was needed, and that the checkpoints that were there still are.
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
        _sync(temporary / TENSORS)
        _write(temporary / STATE, text)
        _write(temporary / MANIFEST, _json({"iteration": iteration, "files": _listing(temporary)}, iteration))
        _sync(temporary)
        _replace_directory(temporary, path)
        _sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        needed = sum(tensor.nbytes for tensor in own.values()) + len(text)
        raise EtudeError(
            f"the checkpoint of iteration {iteration} needs {needed / 1e6:.3f} MB in '{root}' and could not be written "
            f"({_reason(error)}): make room there and continue with --resume, the previous checkpoint is intact."
        ) from error
    return path


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, without gaps and each in memory of its own, as safetensors wants them; only what is not gets copied."""
    own: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        packed = tensor.detach().cpu().contiguous()
        place = packed.untyped_storage().data_ptr()
        own[name] = packed.clone() if place in taken else packed
        taken.add(place)
    return own


def load_latest(root: Path) -> Checkpoint | None:
    """The newest checkpoint under `root` that is whole, or None. Each damaged one on the way is named in a warning."""
    for iteration, path in _numbered(root):
        try:
            return _load(iteration, path)
        except _DamagedError as error:
            warnings.warn(f"checkpoint '{path}' is damaged and not used: {error}", stacklevel=2)
    return None


def prune(root: Path, keep: int, sound: set[int] | None = None) -> None:
    """Removes all but the newest `keep` whole checkpoints, damaged ones older than the newest whole one, and leftovers of killed saves.

    Args:
        sound: iterations whose checkpoints are known to be whole (just written, or loaded) and are not read again; those
            that prove to be are added.
    """
    known, kept = set() if sound is None else sound, 0
    if root.is_dir():
        _clean(root)
    for iteration, path in _numbered(root):
        if kept >= keep:
            _remove_directory(path)
        elif iteration in known or _is_whole(iteration, path):
            known.add(iteration)
            kept += 1
        elif kept:
            _remove_directory(path)


def newest_whole(root: Path, sound: Container[int] = ()) -> int | None:
    """The iteration of the newest whole checkpoint under `root`, or None; those in `sound` are known to be whole and not read."""
    return next(
        (iteration for iteration, path in _numbered(root) if iteration in sound or _is_whole(iteration, path)), None
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """AdamW's state as `{"<name>.exp_avg": ..., "<name>.exp_avg_sq": ..., "<name>.step": ...}` on the CPU.

    What is there already is not copied, and changes with the optimiser's next step.

    Args:
        optimizer: AdamW, or any optimiser whose state holds only tensors and numbers.
        names: one for each parameter, all different, in the order of the parameter groups.

    Raises:
        EtudeError: the names are not as many as the parameters, or not distinct.
    """
    return {
        f"{name}.{key}": whole(torch.as_tensor(value).detach()).cpu()
        for name, parameter in _named(optimizer, names).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Iterable[str], tensors: Mapping[str, Tensor]
) -> None:
    """Restores what `optimizer_tensors` gave, exactly; hyper-parameters stay those of `optimizer`.

    Parameters without an entry lose their state, as after a save before the first step.

    Raises:
        EtudeError: an entry belongs to no parameter, or has another shape than its parameter.
    """
    parameters = _named(optimizer, names)
    states: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    for entry, value in tensors.items():
        name, _, key = entry.rpartition(".")
        if name not in parameters:
            raise EtudeError(f"optimiser state '{entry}' belongs to no parameter: {_ANOTHER}.")
        parameter = parameters[name]
        if key in _LIKE_THE_PARAMETER and value.shape != parameter.shape:
            raise EtudeError(
                f"optimiser state of '{name}' has shape {list(value.shape)}, its parameter {list(parameter.shape)}: "
                f"{_ANOTHER}."
            )
        if not value.ndim and not value.is_floating_point():  # a Python number, as bitsandbytes counts its steps
            states[name][key] = value.item()
            continue
        # AdamW keeps `step` on the CPU unless told otherwise; the moments live with the parameter.
        device = parameter.device if value.ndim or _on_device(optimizer) else torch.device("cpu")
        value = value.to(device, copy=True)
        states[name][key] = part(value, parameter) if key in _LIKE_THE_PARAMETER else value
    for name, parameter in parameters.items():
        optimizer.state[parameter] = states[name]


def _named(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    listed = list(names)
    if len(set(listed)) != len(parameters) or len(listed) != len(parameters):
        raise EtudeError(
            f"the optimiser has {len(parameters)} parameters, not {len(set(listed))} as the distinct names given: "
            "give each parameter one name of its own."
        )
    return dict(zip(listed, parameters, strict=True))


def _on_device(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("capturable") or group.get("fused") for group in optimizer.param_groups)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file or leaves the old one: a temporary sibling, flushed to the disk, then renamed.

    The sibling is this process's own: several may write one file at once, and whoever renames last wins.

    Raises:
        EtudeError: the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.writing")
    with _explained(path, len(data)):
        try:
            _write(temporary, data)
            os.replace(temporary, path)
            _sync(path.parent)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text, line ends as given."""
    atomic_write_bytes(path, text.encode("utf-8"))


def append_line(path: Path, text: str) -> None:
    """Appends one line and returns when it is on the disk. A kill can leave the line torn: see `truncate_metrics`.

    Raises:
        EtudeError: the text holds a line break, or the disk does not take it.
    """
    if "\n" in text:
        raise EtudeError(f"a line for '{path}' must not hold a line break: {text[:60]!r}.")
    data = text.encode("utf-8") + b"\n"
    with _explained(path, len(data)), open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def truncate_metrics(path: Path, iteration: int) -> None:
    """Atomically drops the rows of a JSON-lines file with `"iteration"` above `iteration`, and a torn last line.

    The rows that stay keep their bytes. A file that does not exist is left so.

    Raises:
        EtudeError: a line before the last is not a JSON object with an integer `"iteration"`.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    *lines, torn = data.split(b"\n")  # what follows the last line break was never finished
    kept = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None and number < len(lines):
            raise EtudeError(
                f"'{path}', line {number} is not a metrics row: mend or remove it, or start anew in another --out."
            )
        if row is not None and row <= iteration:
            kept.append(line + b"\n")
    if torn or len(kept) < len(lines):
        atomic_write_bytes(path, b"".join(kept))


def last_iteration(path: Path) -> int:
    """The largest `"iteration"` of a JSON-lines file; -1 if it has none."""
    rows = [_row(line) for line in path.read_bytes().split(b"\n")] if path.exists() else []
    return max((row for row in rows if row is not None), default=-1)


def _row(line: bytes) -> int | None:
    try:
        value = json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if isinstance(value, int) else None


class _DamagedError(Exception):
    """Why a checkpoint cannot be used."""


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
        raise _DamagedError(f"it cannot be read ({_reason(error)})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _DamagedError(f"{MANIFEST} is not the JSON that was written") from None


def _is_whole(iteration: int, path: Path) -> bool:
    try:
        _verify(iteration, path)
    except _DamagedError:
        return False
    return True


def _numbered(root: Path) -> list[tuple[int, Path]]:
    """Checkpoints by iteration, newest first; one that was set aside counts until the one that replaces it is there."""
    if not root.is_dir():
        return []
    found: dict[int, Path] = {}
    for entry in sorted(root.iterdir(), reverse=True):  # ".replaced-..." after "iteration-..."
        match = _NAME.fullmatch(entry.name.removeprefix(_SET_ASIDE))
        if match:
            found.setdefault(int(match[1]), entry)
    return sorted(found.items(), reverse=True)


def _listing(path: Path) -> dict[str, dict[str, Any]]:
    return {name: {"bytes": (path / name).stat().st_size, "sha256": _digest(path / name)} for name in _CONTENT}


def _json(value: Mapping[str, Any], iteration: int) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, indent=1).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise EtudeError(f"the state of iteration {iteration} cannot be written as JSON: {error}.") from None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync(path)


def _sync(path: Path) -> None:
    """Makes the content of a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _clean(root: Path) -> None:
    """Removes what a killed save left, and puts back what it had set aside."""
    for entry in list(root.iterdir()):
        place = entry.with_name(entry.name.removeprefix(_SET_ASIDE))
        if place != entry and not os.path.lexists(place):
            os.rename(entry, place)
        elif place != entry or entry.name.startswith(_TEMPORARY):
            _delete(entry)


def _replace_directory(source: Path, target: Path) -> None:
    """Moves `source` to `target`. An old `target` is set aside first, since a rename cannot replace it."""
    old = target.with_name(f"{_SET_ASIDE}{target.name}")
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    if os.path.lexists(old):
        _delete(old)


def _remove_directory(path: Path) -> None:
    """Removes a checkpoint: renamed first, so that a kill halfway leaves nothing that looks like one."""
    doomed = path.with_name(f"{_TEMPORARY}{path.name}-old")
    if os.path.lexists(doomed):
        _delete(doomed)
    os.rename(path, doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """Removes a directory with its content; of a link the link alone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


@contextmanager
def _explained(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EtudeError(
            f"'{path}' could not be written ({_reason(error)}, {size / 1e6:.3f} MB needed): "
            "free some space or check the permissions there."
        ) from error
