"""The conventions of diffusers by which a pipeline can be asked stage by stage, whatever its family."""

from __future__ import annotations

import inspect
import re

_PARTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
_METHODS = ("encode_prompt", "prepare_latents")
_ARGUMENTS = ("prompt", "latents", "height", "width", "num_inference_steps", "guidance_scale", "output_type")
_KNOWN = re.compile(
    r"transformer|vae|scheduler|(text_encoder|tokenizer)(_\d)?|image_encoder|feature_extractor|safety_checker"
)
"""Parts whose use is known: another may be a second network, or draw."""


def lacks(name: str) -> str | None:
    """Name the convention that a pipeline's class of diffusers lacks: None for nothing, "" for no such class."""
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "_get_signature_keys"):
        return ""
    call = inspect.signature(kind.__call__).parameters
    given = ("self", "prompt")
    named = {
        key: value for key, value in call.items() if value.kind is value.POSITIONAL_OR_KEYWORD and key not in given
    }
    required = [key for key, value in named.items() if value.default is value.empty]
    parts = kind._get_signature_keys(kind)[0]
    missing = [part for part in _PARTS if part not in parts]
    missing += [f"{method}()" for method in _METHODS if not hasattr(kind, method)]
    missing += [f"the argument {key}" for key in _ARGUMENTS if key not in call]
    missing += ["images, since it makes videos"] * ("num_frames" in call)
    missing += [f"a convention for its part {part}" for part in sorted(parts) if not _KNOWN.fullmatch(part)]
    if missing or required:
        return missing[0] if missing else f"a default of the argument {required[0]}"
    return None
