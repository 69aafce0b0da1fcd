"""The trial of a model when it is loaded: do its parts agree, and does each of them work once?

What configurations, names and headers say is compared first, in the same words for a model and for
its outline. Then the empty prompt is encoded, the denoiser evaluated once and one picture decoded:
an outline does it with shapes, which shows those that do not fit, and a model with numbers,
which also shows those that are not finite. The trial costs one network evaluation and one decoding
of one image. It draws no random number and leaves the policy as it was.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from etude.batching import is_out_of_memory
from etude.errors import EtudeError, brief, brief_value
from etude.policies.outline import is_outline, names_part
from etude.sampling.finite import FiniteMarks
from etude.sampling.noise import NoiseSource
from etude.sampling.paths import is_flow_config

if TYPE_CHECKING:
    from etude.policies.pipeline import PipelinePolicy

LIBRARIES = ("diffusers", "transformers")
OWN_SCHEDULERS = ("GDDIMScheduler", "FlowMatchGDDIMScheduler")
"""Schedulers of etude, which a saved pipeline may name."""
_DRAWING_DECODERS = ("ConsistencyDecoderVAE",)
"""Decoders that draw noise, for an outline: they compute with numbers that it has not."""
_DISTILLED = ("LCM", "TCD")
"""Marks in the names of schedulers that only consistency-distilled networks are made for."""

_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
"""Settings by which a solver of diffusers takes other levels than those of its spacing."""
_WHOLE = "leaves the predicted image as it is"
_REPLACED: dict[str, tuple[Any, str]] = {
    "thresholding": (False, _WHOLE),
    "clip_sample": (False, _WHOLE),
    "interpolation_type": ("linear", "takes the levels of the training schedule at whole timesteps"),
    "lambda_min_clipped": (-math.inf, "takes the levels up to the last one"),
    "stochastic_sampling": (False, "draws no noise between the levels, which its kernels do at eta above 0"),
}
"""Settings of a scheduler that say how it steps: the value that changes nothing, and what the ODE does instead of others."""


def check_index(
    model: str, index: Mapping[str, Any], kind: Any, left_out: Mapping[str, Any], optional: tuple[str, ...]
) -> None:
    """Checks the list of a pipeline's parts: each that is needed is there, and of a library that etude reads.

    Args:
        model: name of the model, for messages.
        index: content of model_index.json.
        kind: class of the pipeline.
        left_out: arguments for the class; parts named here are not read.
        optional: parts that may be null, each tokenizer with its text encoder.

    Raises:
        EtudeError: a part is null, or its code is not of diffusers or transformers.
    """
    for name, value in index.items():
        listed = names_part(value) and not name.startswith("_")
        own = name == "scheduler" and listed and value[0] == "etude" and value[1] in OWN_SCHEDULERS
        if listed and name not in left_out and not own and value[0] not in (None, *LIBRARIES):
            raise EtudeError(
                f"model '{model}' takes its {name} from {brief_value(value[0])}, where code of its own would run: only parts from "
                "diffusers and transformers are supported."
            )
    absent = {name for name in [*_needed(kind), *optional] if None in (index.get(name) or [None])}
    half = absent & set(optional) and set(optional) - absent
    for name in sorted((absent - set(optional)) | (absent if half else set())):
        if name in left_out and not half:
            continue
        raise EtudeError(
            f"model '{model}' has no {name}: its model_index.json names none, and a {kind.__name__} makes no image without it; "
            "give a model with all its parts."
        )


def _needed(kind: Any) -> list[str]:
    """The parts that a pipeline's class takes, those for pictures as input apart; empty if it does not say."""
    signature = getattr(kind, "_get_signature_keys", None)
    if signature is None:
        return []
    # SDXL's class calls its text encoders optional, since a caller may pass encoded prompts.
    free = {part for part in kind._optional_components if not part.startswith(("text_encoder", "tokenizer"))}
    return sorted(set(signature(kind)[0]) - free - {"feature_extractor", "image_encoder", "safety_checker"})


def tell_of_scheduler(model: str, scheduler: Any) -> None:
    """Tells of a scheduler whose sampling etude does not do: distilled for it, a solver, with steps or levels of its own.

    Raises:
        EtudeError: the network reads logarithms of levels in place of timesteps.
    """
    name, known = type(scheduler).__name__, inspect.signature(type(scheduler).__init__).parameters
    if (
        scheduler.config.get("timestep_type") == "continuous"
        and scheduler.config.get("prediction_type") == "v_prediction"
    ):
        raise EtudeError(
            f"model '{model}' comes with {name} and timestep_type = continuous, so that its network reads log(sigma) / 4 in place of "
            "timesteps, which etude does not give it: give a model with discrete timesteps."
        )
    for key, (nothing, instead) in _REPLACED.items():
        value = scheduler.config.get(key, nothing)
        # What another class left in the configuration changes nothing.
        if key in known and value not in (nothing, None):
            warnings.warn(
                f"model '{model}' comes with {name} and {key} = {value}; the ODE that etude trains and measures {instead}",
                stacklevel=2,
            )
    own = next((key for key in _SIGMAS if scheduler.config.get(key)), None)
    if own and not (
        scheduler.config.get("use_flow_sigmas") or is_flow_config({**scheduler.config, "_class_name": name})
    ):
        warnings.warn(
            f"model '{model}' comes with {name} and {own}, which is a choice of levels of that solver; etude trains and measures the ODE on the "
            f"levels of timestep_spacing = {scheduler.config.get('timestep_spacing', 'linspace')}",
            stacklevel=2,
        )
    if scheduler.config.get("use_flow_sigmas"):
        corrector = " without its corrector" if name == "UniPCMultistepScheduler" else ""
        warnings.warn(
            f"model '{model}' comes with {name}, of which etude takes the levels; the ODE that it trains and measures is that solver at "
            f"solver_order=1{corrector}",
            stacklevel=2,
        )
    if any(mark in name for mark in _DISTILLED):
        warnings.warn(
            f"model '{model}' comes with {name}, which redraws noise between consistency steps; etude trains and measures the "
            "ODE on its noise levels instead",
            stacklevel=2,
        )


def tell_of_family(model: str, policy: PipelinePolicy) -> None:
    """Tells of a pipeline's class that no family describes, and what the trial has shown of it."""
    warnings.warn(
        f"model '{model}' is a {policy.pipeline_name}, which etude knows by the conventions of diffusers alone; checked so far: "
        f"prompts of unequal length at different timesteps give in a batch what they give one by one; `etude check-model {model}` "
        "checks guidance, gradients, images and the export",
        stacklevel=2,
    )


def check_agreement(model: str, policy: PipelinePolicy) -> None:
    """Compares the parts' configurations with one another: channels, widths, lengths, tokens.

    Raises:
        EtudeError: two of them contradict one another; the message names both numbers.
    """
    for (name, value), (other, wanted) in policy.agreements():
        if value is not None and wanted is not None and value != wanted:
            raise EtudeError(
                f"model '{model}' contradicts itself: {name} is {value}, but {other} is {wanted}; give parts that belong together."
            )
    components = policy.pipeline.components
    for name, encoder in components.items():
        tokenizer = components.get(name.replace("text_encoder", "tokenizer"))
        if name.startswith("text_encoder") and encoder is not None and tokenizer is not None:
            longest = policy._longest(name.replace("text_encoder", "tokenizer"), tokenizer)
            _check_text(model, name, encoder, tokenizer, longest)


def _check_text(model: str, name: str, encoder: Any, tokenizer: Any, longest: int) -> None:
    """Compares an encoder with its tokenizer, of which the pipeline keeps so many tokens of a prompt."""
    words, places = name.replace("text_encoder", "tokenizer"), getattr(encoder.config, "max_position_embeddings", None)
    if places is not None and longest > places:
        told = "gives no model_max_length" if longest > 1e9 else f"has model_max_length {longest}"
        raise EtudeError(
            f"model '{model}' contradicts itself: its {words} {told}, but the {name} reads {places} tokens; set "
            f'"model_max_length": {places} in {words}/tokenizer_config.json.'
        )
    rows = int(encoder.get_input_embeddings().weight.shape[0])
    beyond = min(((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows), default=None)
    if beyond is not None:
        raise EtudeError(
            f"model '{model}' contradicts itself: its {words} knows {brief_value(beyond[1])} as token {beyond[0]}, but the {name} has "
            f"{rows} rows, up to token {rows - 1}; give the {name} that was saved with this tokenizer."
        )


@torch.no_grad()
def try_out(model: str, policy: PipelinePolicy) -> None:
    """Encodes the empty prompt, evaluates the denoiser once and decodes one picture.

    Raises:
        EtudeError: one of them fails, draws noise of its own, or gives NaN or infinity.
    """
    stage, vae = "encoding of a prompt", type(policy.pipeline.vae).__name__
    if vae in _DRAWING_DECODERS:
        raise _draws(model, f"vae ({vae}) draws")
    try:
        with _Draws() as draws:
            conditioning = policy.encode([""])
            _refuse(draws, model, "text encoders draw")
            stage = "prediction"
            timestep, x = policy.grid(4).timesteps[:1].to(policy.device), _noise(policy)
            marks = FiniteMarks(policy.denoiser, policy.computing_dtype, 1)
            output = policy.predict(x, timestep, conditioning, 1.0)
            marks.add(output, 0)
            _refuse(draws, model, f"{policy.denoiser} draws")
            if output.shape != x.shape:
                raise EtudeError(
                    f"model '{model}' contradicts itself: its {policy.denoiser} reads {list(x.shape[1:])} numbers and predicts "
                    f"{list(output.shape[1:])}; give a model that predicts what it reads."
                )
            marks.check()
            policy.settle()
            stage = "decoding"
            policy.decode(x)
            _refuse(draws, model, f"vae ({vae}) draws")
    except EtudeError as error:
        text = str(error)
        raise error if f"'{model}'" in text else EtudeError(f"model '{model}': {text}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, NotImplementedError) and is_outline(policy):
            return
        size = "" if stage.startswith("encoding") else " at {} x {} pixels".format(*policy.image_size)
        raise EtudeError(
            f"model '{model}' fails at its first {stage}{size}, so its parts do not fit together ({type(error).__name__}: "
            f"{brief(error, 200)}): give parts that belong together{', or another resolution' if size else ''}."
        ) from error


def _noise(policy: PipelinePolicy) -> Tensor:
    return NoiseSource(0, "trial").initial([0], policy.latent_shape).to(policy.device)


def _refuse(draws: _Draws, model: str, what: str) -> None:
    if draws.seen:
        raise _draws(model, what)


def _draws(model: str, what: str) -> EtudeError:
    return EtudeError(
        f"model '{model}': its {what} noise of its own, so equal seeds would give other pictures; give a model with a "
        "deterministic part there."
    )


class _Draws(TorchDispatchMode):
    """Notes operations that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in function.tags and not _draws_nothing(function, args, kwargs or {}):
            self.seen = True
        return function(*args, **(kwargs or {}))


def _draws_nothing(function: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation that may draw does not: attention and dropout at probability 0."""
    names = [argument.name for argument in function._schema.arguments]
    bound = dict(zip(names, args, strict=False)) | dict(kwargs)
    if "dropout_p" in names:
        return not bound.get("dropout_p", 0.0)
    return "train" in names and not bound.get("train", True)


def networks_of(index: Mapping[str, Any], left_out: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Library and class of each part of an index that has weights, by the part's name."""
    import importlib

    networks = {}
    for name, value in index.items():
        if name.startswith("_") or name in left_out or not names_part(value) or None in value:
            continue
        cls = getattr(importlib.import_module(str(value[0])), str(value[1]))
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            networks[name] = (str(value[0]), cls)
    return networks
