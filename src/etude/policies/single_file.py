"""Models in one safetensors file, in the layouts that diffusers' `from_single_file` reads.

A file holds weights and no configuration. FLUX and SD3.5 files also lack text encoders and often
the autoencoder. Configuration, tokenizers and missing parts come from `pipeline_config`; whatever
part the file holds comes from the file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from etude.errors import EtudeError, brief
from etude.policies.part_folders import read_folders
from etude.policies.single_file_parts import check_parts
from etude.policies.trial import networks_of
from etude.policies.weight_files import Header, check_markers, check_no_meta

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
AUTOENCODER = ("first_stage_model.", "vae.")
"""Prefixes of the names of an autoencoder's weights in a file that holds one."""
TEXT_ENCODERS = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.", "text_encoder.", "te.")
"""Prefixes of the names of a text encoder's weights."""
SEVERAL = ("conditioner.embedders.", "text_encoders.")
"""Prefixes that a number (SDXL) or a name (SD3, FLUX) of the encoder follows."""
_ENDS = {"text_encoder": ("0", "clip_l"), "text_encoder_2": ("1", "clip_g")}


def is_single_file(model: str) -> bool:
    """Whether the name of a model is that of a safetensors file.

    Raises:
        EtudeError: the file does not exist, or is a pickle.
    """
    path = Path(model)
    if path.suffix in PICKLES and not path.is_dir():
        raise EtudeError(f"model '{model}' is a pickled checkpoint, which can run code: give its .safetensors version.")
    if path.suffix == ".sft":
        raise EtudeError(f"model '{model}' is named .sft, which diffusers does not read: rename it to .safetensors.")
    if path.suffix != ".safetensors":
        return False
    if not path.is_file():
        raise EtudeError(f"model '{model}': there is no such file.")
    return True


def configuration(model: str, given: str | Path | None) -> str:
    """The directory or hub id of a file's configuration: `given`, or inferred from the weights.

    Raises:
        EtudeError: the directory is no diffusers pipeline, or the hub does not answer for an
            inferred repository.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    if given is not None:
        if Path(given).exists() and not (Path(given) / "model_index.json").is_file():
            problem = "is not a diffusers pipeline directory: it has no model_index.json"
            raise EtudeError(f"pipeline_config '{given}' {problem}.")
        return str(given)
    inferred = str(fetch_diffusers_config(_shapes(Header.of(Path(model))))["pretrained_model_name_or_path"])
    try:
        diffusers.DiffusionPipeline.load_config(inferred)
    except (OSError, ValueError) as error:
        raise EtudeError(
            f"model '{model}' is a single file, whose configuration would come from the hub ('{inferred}', judging by the weights), "
            f"and that did not answer ({brief(error)}); give pipeline_config a local diffusers directory of such a model."
        ) from error
    return inferred


def absent_parts(model: str, networks: Mapping[str, str], denoiser: str) -> list[str]:
    """The parts of a pipeline that a file has no weights of.

    Args:
        networks: name of the class of each part with weights.
        denoiser: name of the denoiser.
    """
    names = list(Header.of(Path(model)).shapes)

    def held(part: str) -> bool:
        prefixes: tuple[str, ...] = AUTOENCODER if part == "vae" else TEXT_ENCODERS
        if part.startswith("text_encoder") and any(name.startswith(SEVERAL) for name in names):
            prefixes = _of_several(part, networks[part])
        return any(name.startswith(prefixes) for name in names)

    return [part for part in networks if part != denoiser and not held(part)]


def _of_several(part: str, kind: str) -> tuple[str, ...]:
    """Prefixes of a text encoder's weights in the layouts that hold several."""
    if kind.startswith("T5"):
        return ("text_encoders.t5xxl.",)
    if not kind.startswith("CLIP"):
        return TEXT_ENCODERS
    return tuple(f"{prefix}{end}." for prefix, end in zip(SEVERAL, _ENDS.get(part, _ENDS["text_encoder"]), strict=True))


def _classes(networks: Mapping[str, tuple[str, Any]]) -> dict[str, str]:
    return {part: kind.__name__ for part, (_, kind) in networks.items()}


def _shapes(header: Header) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in header.shapes.items()}


def check_single_file(
    model: str, location: str, index: Mapping[str, Any], denoiser: str, left_out: Mapping[str, Any]
) -> None:
    """Checks a file by its header: complete, of plain weights, and in agreement with its configuration.

    Args:
        location: directory or hub id of its configuration, from `configuration`.
        index: model_index.json of the configuration.
        denoiser: name of the denoiser in it.
        left_out: parts that are not read.

    Raises:
        EtudeError: the file or the configuration lacks a tensor, weights are quantised, the file says
            that it is of another model or predicts something else than the configuration says, or
            neither has a part.
    """
    import diffusers

    header = Header.of(Path(model))
    header.check_plain()
    if isinstance(index.get("scheduler"), list | tuple):
        check_markers(header, location, diffusers.DDIMScheduler.load_config(location, subfolder="scheduler"))
    networks = networks_of(index, left_out)
    absent = absent_parts(model, _classes(networks), denoiser)
    if "text_encoder_2" in absent and any(name.startswith(f"{SEVERAL[0]}0.") for name in header.shapes):
        raise EtudeError(
            f"model '{model}' holds the first of two text encoders ('{SEVERAL[0]}0.'), which diffusers finds beside the second alone: "
            "give the file with both or with neither."
        )
    try:
        read_folders(location, {part: networks[part] for part in absent}, None, device_map="meta")
    except EtudeError as error:
        what = " and ".join(absent)
        raise EtudeError(
            f"model '{model}' does not hold every part of a {index.get('_class_name')}, its {what} must come from pipeline_config: "
            f"{error}"
        ) from error
    check_parts(header, location, {part: kind for part, kind in networks.items() if part not in absent})


def load_single_file(
    model: str,
    location: str,
    kind: Any,
    denoiser: str,
    index: Mapping[str, Any],
    parts: dict[str, Any],
    dtype: torch.dtype,
) -> Any:
    """Loads a pipeline of class `kind` with the weights of a file, often the denoiser's alone.

    Args:
        location: directory or hub id of its configuration, from `configuration`.
        denoiser: name of the denoiser in it.
        index: model_index.json of the configuration.
        parts: arguments of `from_pretrained` beside the dtype: components that are left out.

    Raises:
        EtudeError: a component is neither in the file nor at `location`.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    networks = networks_of(index, parts)
    absent = absent_parts(model, _classes(networks), denoiser)
    try:
        with _without_deprecations():
            if set(absent) == networks.keys() - {denoiser}:
                network = networks[denoiser][1].from_single_file(
                    model, config=location, subfolder=denoiser, dtype=dtype
                )
                own = {denoiser: network}
                pipeline = kind.from_pretrained(location, dtype=dtype, use_safetensors=True, **parts, **own)
            else:
                given = {
                    part: networks[part][1].from_pretrained(location, subfolder=part, dtype=dtype, use_safetensors=True)
                    for part in absent
                }
                pipeline = kind.from_single_file(model, config=location, dtype=dtype, **parts, **given)
    except SingleFileComponentError as error:
        raise EtudeError(
            f"model '{model}' does not hold every part of a {kind.__name__} ({brief(error)}); "
            "give pipeline_config a local diffusers directory that has the weights of the others."
        ) from error
    check_no_meta(model, pipeline.components)
    return pipeline


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """Context without diffusers' advice to itself: its single files still pass `torch_dtype` on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch_dtype. is deprecated", category=FutureWarning)
        yield
