"""The weight files of a model's parts, and what their names and headers say without a weight being read.

A directory holds a folder for each part. Its weights are in one file or in the shards that an index
lists, under a name with or without a variant's suffix. A header lists the tensors of a file with
shapes and dtypes. Some tensors change the meaning of others, such as the scales of 8-bit weights.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from etude.errors import EtudeError, brief_value
from etude.sampling.paths import is_flow_config

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Name of a weight file without its suffixes, by the library that reads it."""
_SCALES = re.compile(
    r"(.*[._])?(scaled_fp8|scale_weight|scale_input|weight_scale(_2|_inv)?|input_scale|comfy_quant|"
    r"absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..+|SCB)|(.*\.)?(qweight|qzeros|wscales)"
)
"""Names of tensors by which other tensors of a file must be multiplied, or which unpack them.

An average of CompVis's code is named without dots, so that `to_q.weight` ends in `to_qweight` there.
"""
_PACKED = ("I8", "U8")
"""Dtypes of a header that no weight has unless it is quantised."""
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: shape and dtype of each tensor, and its metadata."""

    file: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, file: Path) -> Header:
        with safe_open(file, framework="pt") as stored:
            slices = {name: stored.get_slice(name) for name in list(stored.keys())}
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            dtypes = {name: str(each.get_dtype()) for name, each in slices.items()}
            return cls(file, shapes, dtypes, stored.metadata() or {})

    def check_plain(self) -> None:
        """Refuses a file whose tensors mean something else than their numbers.

        Raises:
            EtudeError: a tensor scales or unpacks others, or is packed itself.
        """
        for name, dtype in self.dtypes.items():
            if _SCALES.fullmatch(name) or (dtype in _PACKED and name.endswith(".weight")):
                raise EtudeError(
                    f"'{self.file}' holds quantised weights ('{name}', {dtype}), whose scales etude does not apply: give the "
                    "file in float32, bfloat16 or float16."
                )


def weight_files(folder: Path, library: str, variant: str | None) -> list[Path]:
    """The files of a part's weights with the variant's suffix. Empty: there are none.

    Raises:
        EtudeError: an index lists a shard that is not there.
    """
    stem, suffix = STEMS[library], f".{variant}" if variant else ""
    whole = folder / f"{stem}{suffix}.safetensors"
    if whole.is_file():
        return [whole]
    for name in (f"{stem}.safetensors.index{suffix}.json", f"{stem}{suffix}.safetensors.index.json"):
        index = folder / name
        if index.is_file():
            shards = sorted(
                {str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
            )
            for shard in shards:
                if not (folder / shard).is_file():
                    raise EtudeError(
                        f"'{index}' lists the shard '{shard}', which is not there: fetch the missing file."
                    )
            return [folder / shard for shard in shards]
    return []


def stored_dtype(files: Iterable[Path]) -> torch.dtype | None:
    """The dtype of most of the files' tensors; None where torch does not train in it."""
    counts = Counter(dtype for file in files for dtype in Header.of(file).dtypes.values())
    return _FLOATS.get(counts.most_common(1)[0][0]) if counts else None


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


def check_keys(
    where: str, part: str, missing: Iterable[str], unused: Iterable[str], mismatched: Iterable[Any] = ()
) -> None:
    """Refuses a part that lacks tensors, and tells of tensors that it does not read.

    Args:
        where: the file or directory, for the message.
        part: name of the part.
        missing: tensors that the part has and the file lacks.
        unused: tensors of the file that the part does not read.
        mismatched: tensors of another shape than the part's.

    Raises:
        EtudeError: a tensor is missing or of another shape.
    """
    lacking, wrong, extra = sorted(missing), sorted(map(str, mismatched)), sorted(unused)
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise EtudeError(
            f"'{where}' lacks '{lacking[0]}'{more} of the {part}, which would be drawn at random: fetch or save the {part} again, "
            "or give the configuration that it was saved with."
        )
    if wrong:
        raise EtudeError(
            f"'{where}' has another shape than the configuration of the {part} says: {wrong[0]}; give the configuration that the "
            "weights were saved with."
        )
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        warnings.warn(f"'{where}' holds '{extra[0]}'{more}, which the {part} does not read", stacklevel=2)


def check_no_meta(where: str, parts: Mapping[str, Any]) -> None:
    """Refuses parts with tensors that no file gave."""
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            tensors = [*part.named_parameters(), *part.named_buffers()]
            check_keys(where, name, [tensor for tensor, value in tensors if value.is_meta], ())


def check_markers(header: Header, location: str, scheduler: Mapping[str, Any]) -> None:
    """Compares what a file says of its prediction with the scheduler of its configuration.

    A tensor named `v_pred` or `ztsnr`, and the metadata of trainers, say that the network predicts v
    and that its schedule ends at zero signal.

    Args:
        header: of the single file.
        location: directory or hub id of its configuration, for the message.
        scheduler: that configuration's scheduler.

    Raises:
        EtudeError: they contradict one another, or the network is EDM's.
    """
    edm = next((name for name in _EDM if name in header.shapes), None)
    if edm is not None:
        raise EtudeError(
            f"'{header.file}' holds '{edm}', so its network is trained on EDM's noise levels, which etude has no path for: "
            "give a model with a DDIM, Euler or flow schedule."
        )
    if is_flow_config(scheduler):
        return
    own = str(scheduler.get("prediction_type") or "epsilon")
    for source, said in _predictions(header):
        if said != own:
            raise EtudeError(
                f"'{header.file}' predicts {said} ({source}), but the scheduler of '{location}' has prediction_type {own}: give "
                f'pipeline_config a copy of it whose scheduler/scheduler_config.json has "prediction_type": "{said}".'
            )
    terminal = next(iter(_terminals(header)), None)
    if terminal is not None and not scheduler.get("rescale_betas_zero_snr"):
        raise EtudeError(
            f"'{header.file}' is trained to zero terminal SNR ({terminal}), but the scheduler of '{location}' is not: give "
            'pipeline_config a copy of it whose scheduler/scheduler_config.json has "rescale_betas_zero_snr": true and '
            '"timestep_spacing": "trailing".'
        )


def _predictions(header: Header) -> list[tuple[str, str]]:
    names = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
    said = [("tensor 'v_pred'", "v_prediction")] if "v_pred" in header.shapes else []
    for key, value in header.metadata.items():
        last, text = key.rpartition(".")[2], str(value).strip().lower()
        if last == "prediction_type" and text in names:
            said.append((f"{key} = {value} in its header", names[text]))
        elif last in {"ss_v_parameterization", "v_parameterization"} and text == "true":
            said.append((f"{key} = {value} in its header", "v_prediction"))
    return said


def _terminals(header: Header) -> list[str]:
    said = ["tensor 'ztsnr'"] if "ztsnr" in header.shapes else []
    keys = {"ss_zero_terminal_snr", "zero_terminal_snr", "ztsnr", "rescale_betas_zero_snr"}
    for key, value in header.metadata.items():
        if key.rpartition(".")[2] in keys and str(value).strip().lower() == "true":
            said.append(f"{key} = {value} in its header")
    return said
