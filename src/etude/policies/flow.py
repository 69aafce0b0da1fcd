"""Any text-to-image pipeline of diffusers with a flow transformer as a policy, by asking the pipeline itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from etude.batching import is_out_of_memory
from etude.config import LoraConfig
from etude.errors import EtudeError, brief
from etude.policies.latents import encoded, inverse
from etude.policies.outline import is_outline, known_masks
from etude.policies.pipeline import Agreement, PipelinePolicy
from etude.policies.plain_call import PlainCall
from etude.policies.prompt_slots import Form, padded
from etude.policies.self_check import PROMPTS, batch_difference, guidance_difference, tolerance
from etude.policies.sharding import most
from etude.policies.unreached import unreached
from etude.sampling.model import Conditioning
from etude.sampling.paths import FlowPath, Grid, flow_grid, whole_steps
from etude.sampling.shapes import ShapeTensor
from etude.sampling.solver_path import SolverPath

Mixed = Literal["vector", "doubled", "one"]
_PLAIN = {"use_resolution_binning": False}
"""Arguments of every call where the pipeline takes them: the published resolutions need no binning, which crops others."""
_SHORT, _LONG = "a", "a prompt that is much longer than the other one"
"""Prompts whose encodings show what counts prompts and what counts tokens."""


class FlowPolicy(PipelinePolicy):
    """A pipeline with a flow transformer as a policy.

    Levels, prompts, predictions with guidance and images come from the pipeline's own `__call__`
    (`plain_call`), so a family says only what that call cannot tell. The state is what the
    pipeline takes as `latents`.

    Attributes:
        off: largest guidance scale at which the pipeline makes no second evaluation.
        call: arguments of every call of the pipeline, in training and after it.
        mixed: samples of different timesteps in one evaluation. `vector`: a timestep each.
            `doubled`: the pipeline doubles the batch for guidance and not the timesteps. `one`: an
            evaluation for each distinct timestep, which is always right. None: the trial at loading
            finds it.
        targets: layers of the adapter where `lora.targets` is the default.
        patch: latents of the autoencoder in one that the network reads. None: not known.
    """

    path: FlowPath
    path_class = SolverPath
    denoiser = "transformer"
    load_arguments: ClassVar[dict[str, Any]] = {}
    off: ClassVar[float] = 1.0
    call: Mapping[str, Any] = {}
    mixed: Mixed | None = None
    targets: ClassVar[tuple[str, ...]] = tuple(LoraConfig().targets)
    patch: ClassVar[int | None] = None
    _seen_to_guide = False

    def __init__(self, pipeline: Any, *args: Any, **kwargs: Any) -> None:
        taken = inspect.signature(type(pipeline).__call__).parameters
        self.call = {**{name: value for name, value in _PLAIN.items() if name in taken}, **self.call}
        super().__init__(pipeline, *args, **kwargs)
        self.classifier_free = self._forms[True].guided

    def agreements(self) -> list[Agreement]:
        return [] if self.patch is None else self._channels(self.patch)[:1]  # of predictions each counts its own way

    def _guidance(self, scale: float, prompts: int | None = None) -> dict[str, Any]:
        """Arguments of guidance for so many prompts, or for one prompt that is a text."""
        return {"guidance_scale": scale}

    def _as_latents(self, stepped: Tensor) -> Tensor:
        """States as the scheduler steps them, in the form in which the pipeline takes `latents`."""
        return stepped

    @property
    def guides(self) -> bool:
        """Whether a guidance scale above `off` changes anything."""
        return bool(self.classifier_free or self._trained_network.config.get("guidance_embeds") or self._seen_to_guide)

    def settle(self) -> None:
        """Finds or confirms how a batch of different timesteps is evaluated.

        A family that says it is tried on two prompts without guidance; another on three with
        guidance, in every way. An outline has no numbers to compare.

        Raises:
            EtudeError: a batch gives other predictions than its prompts one by one.
        """
        if is_outline(self):
            self.mixed = self.mixed or "one"
            return
        known = self.mixed is not None
        ways: tuple[Mixed, ...] = (self.mixed,) if self.mixed else ("vector", "doubled", "one")
        prompts, scale = list(PROMPTS[1:] if known else PROMPTS), self.off
        if not known and self.guides:
            scale += 2
        differences: list[float] = []
        failed = ""
        for self.mixed in ways:
            try:
                differences.append(batch_difference(self, prompts, scale))
            except (RuntimeError, ValueError, TypeError) as error:
                if is_out_of_memory(error) or known:
                    raise
                failed = f"or cannot be evaluated ({brief(error, 200)})"
                continue
            if differences[-1] <= tolerance(self):
                break
        else:
            by = f"by {min(differences):.0%}" if differences else failed
            raise EtudeError(
                f"prompts of unequal length give other predictions in a batch than one by one, {by}: a {self.pipeline_name} "
                "needs a family of its own (`family: module:Class`)."
            )
        if not known and not self.guides:
            self._seen_to_guide = True  # so that `predict` takes a scale, to see whether it matters
            self._seen_to_guide = guidance_difference(self, self.off, self.off + 2) > 0

    @cached_property
    def _forms(self) -> dict[bool, Form]:
        """The form of encoded prompts without and with guidance."""
        plain, forms = PlainCall(self.pipeline, self.denoiser, self.device, self.call), {}
        parts = self.pipeline.components.items()
        encoders = [part for name, part in parts if name.startswith("text_encoder") and part is not None]
        with torch.no_grad(), known_masks(), self._on_device(*encoders):
            for guided in (False, True):
                one, two = ([_SHORT], [_SHORT, _LONG])
                scale = self.off + 1 if guided else self.off
                forms[guided] = Form(*(plain.encode(p, self._guidance(scale, len(p))) for p in (one, two)))
        forms[True].with_unconditional(forms[False])
        return forms

    def _plain(self, **size: int) -> PlainCall:
        """The pipeline's call, without guidance unless a stage is given some."""
        return PlainCall(self.pipeline, self.denoiser, self.device, {**self._guidance(self.off), **self.call, **size})

    @cached_property
    def _default_image_size(self) -> tuple[int, int]:
        return self._plain().first_latents(self._blank())[1]

    def _blank(self, count: int = 1) -> Any:
        return self._forms[False].blank(count, self.device)

    @property
    def _size(self) -> dict[str, int]:
        height, width = self.image_size
        return {"height": height, "width": width}

    @property
    def scale_factor(self) -> int:
        spatial = getattr(self.pipeline, "vae_scale_factor_spatial", None)  # of pipelines that could make videos
        return int(self.pipeline.vae_scale_factor if spatial is None else spatial)

    @property
    def _side_multiple(self) -> int:
        return int(self.pipeline.image_processor.config.vae_scale_factor)

    def _default_size(self) -> tuple[int, int]:
        height, width = self._default_image_size
        return height // self.scale_factor, width // self.scale_factor

    def pipeline_size(self) -> tuple[int, int]:
        return self._default_image_size

    @torch.no_grad()
    def _shape(self) -> tuple[int, ...]:
        latents, size = self._plain(**self._size).first_latents(self._blank())
        if size != self.image_size:
            raise EtudeError(
                f"a {self.pipeline_name} makes images of {size[0]} x {size[1]} pixels where {self.image_size[0]} are asked for."
            )
        self._latents_dtype = latents.dtype  # that of the pipeline's own, which some never cast
        return tuple(self._as_latents(latents).shape[1:])

    @torch.no_grad()
    def grid(self, num_steps: int) -> Grid:
        """The levels that the pipeline's own scheduler visits, with the sigmas and mu that the pipeline gives it."""
        latents = torch.zeros(1, *self.latent_shape, device=self.device)
        timesteps, sigmas = self._plain(**self._size).levels(whole_steps(num_steps), latents, self._blank())
        if len(timesteps) != num_steps:
            name = type(self.pipeline.scheduler).__name__
            raise EtudeError(
                f"{name} makes {len(timesteps)} levels of {num_steps} steps: give the model an Euler scheduler."
            )
        return flow_grid(timesteps, sigmas)

    def call_arguments(self, guidance_scale: float) -> dict[str, Any]:
        size = {} if self.image_size == self.pipeline_size() else self._size
        return {**self._guidance(guidance_scale), **self.call, **size}

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        return self._encoded_rows(prompt, guided=False)

    def _encode_nothing(self) -> dict[str, Tensor]:
        return self._encoded_rows("", guided=True)

    def _encoded_rows(self, prompt: str, guided: bool) -> dict[str, Tensor]:
        """Rows of one prompt, or of guidance's unconditional side."""
        scale = self.off + 1 if guided else self.off
        with known_masks():
            results = self._plain().encode([prompt], self._guidance(scale, 1))
        return self._forms[guided].rows(results, empty=guided)

    def _longest(self, name: str, words: Any) -> int:
        limit = inspect.signature(type(self.pipeline).__call__).parameters.get("max_sequence_length")
        return int(words.model_max_length if limit is None else min(limit.default, words.model_max_length))

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        return padded(tensors)

    def _forward(self, x: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], guidance_scale: float) -> Tensor:
        raise NotImplementedError("the pipeline's own call is the forward")

    def predict(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        if guidance_scale > self.off and not self.guides:
            what = f"this {self.pipeline_name} has no guidance, so set it to {self.off:g} (no guidance)"
            raise EtudeError(f"guidance_scale = {guidance_scale:g}: {what}.")
        rows, empty = self._in_force(conditioning.prompt), self._in_force(conditioning.unconditional)
        if self.mixed in ("vector", "doubled"):
            guided = self.classifier_free and guidance_scale > self.off
            twice = torch.cat([timesteps, timesteps]) if self.mixed == "doubled" and guided else timesteps
            return self._evaluated(x, twice[None], rows, empty, guidance_scale)
        if isinstance(timesteps, ShapeTensor):  # which has no numbers to tell apart
            return self._evaluated(x, timesteps[:1], rows, empty, guidance_scale)
        output = torch.empty_like(x)
        for chosen in self._equally_timed(timesteps):
            told = {name: tensor[chosen] for name, tensor in rows.items()}
            part = self._evaluated(x[chosen], timesteps[chosen[:1]], told, empty, guidance_scale)
            output = output.index_copy(0, chosen, part)
        return output

    def _equally_timed(self, timesteps: Tensor) -> list[Tensor]:
        """The rows of each distinct timestep.

        Where processes hold parts of the network all must call it equally often, so every row is by
        itself unless each process has one timestep.
        """
        groups = [(timesteps == timestep).nonzero()[:, 0] for timestep in timesteps.unique()]
        if isinstance(self.network, FSDPModule) and most(len(groups), timesteps.device) > 1:
            return list(torch.arange(len(timesteps), device=timesteps.device).split(1))
        return groups

    def _evaluated(
        self, x: Tensor, timesteps: Tensor, rows: dict[str, Tensor], empty: dict[str, Tensor], guidance_scale: float
    ) -> Tensor:
        """One evaluation of the pipeline; the timesteps as in `PlainCall.velocity`."""
        guided = self.classifier_free and guidance_scale > self.off
        told = self._forms[guided].encode(len(x), rows, empty)
        guidance = self._guidance(guidance_scale, len(x))
        with self._casting(), self.attention.allowed(self.device, self.denoiser):
            x = x.to(self._latents_dtype)
            output = self._plain(**self._size).velocity(self.network, x, timesteps, guidance, told)
        return self._as_latents(output.float())

    def _decoder_output(self, latents: Tensor) -> Tensor:
        latents = latents.to(self._latents_dtype)
        decoded = self._plain(**self._size).decoder_output(latents, self._blank(len(latents)))
        decoded = decoded.squeeze(2) if decoded.ndim == 5 else decoded  # the only frame of a video
        if tuple(decoded.shape[2:]) != self.image_size:
            raise EtudeError(
                f"the vae decodes images of {list(decoded.shape[2:])} pixels where a {self.pipeline_name} reckons with "
                f"{list(self.image_size)}: give parts that belong together."
            )
        return decoded.float()

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """As of other families, by inverting how the pipeline prepares latents for its autoencoder.

        Raises:
            EtudeError: the pipeline does more to its latents than to scale, shift and reorder them.
        """
        plain, blank = self._plain(**self._size), partial(self._blank, len(images))
        vae = self.pipeline.vae
        with self._on_device(vae):
            pixels = images.to(self.device, vae.dtype) / 127.5 - 1
            latents, difference = inverse(
                lambda x: plain.decoder_input(x, blank()), partial(encoded, vae, pixels), self._zeros(len(images))
            )
        if difference > tolerance(self):
            raise EtudeError(
                f"a {self.pipeline_name} does more to latents than to scale, shift and reorder them before it decodes, so that etude "
                "cannot encode images for it: leave out objective.options.pairs."
            )
        return latents

    def train_everything(self, keep_reference: bool = True) -> None:
        """As of other families, but for weights that change nothing and get no gradient: they stay frozen."""
        super().train_everything(keep_reference)
        parameters = self.trainable()
        for name in unreached(self):
            parameters[name].requires_grad_(False)

    def add_lora(self, config: LoraConfig, seed: int) -> None:
        if not hasattr(self.pipeline, "save_lora_weights"):
            raise EtudeError(
                f"a {self.pipeline_name} loads no LoRA: set lora.rank to 0, which trains the whole network."
            )
        if config.targets == LoraConfig().targets:
            config = config.model_copy(update={"targets": list(self.targets)})
        super().add_lora(config, seed)
