"""Models in one safetensors file, in the layouts that diffusers' `from_single_file` reads.

A file holds weights and no configuration. FLUX and SD3.5 files also lack text encoders and often
the autoencoder. Configuration, tokenizers and missing parts come from `pipeline_config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from etude.errors import EtudeError, brief

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
AUTOENCODER = ("first_stage_model.", "vae.")
"""Prefixes of the names of an autoencoder's weights in a file that holds one."""


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
    with safe_open(model, framework="pt") as file:
        shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in list(file.keys())}
    inferred = str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])
    try:
        diffusers.DiffusionPipeline.load_config(inferred)
    except (OSError, ValueError) as error:
        raise EtudeError(
            f"model '{model}' is a single file, whose configuration would come from the hub ('{inferred}', judging by the weights), "
            f"and that did not answer ({brief(error)}); give pipeline_config a local diffusers directory of such a model."
        ) from error
    return inferred


def holds_pipeline(model: str) -> bool:
    """Whether a file holds a whole pipeline: it does if it has an autoencoder beside the denoiser."""
    with safe_open(model, framework="pt") as file:
        return any(name.startswith(AUTOENCODER) for name in list(file.keys()))


def load_single_file(
    model: str, location: str, kind: Any, denoiser: str, parts: dict[str, Any], dtype: torch.dtype
) -> Any:
    """Loads a pipeline of class `kind` with the weights of a file, often the denoiser's alone.

    Args:
        location: directory or hub id of its configuration, from `configuration`.
        parts: arguments of `from_pretrained` beside the dtype: components that are left out.

    Raises:
        EtudeError: a component is neither in the file nor at `location`.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    try:
        if holds_pipeline(model):
            return kind.from_single_file(model, config=location, torch_dtype=dtype, **parts)
        network_class = getattr(diffusers, diffusers.DiffusionPipeline.load_config(location)[denoiser][1])
        network = network_class.from_single_file(model, config=location, subfolder=denoiser, torch_dtype=dtype)
        return kind.from_pretrained(location, torch_dtype=dtype, use_safetensors=True, **parts, **{denoiser: network})
    except SingleFileComponentError as error:
        raise EtudeError(
            f"model '{model}' does not hold every part of a {kind.__name__} ({brief(error)}); "
            "give pipeline_config a local diffusers directory that has the weights of the others."
        ) from error
