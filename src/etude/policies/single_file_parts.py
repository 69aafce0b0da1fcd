"""The parts of a model in one file, translated by diffusers' own functions on shapes: no weight is read.

Each tensor is followed to the part that it reaches. So a part that lacks one, or has one of another
shape, is known before the file is loaded, and so are the tensors that no part reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from etude.errors import EtudeError
from etude.policies.traced import Traced, sources_of
from etude.policies.weight_files import MARKERS, Header, check_keys

_SILENT = re.compile(
    r"betas|(\w+_)?alphas(_cumprod(_\w+)?)?|posterior_\w+|lvlb_weights|logvar|(denoiser|model_sampling)\.(log_)?sigmas|"
    r"(.*\.)?(position_ids|logit_scale)|cond_stage_model\.model\.(text_projection|transformer\.resblocks\.23\..+)"
)
"""Tensors that files of these models hold and that no program needs: noise levels, and what CLIP has beside its states."""


def check_parts(header: Header, location: str, parts: Mapping[str, tuple[str, Any]]) -> None:
    """Compares the tensors of each part that a file holds with those of its class, and tells of the rest.

    Args:
        header: of the file.
        location: directory or hub id of the file's configuration.
        parts: library and class of each part that comes from the file.

    Raises:
        EtudeError: a part lacks a tensor, has one of another shape, or is under names that diffusers does not read.
    """
    read: set[str] = set()
    traced = {name: Traced.of(name, torch.empty(shape, device="meta"), read) for name, shape in header.shapes.items()}
    for name, (library, kind) in parts.items():
        translate = _network if library == "diffusers" else _text_encoder
        tensors, expected = translate(str(header.file), dict(traced), location, name, kind)
        _compare(str(header.file), name, tensors, expected)
        read |= sources_of([tensors[each] for each in expected.keys() & tensors.keys()])
    unused = [name for name in header.shapes.keys() - read - MARKERS if not _SILENT.fullmatch(name)]
    # An average is beside the weights on purpose; a tensor without a place may be a fault.
    unused.sort(key=lambda name: (name.startswith("model_ema."), name))
    check_keys(str(header.file), "pipeline", (), unused)


_Tensors = Mapping[str, Tensor]


def _network(
    model: str, checkpoint: dict[str, Tensor], location: str, part: str, kind: Any
) -> tuple[_Tensors, _Tensors]:
    """The tensors that diffusers takes from a file for a network of its own, and those that the network has."""
    from diffusers.loaders import single_file_model

    loadable = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
    name = single_file_model._get_single_file_loadable_mapping_class(kind)
    if name is None:
        raise EtudeError(
            f"model '{model}': diffusers reads no {kind.__name__} from a single file; give a diffusers directory."
        )
    config = kind.load_config(location, subfolder=part)
    with torch.device("meta"):
        expected = kind.from_config(config).state_dict(keep_vars=True)
    if not single_file_model._should_convert_state_dict_to_diffusers(expected, checkpoint):
        return checkpoint, expected
    try:
        return loadable[name]["checkpoint_mapping_fn"](config=config, checkpoint=checkpoint), expected
    except KeyError as error:
        raise EtudeError(
            f"'{model}' lacks {error} of the {part}: give the complete file, or the configuration that it belongs to."
        ) from error


def _text_encoder(
    model: str, checkpoint: dict[str, Tensor], location: str, part: str, kind: Any
) -> tuple[_Tensors, _Tensors]:
    """The tensors that diffusers takes from a file for a network of transformers, and those that the network has."""
    from diffusers.loaders import single_file_utils

    if single_file_utils.is_clip_model_in_single_file(kind, checkpoint):
        create = single_file_utils.create_diffusers_clip_model_from_ldm
    elif single_file_utils.is_t5_in_single_file(checkpoint) and kind.__name__.startswith("T5"):
        create = single_file_utils.create_diffusers_t5_model_from_checkpoint
    else:
        raise EtudeError(
            f"'{model}' holds a {part} ({kind.__name__}) under names that diffusers does not read: give a diffusers directory, or the "
            "file without it."
        )
    taken: dict[str, Tensor] = {}

    def take(network: Any, tensors: _Tensors, **_: Any) -> None:
        taken.update(tensors)

    with patch.object(single_file_utils, "load_model_dict_into_meta", take):
        network = create(kind, checkpoint, subfolder=part, config=location)
    return taken, network.state_dict(keep_vars=True)


def _compare(model: str, part: str, tensors: _Tensors, expected: _Tensors) -> None:
    """Refuses a part that lacks a tensor, under any of its names, or has one of another shape."""
    if not tensors:
        raise EtudeError(f"'{model}' holds no weights of the {part}: give a file that does.")
    names: dict[int, list[str]] = {}
    for name, value in expected.items():
        names.setdefault(id(value), []).append(name)
    missing = [each[0] for each in names.values() if tensors.keys().isdisjoint(each)]
    wrong = [
        f"{name} is {list(tensors[name].shape)} in the file and {list(value.shape)} in the configuration"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    check_keys(model, part, missing, (), wrong)
