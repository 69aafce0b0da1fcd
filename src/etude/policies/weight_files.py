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
_PACKED = re.compile(r"(I|U)(8|16|32|64)|BOOL")
"""Dtypes of a header that no weight or bias has unless it is quantised, or lost its fraction."""
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
MARKERS = frozenset(("v_pred", "ztsnr", *_EDM))
"""Names of tensors that only say something of a network."""
_TERMINAL = "rescale_betas_zero_snr"
_PREDICTIONS = dict.fromkeys(("v", "v_pred", "vpred", "v_prediction"), "v_prediction") | {
    "eps": "epsilon",
    "epsilon": "epsilon",
    "sample": "sample",
}
_TRUE = "true|1"
_OF_V = {
    "v_parameterization": _TRUE,
    "architecture": r"stable_diffusion_v2_768_v(/.*)?",
    "base_model_version": r"sd_v[12]_v",
}
"""Values of metadata that mean a network that predicts v, by the end of the key."""


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
            if _SCALES.fullmatch(name) or (_PACKED.fullmatch(dtype) and name.endswith((".weight", ".bias"))):
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
    """Compares what a file says of its network with the scheduler of its configuration.

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
    for says, key, value, own in contradictions(header.shapes, header.metadata, scheduler):
        more = ' and "timestep_spacing": "trailing"' if key == _TERMINAL else ""
        raise EtudeError(
            f"'{header.file}' {says}, but the scheduler of '{location}' has {key} {own}: give "
            f'pipeline_config a copy of it whose scheduler/scheduler_config.json has "{key}": {json.dumps(value)}{more}.'
        )


def contradictions(
    names: Iterable[str], metadata: Mapping[str, str], scheduler: Mapping[str, Any]
) -> list[tuple[str, str, Any, str]]:
    """Settings of a scheduler that a file of weights says otherwise: the file's words, the key, its value and the scheduler's.

    Tensors named `v_pred` and `ztsnr`, and the metadata that trainers write (ModelSpec's and kohya's),
    say that a network predicts v and that its schedule ends at zero signal.

    Args:
        names: names of the file's tensors.
        metadata: metadata of its header.
        scheduler: configuration of the scheduler that is used.
    """
    if is_flow_config(scheduler):
        return []
    held = MARKERS.intersection(names)
    said = [("tensor 'v_pred'", "v_prediction")] if "v_pred" in held else []
    ends = ["tensor 'ztsnr'"] if "ztsnr" in held else []
    for key, text in metadata.items():
        source, last = f"{key} = {brief_value(text)} in its header", key.rpartition(".")[2].removeprefix("ss_")
        word = str(text).strip().lower().replace("-", "_")
        prediction = "v_prediction" if last in _OF_V and re.fullmatch(_OF_V[last], word) else None
        if last in ("prediction_type", "predict_key"):
            prediction = _PREDICTIONS.get(word)
        if prediction:
            said.append((source, prediction))
        if last in ("zero_terminal_snr", "ztsnr", _TERMINAL) and re.fullmatch(_TRUE, word):
            ends.append(source)
    own = str(scheduler.get("prediction_type") or "epsilon")
    other: list[tuple[str, str, Any, str]] = [
        (f"predicts {value} ({source})", "prediction_type", value, own) for source, value in said if value != own
    ]
    if not scheduler.get(_TERMINAL):
        other += [(f"is trained to zero terminal SNR ({source})", _TERMINAL, True, "false") for source in ends]
    return other
