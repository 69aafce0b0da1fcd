"""Checks on an adapter file before it reaches the model: an adapter can come from anybody.

The file is safetensors, so reading it runs no code. Its header, however, carries a configuration
for peft, and a hostile one can do three things: name a module to import (`megatron_core`); give
regular expressions that do not terminate (`target_modules` as text, `rank_pattern`, and tensor
names, which diffusers turns into patterns); and claim ranks that no tensor of the file has and that
memory could not hold. Each of them is refused here.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from etude.errors import EtudeError, brief, brief_value

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The name under which diffusers saves and finds an adapter."""
METADATA = "lora_adapter_metadata"

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,400}")
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e6 and math.isfinite(value)


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and _NAME.fullmatch(name) for name in value)


_USED: dict[str, Callable[[Any], bool]] = {
    "r": lambda value: type(value) is int and 1 <= value <= 1 << 16,
    "lora_alpha": _number,
    "lora_dropout": lambda value: _number(value) and 0 <= value < 1,
    "target_modules": _names,
    "init_lora_weights": lambda value: type(value) is bool or value == "gaussian",
    **dict.fromkeys(("use_rslora", "inference_mode"), lambda value: type(value) is bool),
    "peft_type": lambda value: value == "LORA",
    "bias": lambda value: value == "none",
    **dict.fromkeys(("peft_version", "base_model_name_or_path", "revision", "task_type"), _text),
}
"""Keys that a configuration may set, with a check of the value. Any other key must be off: peft's
default, null, false or empty."""


def read_adapter(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter file, by name.

    Raises:
        EtudeError: the file is missing or not safetensors, or its content is not one complete,
            finite LoRA with a configuration that agrees with its tensors.
    """
    path = directory / WEIGHTS
    if not os.path.isfile(path):  # False for a name that no file can have, where Path.is_file raises
        raise EtudeError(f"--lora '{directory}' holds no {WEIGHTS}; give the lora/ directory of a finished run.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, ValueError, AttributeError, KeyError) as error:
        raise EtudeError(f"--lora '{path}' is not a readable safetensors file: {brief(error, 120)}.") from error
    _check_tensors(tensors, path)
    if METADATA in metadata:
        _check_configuration(metadata[METADATA], tensors, path)
    return tensors


def check_loaded(stored: Mapping[str, Tensor], loaded: Mapping[str, Tensor], prefix: str, directory: Path) -> None:
    """Refuses an adapter that was loaded in part: diffusers only warns of tensors without a place.

    Args:
        stored: tensors of the file, those of the denoiser under `prefix`.
        loaded: tensors of the network's adapter, by peft's names without `prefix`.
    """
    lora = f"--lora '{directory}'"
    if not loaded:
        raise EtudeError(f"{lora} holds nothing for the model's {prefix}: it is of another kind of model.")
    own = {name.removeprefix(f"{prefix}.") for name in stored if _FACTOR.fullmatch(name)}
    if not own:  # another program's names, which diffusers has translated
        return
    for name in own ^ loaded.keys():
        problem = "has no place in the model" if name in own else "is missing"
        raise EtudeError(f"{lora} does not fit the model: '{brief_value(name)}' {problem}.")


def _check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    if not tensors:
        raise EtudeError(f"--lora '{path}' holds no tensor.")
    for name, tensor in tensors.items():
        if not _NAME.fullmatch(name):
            raise EtudeError(f"--lora '{path}' holds {brief_value(name)}, which is no layer's name.")
        if not tensor.is_floating_point():
            raise EtudeError(f"--lora '{path}': '{name}' is of {tensor.dtype}; an adapter's tensors are floating.")
        if not bool(tensor.float().isfinite().all()):
            raise EtudeError(f"--lora '{path}': '{name}' holds NaN or infinity; the run that wrote it had diverged.")
    for name, (layer, factor) in _factors(tensors).items():
        other = tensors.get(f"{layer}.lora_{'BA'[factor == 'B']}.weight")
        if other is None:
            raise EtudeError(f"--lora '{path}': '{name}' is without the other factor of its product.")
        if tensors[name].ndim < 2 or other.ndim < 2 or _rank(tensors[name], factor) < 1:
            raise EtudeError(f"--lora '{path}': '{name}' is no matrix.")
        if factor == "A" and _rank(tensors[name], "A") != _rank(other, "B"):
            raise EtudeError(f"--lora '{path}': the two factors of '{layer}' are of different ranks.")


def _factors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """The tensors that peft's naming makes factors of a product: name to (layer, "A" or "B")."""
    matches = {name: _FACTOR.fullmatch(name) for name in tensors}
    return {name: (match[1], match[2]) for name, match in matches.items() if match}


def _rank(tensor: Tensor, factor: str) -> int:
    return int(tensor.shape[0 if factor == "A" else 1])


def _check_configuration(text: str, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Compares the configuration (`unet.r`, `unet.target_modules`, ...) with `_USED` and the tensors."""
    from peft import LoraConfig

    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EtudeError(f"--lora '{path}': its configuration is not JSON ({brief(error, 80)}).") from None
    if not isinstance(stored, dict):
        raise EtudeError(f"--lora '{path}': its configuration is a {type(stored).__name__}, not a mapping.")
    its, defaults = f"--lora '{path}': its configuration", LoraConfig().to_dict()
    for place, value in stored.items():
        key = place.rpartition(".")[2]
        if key not in defaults:
            raise EtudeError(f"{its} has {brief_value(place)}, which this version of peft does not know.")
        if not (_USED[key](value) if key in _USED else value in (None, False, defaults[key]) or value in ({}, [])):
            raise EtudeError(f"{its} has {brief_value(place)} = {brief_value(value)}, which no run of etude writes.")
        if key != "r":
            continue
        for name, (_, factor) in _factors(tensors).items():
            rank = _rank(tensors[name], factor)
            if name.startswith(place.removesuffix("r")) and rank != value:
                raise EtudeError(f"{its} says rank {value}, but '{name}' is of rank {rank}.")
