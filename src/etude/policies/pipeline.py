"""Diffusers pipelines as policies: prompts, guidance, adapters, reference, decoding and export."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils.memory import clear_device_cache
from diffusers.training_utils import cast_training_params
from diffusers.utils.peft_utils import set_adapter_layers
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from etude.batching import MicroBatch, Progress, Size
from etude.config import LoraConfig
from etude.errors import EtudeError, brief_value
from etude.policies.adapter_file import WEIGHTS, read_adapter, sort_header
from etude.policies.adapter_loading import adapted_parts, configuration, load_adapter
from etude.policies.compiling import check_blocks, compile_network
from etude.policies.graphs import check_graphs, graph_calls
from etude.policies.kohya import KOHYA_WEIGHTS, kohya_tensors
from etude.policies.prompt_cache import Key, PromptCache
from etude.policies.sharding import sharded
from etude.policies.trainable import TrainablePolicy
from etude.policies.unreached import check_reached
from etude.sampling.finite import all_finite, not_finite
from etude.sampling.model import Conditioning
from etude.sampling.paths import FlowPath, VPPath
from etude.sampling.shapes import ShapeTensor

ADAPTER = "default"
BASE = "base."
"""Prefix of the conditioning that text encoders give without their adapter."""
Agreement = tuple[tuple[str, int | None], tuple[str, int | None]]
"""Two numbers of a model's configurations that must be equal, each with its name; None where it has none."""
DECODED_PIXELS = 2**21
"""Pixels decoded at a time, whose activations take as much memory as those of a large denoiser."""
PROMPT_CACHE_MB = 4096
"""Default prompt cache in MiB: 1,000 prompts of FLUX in bfloat16, 18,000 of SD1.5 in float32."""


class PipelinePolicy(TrainablePolicy):
    """A diffusers pipeline with a `unet` or a `transformer` as a policy.

    The adapter of a family (one file each) adds how its pipeline encodes a prompt, calls its
    denoiser, shapes its latents and chooses its noise levels. Classifier-free guidance (arXiv
    2207.12598) at scale w is `uncond + w (cond - uncond)`, both evaluated in one batch; a scale of
    at most 1 means no guidance. Arguments that are not below are those of `load_policy`.

    Args:
        pipeline: diffusers pipeline. Its scheduler's config gives the noise path; the scheduler
            itself is not used.
        dtype: dtype of the frozen weights and of the network's input. Adapters, latents and
            predictions stay float32.

    Attributes:
        latent_size: `(h, w)` of the autoencoder's latents.
        image_size: `(height, width)` in pixels.

    Raises:
        EtudeError: the pipeline cannot make images of that resolution, or its scheduler has no path here.
    """

    path_class: ClassVar[type[VPPath] | type[FlowPath]]
    denoiser: str
    """Name of the pipeline's component that is trained."""
    classifier_free: bool = True
    """Whether guidance takes a second evaluation. False: the scale is an input of the network."""
    load_arguments: ClassVar[dict[str, Any]] = {"image_encoder": None, "feature_extractor": None}
    """Arguments of `from_pretrained` beside the dtype; components that read pictures are left out."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Components that a saved pipeline may lack; `from_pretrained` then needs None for them."""
    t5: ClassVar[tuple[str, int] | None] = None
    """Name of T5's tokenizer in the pipeline, and the pipeline's default `max_sequence_length`."""

    @classmethod
    def pipeline_class(cls, name: str) -> Any:
        """The class that loads the pipeline, by its name in model_index.json.

        A family whose pipeline lives in another package returns that package's class. Default: the
        class of diffusers; EtudeError if there is none.
        """
        import diffusers

        if not hasattr(diffusers, name):
            raise EtudeError(
                f"diffusers {diffusers.__version__} has no {name}: install the version that has, or give `family` an adapter "
                "whose pipeline_class returns it."
            )
        return getattr(diffusers, name)

    def __init__(
        self,
        pipeline: Any,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        resolution: int | None = None,
        decode_batch_size: Size | None = None,
        offload: bool = False,
        prompt_cache_mb: int = PROMPT_CACHE_MB,
    ) -> None:
        if pipeline.dtype != dtype:
            pipeline.to(dtype=dtype)
        (getattr(pipeline, self.denoiser) if offload else pipeline).to(device)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        self.pipeline = pipeline
        self.network: nn.Module = self._trained_network
        self.dtype, self.device, self.offload = dtype, torch.device(device), offload
        self._computing = dtype
        # The config of a loaded scheduler names its class; that of one made in code does not.
        scheduler = pipeline.scheduler
        self.scheduler_config: Mapping[str, Any] = {**scheduler.config, "_class_name": type(scheduler).__name__}
        self.path = self.path_class.from_config(self.scheduler_config)
        self._decoded_at_a_time = decode_batch_size
        self._take_size(self._default_size() if resolution is None else self._size_of(resolution))
        self._encoded = PromptCache(prompt_cache_mb * 2**20)
        self._initial: nn.Module | None = None
        self._told_of_cut = False
        self._trains_everything = self._is_reference = False

    def _take_size(self, latent_size: tuple[int, int]) -> None:
        """Sets all that follows from the size of the latents."""
        self.latent_size, factor = latent_size, self.scale_factor
        self.image_size = (self.latent_size[0] * factor, self.latent_size[1] * factor)
        self.latent_shape = self._shape()
        at_a_time = max(1, min(32, DECODED_PIXELS // (self.image_size[0] * self.image_size[1])))
        self.decode_batch = MicroBatch.of(self._decoded_at_a_time or at_a_time, "memory.decode_batch_size", at_a_time)

    def resized(self, side: int | None) -> PipelinePolicy:
        size = self.latent_size if side is None else self._size_of(side)
        if size == self.latent_size:
            return self
        other = copy.copy(self)  # which shares the networks and the encoded prompts
        other._take_size(size)
        return other

    def _default_size(self) -> tuple[int, int]:
        """`(h, w)` of the latents that the pipeline makes by default."""
        size = self._trained_network.config.sample_size
        if size is None:
            raise EtudeError(f"the model's {self.denoiser} does not say its sample_size: give a resolution in pixels.")
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def _shape(self) -> tuple[int, ...]:
        """Shape of one sample for the denoiser. Default: the autoencoder's latents, `[c, h, w]`."""
        return (self._trained_network.config.in_channels, *self.latent_size)

    def agreements(self) -> list[Agreement]:
        """Numbers of the parts' configurations that must be equal. Default: none are known."""
        return []

    def _channels(self, patch: int = 1) -> list[Agreement]:
        """The denoiser reads and predicts the autoencoder's channels, `patch` latents in a token."""
        config, own = self._trained_network.config, self.pipeline.vae.config
        key = "latent_channels" if "latent_channels" in own else "z_dim"
        channels = own.get(key)
        wanted = f"{patch} x vae.{key}" if patch > 1 else f"vae.{key}"
        needed = (wanted, None if channels is None else patch * channels)
        return [((f"{self.denoiser}.{name}", config.get(name)), needed) for name in ("in_channels", "out_channels")]

    @abstractmethod
    def _encode(self, prompt: str) -> dict[str, Tensor]:
        """Conditioning of one prompt: the denoiser's arguments by name, one row each."""

    def _encode_nothing(self) -> dict[str, Tensor]:
        """Unconditional conditioning of classifier-free guidance. Default: that of the empty prompt."""
        return self._encode("")

    @abstractmethod
    def _forward(self, x: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], guidance_scale: float) -> Tensor:
        """One evaluation of the denoiser."""

    @property
    def _trained_network(self) -> Any:
        """The denoiser itself; `network` may be a wrapper of it."""
        return getattr(self.pipeline, self.denoiser)

    @property
    def scale_factor(self) -> int:
        """Pixels of an image's side for each of the latents' side."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def pipeline_name(self) -> str:
        return type(self.pipeline).__name__

    @property
    def denoiser_names(self) -> tuple[str, str]:
        return self.denoiser, type(self._trained_network).__name__

    def networks(self) -> dict[str, str]:
        parts = self.pipeline.components.items()
        return {name: type(part).__name__ for name, part in parts if isinstance(part, nn.Module)}

    def loading_arguments(self) -> dict[str, Any]:
        return {name: None for name in self.optional if getattr(self.pipeline, name) is None}

    def call_arguments(self, guidance_scale: float) -> dict[str, Any]:
        height, width = self.image_size
        size = {} if self.image_size == self.pipeline_size() else {"height": height, "width": width}
        text = {"max_sequence_length": self.max_sequence_length} if self.t5 else {}
        return {"guidance_scale": guidance_scale, **size, **text}

    @property
    def max_sequence_length(self) -> int:
        """Number of a prompt's tokens that T5 reads, in a pipeline that has it."""
        assert self.t5 is not None
        name, longest = self.t5
        tokenizer = getattr(self.pipeline, name)
        return longest if tokenizer is None else min(longest, tokenizer.model_max_length)

    def pipeline_size(self) -> tuple[int, int] | None:
        """`(height, width)` of the images that the plain pipeline makes by default."""
        factor, (height, width) = self.scale_factor, self._default_size()
        return (height * factor, width * factor)

    @property
    def _side_multiple(self) -> int:
        """Number of pixels that divides the side of every image: the side of the network's patches."""
        return int(self.scale_factor * self._trained_network.config.get("patch_size", 1))

    def _size_of(self, resolution: int) -> tuple[int, int]:
        """`(h, w)` of the latents of square images."""
        side, multiple = resolution // self.scale_factor, self._side_multiple
        if resolution < multiple or resolution % multiple:
            what = f"this model makes images whose side is a multiple of {multiple} pixels"
            raise EtudeError(f"resolution = {resolution}: {what}.")
        return (side, side)

    def _mu(self, tokens: int, max_shift: float) -> float:
        """mu of dynamic shifting for so many image tokens; `max_shift` if the config has none."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": max_shift}
        config = self.pipeline.scheduler.config
        return calculate_shift(tokens, *(config.get(name, default) for name, default in defaults.items()))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        self.encode_ahead(prompts, until_full=False)
        conditioning = Conditioning(self._rows(prompts), self._rows([None] if self.classifier_free else []))
        self._encoded.trim()
        return conditioning

    @torch.no_grad()
    def encode_ahead(self, prompts: Iterable[str], until_full: bool = True) -> None:
        """Encodes prompts for a later `encode`, guidance's first, until the prompt cache is full."""
        keys: list[Key] = [*([None] if self.classifier_free else []), *prompts]
        new = [prompt for prompt in dict.fromkeys(keys) if prompt not in self._encoded]
        parts = self.pipeline.components.items() if new else ()
        encoders = [part for name, part in parts if name.startswith("text_encoder") and part is not None]
        with self._on_device(*encoders):
            for prompt in new:  # one by one: in a batch, the last bits of a row can depend on the other rows
                if until_full and self._encoded.full:
                    return
                self._tell_of_cut(prompt)
                self._encoded.add(prompt, self._encode_key(prompt))
                self._check_encoding(prompt)

    def _encode_key(self, prompt: Key) -> dict[str, Tensor]:
        """Conditioning of one prompt, and under names with `BASE` that of encoders without their adapter."""
        rows = self._encode_nothing() if prompt is None else self._encode(prompt)
        adapted = [part for name, part in adapted_parts(self.pipeline).items() if name != self.denoiser]
        if not adapted:
            return rows
        for part in adapted:
            set_adapter_layers(part, enabled=False)
        try:
            base = self._encode_nothing() if prompt is None else self._encode(prompt)
        finally:
            for part in adapted:
                set_adapter_layers(part, enabled=True)
                part.requires_grad_(False)  # enabling an adapter makes it trainable
        return rows | {f"{BASE}{name}": tensor for name, tensor in base.items()}

    def _in_force(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """The denoiser's arguments: those of the encoders' adapters or, in the reference model, of the base."""
        base = {name.removeprefix(BASE): tensor for name, tensor in rows.items() if name.startswith(BASE)}
        if base and self._is_reference:
            return base
        return {name: tensor for name, tensor in rows.items() if not name.startswith(BASE)}

    def _tell_of_cut(self, prompt: Key) -> None:
        """Tells once of a prompt that a text encoder does not read to its end."""
        if self._told_of_cut or not prompt:
            return
        for name, words in self.pipeline.components.items():
            if not name.startswith("tokenizer") or words is None:
                continue
            longest = self._longest(name, words)
            count = len(words(prompt, truncation=False, verbose=False).input_ids)
            if count > longest:
                self._told_of_cut = True
                encoder = name.replace("tokenizer", "text_encoder")
                warnings.warn(
                    f"the prompt {brief_value(prompt)} has {count} tokens, of which the {encoder} reads {longest}: the rest "
                    "changes nothing there (said once)",
                    stacklevel=2,
                )

    def _longest(self, name: str, words: Any) -> int:
        """Number of tokens of a prompt that the text encoder of a tokenizer reads."""
        return int(self.max_sequence_length if self.t5 and name == self.t5[0] else words.model_max_length)

    def _check_encoding(self, prompt: Key) -> None:
        for name, rows in self._encoded.get(prompt).items():
            if not isinstance(rows, ShapeTensor) and not all_finite(rows):
                raise not_finite(
                    f"the {self._not_finite_encoder(prompt)} {name}",
                    f"the prompt {brief_value(prompt or '')}",
                    self.dtype,
                )

    def _not_finite_encoder(self, prompt: Key) -> str:
        """The first text encoder whose states of a prompt are not finite, as a genitive; all of them where none is."""
        marks: dict[str, bool] = {}

        def mark(name: str, output: Any) -> None:
            leaves = tree_leaves(tuple(output.values()) if isinstance(output, Mapping) else output)
            finite = all(bool(all_finite(states)) for states in leaves if isinstance(states, Tensor))
            marks[name] = finite and marks.get(name, True)

        with ExitStack() as hooks:
            for name, part in self.pipeline.components.items():
                if name.startswith("text_encoder") and part is not None:
                    hook = part.register_forward_hook(lambda _, __, output, name=name: mark(name, output))
                    hooks.callback(hook.remove)
            self._encode_key(prompt)
        return next((f"{name}'s" for name, finite in marks.items() if not finite), "text encoders'")

    @contextmanager
    def _on_device(self, *modules: nn.Module) -> Iterator[None]:
        """Context in which the modules are on the device; with `offload` they leave it afterwards."""
        moved = modules if self.offload else ()
        try:
            for module in moved:
                module.to(self.device)
            yield
        finally:
            for module in moved:
                module.to("cpu")
            if moved:
                clear_device_cache()

    def _rows(self, prompts: Sequence[Key]) -> dict[str, Tensor]:
        """The prompts' tensors by name, `[n, ...]` each. Repeated prompts move to the device once."""
        if not prompts:
            return {}
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        index = torch.tensor([distinct[prompt] for prompt in prompts], device=self.device)
        parts = [self._encoded.get(prompt) for prompt in distinct]
        return {name: self._joined([rows[name] for rows in parts]).to(self.device)[index] for name in parts[0]}

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """Rows of several prompts below one another. Default: all have one shape."""
        return torch.cat(list(tensors))

    def predict(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        guided = self.classifier_free and guidance_scale > 1
        inputs, arguments = x.to(self.dtype), self._in_force(conditioning.prompt)
        if guided:
            empty = self._in_force(conditioning.unconditional)
            inputs, timesteps = torch.cat([inputs, inputs]), torch.cat([timesteps, timesteps])
            arguments = {name: torch.cat([empty[name].expand_as(rows), rows]) for name, rows in arguments.items()}
        with self._casting(), self.attention.allowed(self.device, self.denoiser):
            output = self._forward(inputs, timesteps, arguments, guidance_scale).float()
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _casting(self) -> AbstractContextManager[Any]:
        """Context of a call of the network: autocast in half precision, because adapters stay float32."""
        mixed = self.autocast and self._computing != torch.float32
        return torch.autocast(self.device.type, self._computing) if mixed else nullcontext()

    def settle(self) -> None:
        """Finds or checks at loading what no configuration tells. Default: nothing."""

    @property
    def computing_dtype(self) -> torch.dtype:
        return self._computing

    @contextmanager
    def precision(self, dtype: torch.dtype | None) -> Iterator[None]:
        before, self._computing = self._computing, dtype or self.dtype
        try:
            yield
        finally:
            self._computing = before

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        images: list[Tensor] = []

        def work(rows: slice, report: Progress) -> None:
            images.append(self.pictures(latents[rows]))

        with self._on_device(self.pipeline.vae):
            self.decode_batch.run(len(latents), work)
        return torch.cat(images)

    @torch.no_grad()
    def find_decode_batch(self, largest: int) -> None:
        """Sets the number of images decoded at a time to the largest that fits into memory."""
        vae = self.pipeline.vae
        with self._on_device(vae):
            self.decode_batch.find(lambda count: self.pictures(self._zeros(count)), largest)

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, *self.latent_shape, device=self.device)

    def pictures(self, latents: Tensor) -> Tensor:
        """uint8 images of one micro-batch; the autoencoder must be on the device of the latents."""
        vae = self.pipeline.vae
        decoded = self._decoder_output(latents)
        finite, images = all_finite(decoded), _in_range(decoded).mul(255).round().to(torch.uint8).cpu()
        if not isinstance(finite, ShapeTensor) and not finite:  # read here, where the device has been waited for
            raise not_finite("the vae's image", "decoding", vae.dtype)
        return images

    def decoded(self, latents: Tensor) -> Tensor:
        """Images of one micro-batch in float32, in [0, 1]."""
        return _in_range(self._decoder_output(latents))

    def _decoder_output(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return vae.decode(self._unscaled(self._unpack(latents)).to(vae.dtype), return_dict=False)[0].float()

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Input of the autoencoder's decoder: `latents / scaling_factor + shift_factor`."""
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def _scaled(self, latents: Tensor) -> Tensor:
        """The inverse of `_unscaled`: `(latents - shift_factor) * scaling_factor`."""
        config = self.pipeline.vae.config
        return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def _unpack(self, latents: Tensor) -> Tensor:
        """Latents of the denoiser in the autoencoder's layout, `[n, c, h, w]`."""
        return latents

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents of images, uint8 `[n, 3, *image_size]`: the mean of the autoencoder's posterior, fp32."""
        vae = self.pipeline.vae
        with self._on_device(vae):
            pixels = images.to(self.device, vae.dtype) / 127.5 - 1
            mean = vae.encode(pixels).latent_dist.mode().float()
        return self._pack(self._scaled(mean))

    def _pack(self, latents: Tensor) -> Tensor:
        """The inverse of `_unpack`."""
        return latents

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._trained_network.named_parameters() if p.requires_grad}

    def enable_gradient_checkpointing(self) -> None:
        self._trained_network.enable_gradient_checkpointing()

    def check_compile(self, how: str) -> None:
        if how == "graphs":
            check_graphs(self.device, sharded(self.trainable()))
        else:
            check_blocks(self._trained_network, how)

    def compile(self, how: str) -> None:
        self.check_compile(how)
        for network in filter(None, (self._trained_network, self._initial)):
            if how == "graphs":
                graph_calls(network, lambda: self._is_reference)
            else:
                compile_network(network, how)
        self.compiled = how != "graphs"

    def leave_autocast(self) -> None:
        self.autocast = False
        for module in self._trained_network.modules():
            if isinstance(module, LoraLayer):
                for layer in [*module.lora_A.values(), *module.lora_B.values()]:
                    layer.forward = partial(_in_precision_of_input, layer)

    def use_channels_last(self) -> None:
        for network in filter(None, (self._trained_network, self._initial, self.pipeline.vae)):
            network.to(memory_format=torch.channels_last)

    def add_lora(self, config: LoraConfig, seed: int) -> None:
        network = self._trained_network
        if not hasattr(network, "add_adapter"):
            raise EtudeError(
                f"diffusers gives {type(network).__name__} no adapters: set lora.rank to 0, which trains the whole network."
            )
        names = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        missing = [t for t in config.targets if not any(name == t or name.endswith(f".{t}") for name in names)]
        if missing:
            ends = {name.rpartition(".")[2] for name in names}
            layers = sorted(end for end in ends if not end.isdigit())
            layers += ["to_out.0"] * any(name.endswith(".to_out.0") for name in names)
            raise EtudeError(
                f"lora.targets: no layer of the {self.denoiser} is named '{missing[0]}'; it has {', '.join(layers)}."
            )
        lora = PeftLoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets), init_lora_weights="gaussian"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network.add_adapter(lora, adapter_name=ADAPTER)
        cast_training_params(network, dtype=torch.float32)
        _keep_inputs(network)
        if config.targets != LoraConfig().targets:
            try:
                check_reached(self)
            except EtudeError:
                network.unload_lora()
                raise
        self.in_training = True

    def train_everything(self, keep_reference: bool = True) -> None:
        if keep_reference:
            self._initial = copy.deepcopy(self._trained_network)
        self._trains_everything = self.in_training = True
        self._trained_network.float().requires_grad_(True)

    @contextmanager
    def reference(self) -> Iterator[None]:
        with ExitStack() as afterwards:
            if self._initial is not None:
                afterwards.callback(setattr, self, "network", self.network)
                self.network = self._initial
            elif self._trains_everything:
                remedy = "call train_everything(keep_reference=True)"
                raise EtudeError(f"no copy of the model before training was kept: {remedy}.")
            elif getattr(self._trained_network, "peft_config", None):
                afterwards.callback(self._trained_network.enable_adapters)
                self._trained_network.disable_adapters()
            afterwards.callback(setattr, self, "_is_reference", self._is_reference)
            self._is_reference = True
            yield

    @property
    def has_reference(self) -> bool:
        return self._initial is not None or bool(adapted_parts(self.pipeline))

    @property
    def export_name(self) -> str:
        return "model" if self._trains_everything else "lora"

    def export(self, directory: Path) -> None:
        """Writes the adapter, or after full fine-tuning the whole pipeline with its frozen parts.

        The adapter is written twice: for diffusers and, where its names have a place for it, for
        kohya's tools and ComfyUI.
        """
        if self._trains_everything:
            self.pipeline.save_pretrained(directory)
            return
        named: dict[str, Any] = {}
        for part, network in adapted_parts(self.pipeline, ADAPTER).items():
            # peft's names: older ones lose mixed targets
            named[f"{part}_lora_layers"] = get_peft_model_state_dict(network, adapter_name=ADAPTER)
            metadata = configuration(network, ADAPTER).to_dict()
            metadata["target_modules"] = sorted(metadata["target_modules"])  # a set, ordered anew by each process
            named[f"{part}_lora_adapter_metadata"] = metadata
        self.pipeline.save_lora_weights(directory, **named)
        sort_header(directory / WEIGHTS)
        if (others := kohya_tensors(self.pipeline, ADAPTER)) is not None:
            save_file(others, directory / KOHYA_WEIGHTS, metadata={"format": "pt"})

    def load_lora(self, directory: Path) -> None:
        load_adapter(self.pipeline, read_adapter(directory), ADAPTER)
        self._encoded.clear()
        self.adapter = directory

    def continue_lora(self, place: Path) -> None:
        file = read_adapter(place, "lora.init")
        tensors = load_adapter(self.pipeline, file, ADAPTER)
        self._encoded.clear()
        if self.denoiser not in tensors:
            raise EtudeError(f"{file} holds nothing for the {self.denoiser}, which is what a run trains.")
        network = self._trained_network
        set_adapter_layers(network, enabled=True)  # which makes it trainable
        cast_training_params(network, dtype=torch.float32)
        set_peft_model_state_dict(network, tensors[self.denoiser], adapter_name=ADAPTER)  # unrounded
        _keep_inputs(network)


def _keep_inputs(network: nn.Module) -> None:
    """Stops the denoiser's adapter from casting its inputs to float32, which autocast undoes, with the same bits."""
    for module in network.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]


def _in_precision_of_input(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """The layer's output with its weight cast to the dtype of `x`, as autocast casts it. Layers of an adapter have no bias."""
    weight = layer.weight.to(x.dtype)
    return layer._conv_forward(x, weight, None) if isinstance(layer, nn.Conv2d) else functional.linear(x, weight)


def _in_range(decoded: Tensor) -> Tensor:
    """An autoencoder's output, from [-1, 1] to [0, 1]."""
    return (decoded / 2 + 0.5).clamp(0, 1)
