"""Load an adapter file into a pipeline whole: every tensor of the file is in place afterwards, or none is taken.

diffusers translates the names of other programs and takes what it knows; the rest it leaves out with
a warning. Here each tensor is followed through the translation, and what was given is counted
against what was taken, by layer and by kind of tensor, under any names.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from etude.batching import is_out_of_memory
from etude.errors import EtudeError, brief
from etude.policies.adapter_file import Adapter
from etude.policies.traced import Traced, sources_of
from etude.policies.weight_files import contradictions
from etude.sampling.shapes import ShapeTensor


def adapted_parts(pipeline: Any, name: str | None = None) -> dict[str, nn.Module]:
    """The networks of a pipeline that hold an adapter of that name, or any."""
    parts = _networks(pipeline)
    held = {part: getattr(network, "peft_config", None) or {} for part, network in parts.items()}
    return {part: parts[part] for part, names in held.items() if (name in names if name else names)}


def _networks(pipeline: Any) -> dict[str, nn.Module]:
    return {part: network for part, network in pipeline.components.items() if isinstance(network, nn.Module)}


def configuration(network: nn.Module, name: str) -> LoraConfig:
    """peft's configuration of an adapter of a network."""
    configurations: Any = network.peft_config
    config: LoraConfig = configurations[name]
    return config


def load_adapter(pipeline: Any, file: Adapter, name: str) -> dict[str, dict[str, Tensor]]:
    """Loads a file as the plain pipeline's `load_lora_weights` does, at the strength that the file states.

    diffusers 0.42 gives every layer of a kohya file the most frequent alpha; here each layer has its own.

    Returns:
        The tensors of each part by their names in peft, in the precision of the file.

    Raises:
        EtudeError: a tensor of the file would be left out, a part of the adapter lacks its tensor,
            or the pipeline holds an adapter already.
    """
    if adapted_parts(pipeline, name):
        raise EtudeError(f"{file}: the model holds an adapter already; load the model anew for another one.")
    try:
        loaded = _load(pipeline, file, name)
    except Exception as error:
        if adapted_parts(pipeline, name):
            pipeline.unload_lora_weights()
        if isinstance(error, EtudeError) or is_out_of_memory(error):
            raise
        raise EtudeError(f"{file} does not fit the model: {type(error).__name__}: {brief(error)}") from error
    scheduler = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    for says, key, _, own in contradictions(file.tensors, file.metadata, scheduler):
        warnings.warn(
            f"{file} {says}, but the scheduler of the model has {key} {own}, which is used: the adapter may belong to another model",
            stacklevel=2,
        )
    return loaded


def _load(pipeline: Any, file: Adapter, name: str) -> dict[str, dict[str, Tensor]]:
    translation = _Translation(pipeline, file)
    pipeline.lora_state_dict = translation  # `load_lora_weights` asks the pipeline itself
    # Parameters that peft makes empty are filled from the file. It cannot make one of the shapes of an outline's layer.
    numbers = not any(
        isinstance(weight, ShapeTensor) for part in _networks(pipeline).values() for weight in part.parameters()
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The following alpha_pattern keys")  # which `_set_strength` mends
            pipeline.load_lora_weights(dict(file.tensors), adapter_name=name, low_cpu_mem_usage=numbers)
    finally:
        del pipeline.lora_state_dict
    parts = adapted_parts(pipeline, name)
    loaded = {part: get_peft_model_state_dict(network, adapter_name=name) for part, network in parts.items()}
    origins = {part: translation.origins(part, network) for part, network in parts.items()}
    placed = {theirs for part, names in origins.items() for ours, theirs in names.items() if ours in loaded[part]}
    translation.refuse(sorted(translation.sources.keys() - placed))
    if missing := sorted(f"{part}.{ours}" for part in parts for ours in loaded[part].keys() - origins[part].keys()):
        raise EtudeError(f"{file} does not fit its own configuration: it lacks {_named(missing[0], missing)}.")
    for part, network in parts.items():
        network.requires_grad_(False)
        sources = {ours: translation.sources[theirs] for ours, theirs in origins[part].items()}
        configured = any(key.startswith(f"{part}.") for key in file.configuration or {})
        _set_strength(file, network, sources, loaded[part], name, configured)
    return {
        part: {ours: translation.tensors[theirs] for ours, theirs in names.items()} for part, names in origins.items()
    }


_OF_A_LORA = re.compile(r".+\.(alpha|lora_magnitude_vector(\.weight)?|lora_(B|up)\.bias)")
"""Tensors of a LoRA beside the two factors of a layer."""


class _Translation:
    """`lora_state_dict` of a pipeline, diffusers' translation of names, with the origin of each tensor.

    Attributes:
        sources: names in the file, by name after the translation.
        tensors: tensors by name after the translation.
    """

    def __init__(self, pipeline: Any, file: Adapter) -> None:
        self._file, self._convert = file, pipeline.lora_state_dict
        self._parts = _networks(pipeline)
        self.sources: dict[str, frozenset[str]] = {}
        self.tensors: dict[str, Tensor] = {}

    def __call__(self, tensors: Mapping[str, Tensor], **options: Any) -> Any:
        read: set[str] = set()
        # Beside peft's names diffusers reads no alpha, or the most frequent one: `_set_strength` does.
        starts = tuple(f"{part}." for part in self._parts)
        layers = {factor[0] for factor in map(self._file.factor, tensors) if factor}
        alphas = {f"{layer}.alpha" for layer in layers if layer.startswith(starts)} & tensors.keys()
        read.update(alphas, self._other_kinds())
        traced = {name: Traced.of(name, tensor, read) for name, tensor in tensors.items() if name not in read}
        converted, *others, _ = self._convert(traced, **options)
        self.sources = {name: sources_of(tensor) for name, tensor in converted.items()}
        self._refuse_lost(sorted(self._file.tensors.keys() - read.union(*self.sources.values(), sources_of(others))))
        self._refuse_foreign()
        self._refuse_unplaced()
        plain = tree_map(lambda value: value.as_subclass(Tensor) if isinstance(value, Traced) else value, others)
        self.tensors = {name: tensor.as_subclass(Tensor) for name, tensor in converted.items()}
        return (dict(self.tensors), *plain, self._file.configuration)

    def origins(self, part: str, network: nn.Module) -> dict[str, str]:
        """Translated names of the tensors of one part, by the names that peft has for them."""
        own = {name.removeprefix(f"{part}."): name for name in self.sources if name.startswith(f"{part}.")}
        return _peft_names(network, own)

    def _other_kinds(self) -> set[str]:
        """Names of tensors that are none of a LoRA and change nothing; EtudeError for those that change something."""
        file = self._file
        other = {name for name in file.tensors if not (file.factor(name) or _OF_A_LORA.fullmatch(name))}
        if changing := sorted(name for name in other if file.tensors[name].any()):
            if scales := [name for name in changing if name.endswith("dora_scale")]:
                remedy = "it reads DoRA in peft's names only, with lora_magnitude_vector"
                raise EtudeError(f"{file}: diffusers would leave out {_named(scales[0], scales)}: {remedy}.")
            raise EtudeError(f"{file}: only LoRAs are read, and {_named(changing[0], changing)} is of no LoRA.")
        return other

    def _refuse_lost(self, lost: list[str]) -> None:
        """Refuses tensors that the translation has left out, unless the layer's change is zero."""
        file = self._file
        layers: dict[str, list[str]] = {}
        for name in lost:
            layers.setdefault((file.factor(name) or (name.rpartition(".")[0], ""))[0], []).append(name)
        changing = [
            name for names in layers.values() if not any(_is_zero(file, name) for name in names) for name in names
        ]
        if changing:
            remedy = "it does not know these layers; save the adapter without them"
            raise EtudeError(f"{file}: diffusers would leave out {_named(changing[0], changing)}: {remedy}.")

    def _refuse_foreign(self) -> None:
        """Refuses names that belong to no part of the pipeline."""
        starts = tuple(f"{part}." for part in self._parts)
        nowhere = sorted(name for name in self.sources if not name.startswith(starts))
        if nowhere:
            parts = ", ".join(start for start in starts if start != "vae.")
            raise EtudeError(
                f"{self._file}: no part of the pipeline ({parts}) takes {_named(self.origin(nowhere[0]), nowhere)}: the file is "
                "of another kind of model, or in names that diffusers does not read."
            )

    def _refuse_unplaced(self) -> None:
        """Refuses tensors for layers that the pipeline lacks."""
        unplaced = []
        for part, network in self._parts.items():
            layers = {name for name, _ in network.named_modules()}
            for ours, theirs in self.origins(part, network).items():
                if ours.partition(".lora_")[0] not in layers:
                    unplaced.append(theirs)
        self.refuse(sorted(unplaced))

    def refuse(self, unplaced: list[str]) -> None:
        """Raises EtudeError if there are translated tensors without a place."""
        if unplaced:
            what = _named(self.origin(unplaced[0]), unplaced)
            raise EtudeError(f"{self._file} does not fit the model, which has no place for {what}.")

    def origin(self, translated: str) -> str:
        """A name in the file from which a translated tensor comes."""
        return min(self.sources[translated], default=translated)


def _named(first: str, names: list[str]) -> str:
    return f"'{first}'" if len(names) == 1 else f"'{first}' and {len(names) - 1} more"


def _is_zero(file: Adapter, name: str) -> bool:
    """Whether a tensor makes its layer's change zero."""
    factor = file.factor(name)
    return factor is not None and factor[1] == "B" and not bool(file.tensors[name].any())


def _peft_names(network: nn.Module, names: dict[str, str]) -> dict[str, str]:
    """The values of `names` by the names that peft has for its keys, as diffusers translates them while loading."""
    if not names:
        return {}
    renamed: dict[str, str]
    if hasattr(network, "load_lora_adapter"):  # a network of diffusers
        renamed = names if "lora_A" in next(iter(names)) else convert_unet_state_dict_to_peft(names)
        return renamed
    renamed = convert_state_dict_to_peft(convert_state_dict_to_diffusers(names))
    flat = not hasattr(network, "text_model")
    return {name.removeprefix("text_model.") if flat else name: value for name, value in renamed.items()}


def _set_strength(
    file: Adapter,
    network: nn.Module,
    sources: Mapping[str, frozenset[str]],
    loaded: Mapping[str, Tensor],
    name: str,
    configured: bool,
) -> None:
    """Gives each layer the strength that its alpha states, where the translation has not scaled a factor by it.

    Raises:
        EtudeError: an alpha contradicts a configuration of the part.
    """
    modules, config = dict(network.named_modules()), configuration(network, name)
    changed = False
    for key, tensor in loaded.items():
        layer, factor = key.removesuffix(".lora_A.weight"), sources.get(key, frozenset())
        if layer == key or len(factor) != 1:
            continue
        (source,) = factor
        stated = file.strength(source)
        if not torch.equal(file.tensors[source].to(tensor), tensor) or (configured and stated is None):
            continue
        module, strength = modules[layer], 1.0 if stated is None else stated
        assert isinstance(module, BaseTunerLayer)
        if module.scaling[name] != strength:
            if configured:
                own = f"its configuration gives '{layer}' the strength {module.scaling[name]:g}, its alpha {strength:g}"
                raise EtudeError(f"{file} contradicts itself: {own}.")
            changed = True
            module.scaling[name], module.lora_alpha[name] = strength, strength * module.r[name]
    if changed:
        alphas = {f"^{n}": m.lora_alpha[name] for n, m in modules.items() if isinstance(m, BaseTunerLayer)}
        config.alpha_pattern = {layer: alpha for layer, alpha in alphas.items() if alpha != config.lora_alpha}
