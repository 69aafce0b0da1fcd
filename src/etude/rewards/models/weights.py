"""Weights of model rewards, from a hub id or a local path; safetensors only.

A pickle (`.pt`, `.pth`, `.bin`) can run code when it is read, so it is refused with the command that
converts it. No code from a checkpoint is run either (`trust_remote_code` is never set).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude.errors import EtudeError, brief

if TYPE_CHECKING:
    from torch import Tensor

TEXT_FILES = ["*.json", "*.txt"]
"""Patterns of the files beside the weights: configurations, tokenizers and image processors."""
WEIGHT_FILES = [*TEXT_FILES, "model*.safetensors"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_revisions: dict[str, str] = {}


def check_source(source: str) -> None:
    """Refuses a pickle, and what is neither on disk nor a hub id (`owner/name[@revision]`)."""
    path = Path(os.path.expanduser(source))
    if path.suffix in _PICKLES:
        raise _refusal(path)
    if not os.path.exists(path) and (source.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(source)):
        raise EtudeError(f"'{source}' is not on disk: give a file, a directory, or a hub id (owner/name@revision).")


def fetch(source: str, patterns: list[str]) -> Path:
    """The local file or directory of a source; for a hub id the cache, with the files of `patterns`."""
    local = Path(os.path.expanduser(source))
    if os.path.exists(local):
        return local
    check_source(source)
    from huggingface_hub import snapshot_download

    repository, _, revision = source.partition("@")
    try:
        path = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # hub, transports and cache share no base of errors
        command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
        problem = f"'{source}' is not on disk and the hub does not give it ({type(error).__name__})"
        raise EtudeError(f"{problem}: `{command}` while connected, or give a local path.") from error
    if re.fullmatch(r"[0-9a-f]{40}", path.name):  # the cache names directories by commit
        _revisions[source] = path.name
    return path


def revision_read(source: str) -> str | None:
    """The commit that this process has read of a hub id; None for any other source."""
    return _revisions.get(source)


def weights_of(path: Path) -> Path:
    """The one safetensors file that `path` is or holds, or an `EtudeError` about what it holds."""
    if path.is_file():
        return path
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise EtudeError(f"'{path}' holds {len(files)} safetensors files: name one of them.")
    if pickles := sorted(p for p in path.iterdir() if p.suffix in _PICKLES):
        raise _refusal(pickles[0])
    remedy = "those of a hub repository often wait in a pull request, owner/name@refs/pr/1"
    raise EtudeError(f"'{path}' holds no safetensors: {remedy}.")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; an `EtudeError` if it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise EtudeError(f"'{path}' is not a readable safetensors file: {brief(error, 100)}.") from error


def strip_prefix(tensors: Mapping[str, Tensor], landmark: str) -> dict[str, Tensor]:
    """The tensors of a state dict with a wrapper's prefix (`model.`, `mlp.`), without the prefix.

    It is what stands in front of the name `landmark`; without that name the result is empty.
    """
    prefix = next((n.removesuffix(landmark) for n in tensors if f".{n}".endswith(f".{landmark}")), None)
    if prefix is None:
        return {}
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def load_pretrained(kind: Any, path: Path) -> Any:
    """Does what `assemble` does, from a directory in the layout of transformers."""
    if not any(path.glob("model*.safetensors")):
        weights_of(path)  # its error says what is there instead
        raise EtudeError(f"'{path}' holds no model.safetensors in the layout of transformers.")
    return assemble(kind, path, str(path), use_safetensors=True, local_files_only=True)


def assemble(kind: Any, origin: Path, directory: str | None = None, **how: Any) -> Any:
    """A transformers network in fp32, frozen and in evaluation mode, by its `from_pretrained`.

    Without a directory it comes from `config` and `state_dict`. An `EtudeError` names `origin` if a
    tensor is missing or has another shape.
    """
    import torch

    try:
        network, info = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, **how)
    except (OSError, ValueError, RuntimeError) as error:
        raise EtudeError(f"'{origin}' does not hold the weights of {kind.__name__}: {brief(error, 120)}") from error
    # transformers draws missing tensors at random and goes on, which would be another reward.
    if missing := sorted(info["missing_keys"]):
        lack = f"it lacks {len(missing)} tensors ('{missing[0]}')"
        raise EtudeError(f"'{origin}' is not a whole {kind.__name__}: {lack}.")
    return network.eval().requires_grad_(False)


def _refusal(path: Path) -> EtudeError:
    return EtudeError(
        f"'{path}' is a pickle, which etude never reads: outside etude, pass the state dict of torch.load(path, "
        "weights_only=True) to safetensors.torch.save_file once (docs/how-to/add-a-reward), and give that file."
    )
