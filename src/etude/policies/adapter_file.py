"""Checks on an adapter file before it reaches the model: an adapter can come from anybody.

The file is safetensors, so reading it runs no code. Its header, however, carries a configuration
for peft, and a hostile one can do three things: name a module to import (`megatron_core`); give
regular expressions that do not terminate (`target_modules` as text, `rank_pattern`, and tensor
names, which diffusers turns into patterns); and claim ranks that no tensor of the file has and that
memory could not hold. Each of them is refused here. What is read here is what is loaded: the file is
not opened again.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from etude.errors import EtudeError, brief, brief_value

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The name under which diffusers saves and finds an adapter."""
METADATA = "lora_adapter_metadata"

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,400}")
_FACTOR = re.compile(r"(.+?)([._]lora(?:_linear_layer|\d)?[._])(A|B|down|up)\.weight")
_OTHER = {"A": "B", "B": "A", "down": "up", "up": "down"}


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e6 and math.isfinite(value)


def _rank_number(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 1 << 16


def _switch(value: Any) -> bool:
    return type(value) is bool


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and _NAME.fullmatch(name) for name in value)


def _by_layer(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check of a value for each layer, where `^` before a name stands for the beginning, as diffusers writes it."""

    def each(value: Any) -> bool:
        return isinstance(value, dict) and all(
            _NAME.fullmatch(name.removeprefix("^")) and check(number) for name, number in value.items()
        )

    return each


_USED: dict[str, Callable[[Any], bool]] = {
    "r": _rank_number,
    "lora_alpha": _number,
    "rank_pattern": _by_layer(_rank_number),
    "alpha_pattern": _by_layer(_number),
    "lora_dropout": lambda value: _number(value) and 0 <= value < 1,
    "target_modules": _names,
    "init_lora_weights": lambda value: type(value) is bool or value == "gaussian",
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "inference_mode"), _switch),
    "peft_type": lambda value: value == "LORA",
    "bias": lambda value: value == "none",
    **dict.fromkeys(("peft_version", "base_model_name_or_path", "revision", "task_type"), _text),
}
"""Keys that a configuration may set, with a check of the value. Any other key must be off: peft's
default, null, false or empty."""


@dataclass(frozen=True)
class Adapter:
    """An adapter file that was checked.

    Attributes:
        path: the file.
        option: name of the option that gave it, for messages.
        tensors: by the names of the program that wrote them.
        configuration: peft's settings as `part.key`, which diffusers writes. None: the file has none.
        metadata: metadata of the header, in which trainers say how the adapter was trained.
    """

    path: Path
    option: str
    tensors: Mapping[str, Tensor]
    configuration: dict[str, Any] | None
    metadata: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.option} '{self.path}'"

    def factor(self, name: str) -> tuple[str, str] | None:
        """The layer and the side, A or B, of a tensor that is a factor of its layer's product."""
        match = _FACTOR.fullmatch(name)
        return None if match is None else (match[1], "A" if match[3] in ("A", "down") else "B")

    def strength(self, name: str) -> float | None:
        """alpha / rank of the layer of a factor A. None: the file holds no alpha for it, which kohya's tools take for 1."""
        layer, _ = self.factor(name) or (name, "")
        rank = self.tensors[name].shape[0]
        alpha = self.tensors.get(f"{layer}.alpha")
        return None if alpha is None else float(alpha) / rank


def read_adapter(place: Path, option: str = "--lora") -> Adapter:
    """Reads an adapter: a safetensors file, or the directory that a run exported it to.

    Raises:
        EtudeError: the file is missing or not safetensors, or its content is not one complete,
            finite LoRA with a configuration that agrees with its tensors.
    """
    path = place if os.path.isfile(place) else place / WEIGHTS
    if not os.path.isfile(path):  # False for a name that no file can have, where Path.is_file raises
        raise EtudeError(
            f"{option} '{place}' holds no {WEIGHTS}; give the lora/ directory of a finished run, or a safetensors file."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, ValueError, AttributeError, KeyError) as error:
        raise EtudeError(f"{option} '{path}' is not a readable safetensors file: {brief(error, 120)}.") from error
    what = f"{option} '{path}'"
    _check_tensors(tensors, what)
    configuration = _configuration(metadata[METADATA], tensors, what) if METADATA in metadata else None
    return Adapter(path, option, tensors, configuration, metadata)


def sort_header(file: Path) -> None:
    """Sorts the metadata in the header of a safetensors file, which the library writes in an order that changes."""
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            stream.seek(8)
            stream.write(text.ljust(length))


def _check_tensors(tensors: Mapping[str, Tensor], its: str) -> None:
    if not tensors:
        raise EtudeError(f"{its} holds no tensor.")
    for name, tensor in tensors.items():
        if not _NAME.fullmatch(name):
            raise EtudeError(f"{its} holds {brief_value(name)}, which is no layer's name.")
        if not (tensor.is_floating_point() or (name.endswith(".alpha") and not tensor.is_complex())):
            raise EtudeError(f"{its}: '{name}' is of {tensor.dtype}; an adapter's tensors are floating.")
        if not bool(tensor.float().isfinite().all()):
            raise EtudeError(f"{its}: '{name}' holds NaN or infinity; the run that wrote it had diverged.")
        if name.endswith(".alpha") and tensor.numel() != 1:
            raise EtudeError(f"{its}: '{name}' is of shape {list(tensor.shape)}; an alpha is one number.")
    for name in tensors:
        match = _FACTOR.fullmatch(name)
        if match is None:
            continue
        factor, other = tensors[name], tensors.get(f"{match[1]}{match[2]}{_OTHER[match[3]]}.weight")
        if other is None:
            raise EtudeError(f"{its}: '{name}' is without the other factor of its product.")
        if factor.ndim < 2 or other.ndim < 2 or _rank(match, factor) < 1:
            raise EtudeError(f"{its}: '{name}' is no matrix.")
        if match[3] in ("A", "down") and factor.shape[0] != other.shape[1]:
            raise EtudeError(f"{its}: the two factors of '{match[1]}' are of different ranks.")


def _rank(match: re.Match[str], tensor: Tensor) -> int:
    return int(tensor.shape[0 if match[3] in ("A", "down") else 1])


def by_layer(pattern: Mapping[str, Any], layer: str, default: Any) -> Any:
    """A layer's value in a pattern of peft, whose keys are the ends of layers' names, or `^` and a whole name."""
    parts = layer.split(".")
    names = (f"^{layer}", *(".".join(parts[i:]) for i in range(len(parts))))
    return next((pattern[name] for name in names if name in pattern), default)


def _configuration(text: str, tensors: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    """A configuration (`unet.r`, `unet.target_modules`, ...) that agrees with `_USED` and the tensors."""
    from peft import LoraConfig

    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EtudeError(f"{what}: its configuration is not JSON ({brief(error, 80)}).") from None
    if not isinstance(stored, dict):
        raise EtudeError(f"{what}: its configuration is a {type(stored).__name__}, not a mapping.")
    its, defaults = f"{what}: its configuration", LoraConfig().to_dict()
    for place, value in stored.items():
        key = place.rpartition(".")[2]
        if key not in defaults:
            raise EtudeError(f"{its} has {brief_value(place)}, which this version of peft does not know.")
        if not (_USED[key](value) if key in _USED else value in (None, False, defaults[key]) or value in ({}, [])):
            raise EtudeError(f"{its} has {brief_value(place)} = {brief_value(value)}, which no run of etude writes.")
    for place, rank in stored.items():
        part, _, key = place.rpartition(".")
        if key != "r":
            continue
        ranks = stored.get(f"{part}.rank_pattern" if part else "rank_pattern") or {}
        for name, tensor in tensors.items():
            match = _FACTOR.fullmatch(name)
            if match is None or not name.startswith(f"{part}." if part else ""):
                continue
            layer = match[1].removeprefix(f"{part}.")
            says = by_layer(ranks, layer, rank)
            if _rank(match, tensor) != says:
                raise EtudeError(f"{its} says rank {says}, but '{name}' is of rank {_rank(match, tensor)}.")
    return stored
