"""Weights of model rewards, from a hub id or a local path; safetensors only.

Nothing here reads a pickle. A `.pt`, `.pth` or `.bin` file can run code when it is read, so it is
refused with the command that converts it. No code from a checkpoint is run either
(`trust_remote_code` is never set).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from etude.errors import EtudeError, brief

if TYPE_CHECKING:
    from torch import Tensor

TEXT_FILES = ["*.json", "*.txt"]
"""Patterns of the files beside the weights: configurations, tokenizers and image processors."""
WEIGHT_FILES = [*TEXT_FILES, "model*.safetensors"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")

NetworkT = TypeVar("NetworkT")

_revisions: dict[str, str] = {}


def check_source(source: str) -> None:
    """Checks that a source may be a file, a directory or a hub id (`owner/name[@revision]`).

    Raises:
        EtudeError: the path does not exist or is a pickle.
    """
    path = _path(source)
    if path.suffix in _PICKLES:
        raise EtudeError(_refusal(str(path)))
    if not os.path.exists(path) and (source.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(source)):
        raise EtudeError(f"'{source}' is not on disk: give a file, a directory, or a hub id (owner/name@revision).")


def is_local(source: str) -> bool:
    """Whether a source is a file or a directory on this machine."""
    return os.path.exists(_path(source))


def fetch(source: str, patterns: list[str]) -> Path:
    """The local file or directory of a source.

    For a hub id this is the cache, after the files that match `patterns` are there.

    Raises:
        EtudeError: the source is not on disk, and the hub does not give it.
    """
    if is_local(source):
        return _path(source)
    check_source(source)
    from huggingface_hub import snapshot_download

    repository, _, revision = source.partition("@")
    try:
        path = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # hub, transports and cache share no base of errors
        command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
        raise EtudeError(
            f"'{source}' is not on disk and the hub does not give it ({type(error).__name__}): "
            f"`{command}` while connected, or give a local path."
        ) from error
    if re.fullmatch(r"[0-9a-f]{40}", path.name):  # the cache names directories by commit
        _revisions[source] = path.name
    return path


def revision_read(source: str) -> str | None:
    """The commit that this process has read of a hub id; None for any other source."""
    return _revisions.get(source)


def weights_of(path: Path) -> Path:
    """The one safetensors file that `path` is or holds.

    Raises:
        EtudeError: there is none (if there are pickles, the error says how to convert them), or
            more than one.
    """
    if path.is_file():
        return path
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise EtudeError(f"'{path}' holds {len(files)} safetensors files: name one of them.")
    pickles = sorted(p for p in path.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise EtudeError(_refusal(str(pickles[0])))
    raise EtudeError(
        f"'{path}' holds no safetensors: those of a hub repository often wait in a pull request, owner/name@refs/pr/1."
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        EtudeError: the file is not a readable safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise EtudeError(f"'{path}' is not a readable safetensors file: {brief(error, 100)}.") from error


def strip_prefix(tensors: Mapping[str, Tensor], landmark: str) -> dict[str, Tensor]:
    """The tensors of a state dict, without the prefix in front of the name `landmark`.

    A published state dict often has a wrapper's prefix (`model.`, `mlp.`). `landmark` is a name
    that the layout must hold; the text in front of it is the prefix. Tensors without the prefix are
    left out. The result is empty if no name ends with `landmark`.
    """
    prefix = next((n.removesuffix(landmark) for n in tensors if n == landmark or n.endswith(f".{landmark}")), None)
    if prefix is None:
        return {}
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def load_pretrained(kind: type[NetworkT], path: Path) -> NetworkT:
    """A transformers network from a directory in its own layout.

    It is in fp32, frozen and in evaluation mode.

    Raises:
        EtudeError: the directory holds no safetensors, or those of another network.
    """
    if not any(path.glob("model*.safetensors")):
        weights_of(path)  # its error says what is there instead
        raise EtudeError(f"'{path}' holds no model.safetensors in the layout of transformers.")
    return _from_pretrained(kind, str(path), str(path), use_safetensors=True, local_files_only=True)


def assemble(kind: type[NetworkT], config: Any, tensors: Mapping[str, Tensor], origin: Path, **how: Any) -> NetworkT:
    """A transformers network from its configuration and a state dict.

    It is in fp32, frozen and in evaluation mode.

    Raises:
        EtudeError: a tensor is missing or has another shape; the error names `origin`.
    """
    return _from_pretrained(kind, None, str(origin), config=config, state_dict=dict(tensors), **how)


def _from_pretrained(kind: Any, directory: str | None, origin: str, **how: Any) -> Any:
    import torch

    try:
        network, info = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, **how)
    except (OSError, ValueError, RuntimeError) as error:
        raise EtudeError(f"'{origin}' does not hold the weights of {kind.__name__}: {brief(error, 120)}") from error
    # transformers draws missing tensors at random and goes on, which would be another reward.
    missing = sorted(info["missing_keys"])
    if missing:
        raise EtudeError(
            f"'{origin}' is not a whole {kind.__name__}: it lacks {len(missing)} tensors ('{missing[0]}')."
        )
    return network.eval().requires_grad_(False)


def _path(source: str) -> Path:
    return Path(os.path.expanduser(source))


def _refusal(path: str) -> str:
    return (
        f"'{path}' is a pickle, which etude never reads: outside etude, pass the state dict of torch.load(path, "
        "weights_only=True) to safetensors.torch.save_file once (docs/how-to/add-a-reward), and give that file."
    )
