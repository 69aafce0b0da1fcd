"""The parts of a pipeline in folders of their own: a directory's, each read whole or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etude.errors import EtudeError, brief_value
from etude.policies.weight_files import STEMS, Header, check_keys, stored_dtype, weight_files


def read_folders(
    location: str, networks: Mapping[str, tuple[str, Any]], variant: str | None, **how: Any
) -> dict[str, Any]:
    """Load the networks of a directory, each complete; of a hub id none, which has no files here.

    Args:
        location: directory of the pipeline, or a hub id.
        networks: library and class of each part.
        variant: suffix of the weight files.
        how: arguments of the parts' `from_pretrained`; `device_map="meta"` reads names and shapes alone.

    Raises:
        EtudeError: a part has no weights, is quantised, or lacks a tensor.
    """
    if not Path(location).is_dir():
        return {}
    variants = check_folders(Path(location), {name: library for name, (library, _) in networks.items()}, variant)
    parts = {}
    for name, (library, cls) in networks.items():
        folder = str(Path(location, name))
        which: dict[str, Any] = {"variant": variants[name], "output_loading_info": True}
        if library == "transformers":  # lists tensors of another shape, where diffusers names one in an error
            which["ignore_mismatched_sizes"] = True
        elif "dtype" not in how and (dtype := stored_dtype(weight_files(Path(folder), library, variants[name]))):
            which["dtype"] = dtype  # otherwise diffusers reads all numbers to cast them, on their way to nowhere
        try:
            parts[name], keys = cls.from_pretrained(folder, use_safetensors=True, **which, **how)
        except ValueError as error:
            shape = re.search(r"because (\S+ expected shape .*?, but got torch\.Size\(\[[\d, ]*\]\))", str(error))
            if shape is None:
                raise
            keys = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [shape[1]]}
        check_keys(folder, name, keys["missing_keys"], keys["unexpected_keys"], keys["mismatched_keys"])
    return parts


def check_folders(location: Path, networks: Mapping[str, str], variant: str | None) -> dict[str, str | None]:
    """Checks the weight files of a local directory's parts by their names and headers.

    Args:
        location: directory of the pipeline.
        networks: library of each part with weights, by the part's name.
        variant: suffix of the weight files; a part without such files is read without it.

    Returns:
        The variant of each part.

    Raises:
        EtudeError: a part has no such files, lacks a shard, or is quantised.
    """
    chosen: dict[str, str | None] = {}
    for name, library in networks.items():
        folder = location / name
        config = folder / "config.json"
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if isinstance(settings, dict) and settings.get("quantization_config"):
            method = settings["quantization_config"]
            method = method.get("quant_method", "an unknown method") if isinstance(method, dict) else method
            raise EtudeError(
                f"'{config}' says that the {name} is quantised ({brief_value(method)}), which etude cannot train or draw with: "
                "give the model with weights in float32, bfloat16 or float16."
            )
        suffixes = dict.fromkeys((variant, None))
        files = next(((s, found) for s in suffixes if (found := weight_files(folder, library, s))), None)
        if files is None:
            raise EtudeError(_no_weights(location, name, folder, library))
        chosen[name] = files[0]
        for file in files[1]:
            Header.of(file).check_plain()
    if variant is not None and variant not in chosen.values():
        raise EtudeError(
            f"no part of '{location}' has weights with the suffix '{variant}' (variant = {variant}): leave variant out, or "
            "give the suffix that the files have."
        )
    return chosen


def _no_weights(location: Path, name: str, folder: Path, library: str) -> str:
    stem = STEMS[library]
    others = sorted(file.name for file in folder.glob("*.safetensors")) if folder.is_dir() else []
    variants = {
        match[1] for file in others if (match := re.fullmatch(rf"{stem}\.(\w+?)(-\d+-of-\d+)?\.safetensors", file))
    }
    if variants:
        suffix = sorted(variants)[0]
        return (
            f"'{location}' has no weights of its {name} without a suffix, but has '{others[0]}': give variant = {suffix} "
            f"(`--variant {suffix}`, `--set variant={suffix}`)."
        )
    held = f"'{folder}' holds none" if not others else f"'{folder}' holds {others[0]}, which is not read"
    return f"'{location}' has no safetensors weights of its {name}: {held}."
