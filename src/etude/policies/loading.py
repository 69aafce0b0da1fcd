"""Load a model as a policy: an embedded name, a local directory, a file or a hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from etude import zoo
from etude.batching import Size, is_out_of_memory
from etude.errors import EtudeError, brief, unknown
from etude.policies.conventions import lacks
from etude.policies.flow import FlowPolicy
from etude.policies.outline import outline_pipeline
from etude.policies.part_folders import read_folders
from etude.policies.pipeline import PipelinePolicy
from etude.policies.single_file import check_single_file, configuration, is_single_file, load_single_file
from etude.policies.source import ModelSource
from etude.policies.trainable import TrainablePolicy
from etude.policies.trial import check_agreement, check_index, networks_of, tell_of_family, tell_of_scheduler, try_out
from etude.registry import POLICIES
from etude.sampling.paths import is_flow_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_policy(
    model: str | Path,
    lora: str | Path | None = None,
    dtype: str = "float32",
    device: torch.device | str | None = None,
    resolution: int | None = None,
    pipeline_config: str | Path | None = None,
    decode_batch_size: Size | None = None,
    offload: bool = False,
    prompt_cache_mb: int | None = None,
    outline: bool = False,
    shift: float | None = None,
    variant: str | None = None,
    family: str | None = None,
) -> TrainablePolicy:
    """Load a model for sampling, and an exported adapter on top of it.

    Args:
        model: embedded name, local diffusers directory, single safetensors file or hub id.
            `owner/name@revision` names a branch, tag or commit of a hub id. A leading `~` is the
            home, as in every path.
        lora: directory that a run exported its adapter to.
        dtype: precision of the weights: `float32`, `bfloat16` or `float16`.
        device: where the model runs. Default: a GPU where there is one.
        resolution: side of the images in pixels. Default: the pipeline's own.
        pipeline_config: for a single file, the local diffusers directory or hub id with its
            configuration and missing parts. Default: inferred from the weights, from the hub.
        decode_batch_size: images decoded at a time. Default: 32, and at most 2 million pixels.
        offload: keep text encoders and autoencoder on the CPU while they are not needed.
        prompt_cache_mb: MiB of encoded prompts kept in the machine's memory. Default: 4096.
        outline: read configurations only. The result is an outline of the model on the CPU, shapes
            without numbers, which takes no memory and downloads no weights.
        shift: shift of a flow model's levels, at any resolution. Default: the pipeline's own, which
            may depend on the resolution.
        variant: suffix of the weight files: `fp16` reads
            `diffusion_pytorch_model.fp16.safetensors`. Default: no suffix.
        family: adapter of the pipeline class: its name in `etude.registry.POLICIES`, or
            `module:Class`. Default: by the class that model_index.json names.

    Raises:
        EtudeError: the model does not exist, is of a class without an adapter, its files cannot be
            read, it cannot make images of that resolution, or it has no levels to shift.

    Example:
        >>> import etude
        >>> policy = etude.load_policy("emoji-sd")
        >>> policy.image_size
        (64, 64)
    """
    memory = (offload, decode_batch_size, prompt_cache_mb)
    source = ModelSource(model, lora, dtype, resolution, shift, variant, pipeline_config, *memory, family)
    return load_source(source, device, outline)


def load_source(
    source: ModelSource, device: torch.device | str | None = None, outline: bool = False
) -> TrainablePolicy:
    """Load what a source names; device, outline and errors as in `load_policy`."""
    import diffusers

    target = "cpu" if outline else device or ("cuda" if torch.cuda.is_available() else "cpu")
    if source.dtype not in DTYPES:
        raise unknown("dtype", source.dtype, DTYPES)
    model, dtype = source.name, DTYPES[source.dtype]
    name, pipeline_config = expanduser(model), source.pipeline_config and expanduser(source.pipeline_config)
    single = is_single_file(name)
    if pipeline_config is not None and not single:
        raise EtudeError(f"pipeline_config is for a single safetensors file, and model '{name}' is none: leave it out.")
    if source.variant is not None and single:
        raise EtudeError(
            f"variant is for a diffusers directory or hub id, and model '{name}' is a single file: leave it out."
        )
    with _explained(model):
        location, revision = (configuration(name, pipeline_config), None) if single else _locate(name)
        index = diffusers.DiffusionPipeline.load_config(location, revision=revision)
        cached = not single and not Path(location).exists()
        file = try_to_load_from_cache(location, "model_index.json", revision=revision) if cached else None
        commit = Path(file).parent.name if isinstance(file, str) else None  # the cache names it by commit
        pinned = commit or revision
        at = {"revision": pinned} if pinned else {}  # all parts of one commit
        pipeline_name = str(index.get("_class_name"))
        adapter = _adapter(source.family or pipeline_name, model)
        parts = adapter.load_arguments | {part: None for part in adapter.optional if index.get(part, [None])[0] is None}
        pipeline_class = adapter.pipeline_class(pipeline_name)
        check_index(str(model), index, pipeline_class, parts, adapter.optional)
        if single:
            check_single_file(name, location, index, adapter.denoiser, parts)
        if outline:
            networks = {} if single else networks_of(index, parts)
            read_folders(location, networks, source.variant, device_map="meta")
            pipeline = outline_pipeline(location, index, pipeline_class, dtype, parts, at)
        elif single:
            pipeline = load_single_file(name, location, pipeline_class, adapter.denoiser, index, parts, dtype)
        else:
            which = {"variant": source.variant, **at}
            if not Path(location).is_dir() and hasattr(pipeline_class, "download"):
                location = pipeline_class.download(location, use_safetensors=True, **which, **parts)
            read = read_folders(location, networks_of(index, parts), source.variant, dtype=dtype)
            pipeline = pipeline_class.from_pretrained(
                location, dtype=dtype, use_safetensors=True, **which, **parts, **read
            )
        tell_of_scheduler(str(model), pipeline.scheduler)
        if source.shift is not None:
            _shift(pipeline, source.shift, model)
        limits = {} if source.prompt_cache_mb is None else {"prompt_cache_mb": source.prompt_cache_mb}
        policy = adapter(pipeline, dtype, target, source.resolution, source.decode_batch_size, source.offload, **limits)
        check_agreement(str(model), policy)
        try_out(str(model), policy)
        if adapter is FlowPolicy:
            tell_of_family(str(model), policy)
    policy.source, policy.shift, policy.revision = source, source.shift, commit
    if source.lora is not None:
        policy.load_lora(Path(expanduser(source.lora)))
    return policy


def _shift(pipeline: Any, shift: float, model: str | Path) -> None:
    """Give the pipeline the scheduler of that shift, from which everything takes its levels."""
    import diffusers

    own = pipeline.scheduler
    if own.config.get("use_flow_sigmas"):
        pipeline.scheduler = type(own).from_config(own.config, flow_shift=shift, use_dynamic_shifting=False)
        return
    if not is_flow_config({**own.config, "_class_name": type(own).__name__}):
        raise EtudeError(
            f"shift = {shift:g}: model '{model}' is not a flow model, so its levels have no shift; set sampling.shift to null."
        )
    settings = {"shift": shift, "use_dynamic_shifting": False, "stochastic_sampling": False}
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(own.config, **settings)


def _adapter(family: str, model: str | Path) -> type[PipelinePolicy]:
    if family not in POLICIES.names() and ":" not in family:
        lack = lacks(family)
        if lack is None:
            return FlowPolicy
        why = f"; as a flow pipeline of diffusers it lacks {lack}" if lack else ""
        raise EtudeError(
            f"model '{model}' is a {family}; the supported pipelines are {', '.join(POLICIES.names())}, and `family: "
            f"module:Class` adds one of your own{why}."
        )
    adapter = POLICIES.get(family)
    if not (isinstance(adapter, type) and issubclass(adapter, PipelinePolicy)):
        raise EtudeError(f"family = {family} is {adapter!r}: give {POLICIES.wanted}.")
    return adapter


def split_revision(model: str) -> tuple[str, str | None]:
    """Name and revision of a hub id, `owner/name@revision`; a path on disk has no revision."""
    name, _, revision = (model, "", "") if Path(model).exists() else model.partition("@")
    return name, revision or None


def _locate(model: str) -> tuple[str, str | None]:
    """Directory or hub id, and the revision in the name."""
    if model in zoo.names():
        return str(zoo.path(model)), None
    directory = Path(model)
    if directory.exists():
        if not (directory / "model_index.json").is_file():
            raise EtudeError(f"model '{model}' is not a diffusers pipeline directory: it has no model_index.json.")
        return model, None
    if model.startswith((".", "/", "~")):
        raise EtudeError(f"model '{model}': there is no such directory.")
    name, revision = split_revision(model)
    if name.count("/") != 1 or model.endswith("@"):
        raise unknown("model (neither an embedded model, a directory nor a hub id)", model, zoo.names())
    return name, revision


@contextmanager
def _explained(model: str | Path) -> Iterator[None]:
    """Explain in one sentence whatever the libraries raise on files of unknown origin."""
    try:
        yield
    except EtudeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise EtudeError(
                f"model '{model}' does not fit into memory ({brief(error)}): use bfloat16, switch on memory.offload, or free some memory."
            ) from error
        hub = " (no such directory, so a hub id with its revision)" if split_revision(str(model))[1] else ""
        message = f"model '{model}'{hub} cannot be loaded as a diffusers pipeline with safetensors weights"
        remedy = "If the hub cannot be reached: run `hf download` while connected, or give a directory."
        away = isinstance(error, OSError) and not Path(expanduser(str(model))).exists()
        text = f"{message}: {type(error).__name__}: {brief(error)}"
        raise EtudeError(f"{text} {remedy}" if away else text) from error
