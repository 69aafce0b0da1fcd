"""The plain pipeline as an engine: one stage of its own `__call__` at a time.

Levels, shapes, predictions and images of a model are asked of the very code that users call, so no
rule of a family is written a second time. The call runs on a view of the pipeline, an object of its
class that shares every part with it. Stand-ins for the scheduler, the network or `encode_prompt`
live in the view alone, and whatever the call notes down is gone with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from etude.errors import EtudeError, brief

Encode = Callable[..., Any]
"""Substitute for a pipeline's `encode_prompt`."""


class _ReachedError(BaseException):
    """Ends a call of the pipeline at the stage that was asked for; no `except Exception` holds it."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def _reach(value: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise _ReachedError(value)


class PlainCall:
    """The stages of a pipeline's `__call__`.

    Args:
        pipeline: diffusers pipeline, which stays as it is.
        denoiser: name of its network.
        device: device of the computation, whatever parts are elsewhere.
        arguments: arguments of every call: `height`, `width` and the family's own.
    """

    def __init__(self, pipeline: Any, denoiser: str, device: torch.device, arguments: Mapping[str, Any]) -> None:
        kind = type(pipeline)
        self.pipeline, self.denoiser, self.arguments = pipeline, denoiser, dict(arguments)
        self._call = inspect.unwrap(kind.__call__)  # without torch.no_grad
        self._view_class, self._device = _view_class(kind), device
        takes = "sigmas" in inspect.signature(self._call).parameters
        # Levels that no stand-in reads, lest the pipeline compute its own, which takes numbers that an outline lacks.
        self._one_step = {"num_inference_steps": 1, **({"sigmas": [1.0]} if takes else {})}

    def encode(self, prompts: list[str], guidance: Mapping[str, Any]) -> list[Any]:
        """Results of every `encode_prompt` of a call, in order.

        Raises:
            EtudeError: the pipeline fails, for want of a package or since its parts do not fit together.
        """
        results: list[Any] = []
        view = self._view()
        own = view.encode_prompt

        @wraps(own)
        def record(*args: Any, **kwargs: Any) -> Any:
            results.append(own(*args, **kwargs))
            return results[-1]

        stop = _Stages(self.pipeline.scheduler, set_timesteps=lambda: results)
        arguments = {**guidance, "latents": torch.zeros(1)}  # so that none are drawn
        try:
            self._run(
                view, prompts, arguments, encode_prompt=record, scheduler=stop, prepare_latents=_stop_with(results)
            )
        except (AttributeError, LookupError, NameError, TypeError, ValueError) as error:
            raise EtudeError(
                f"a {type(self.pipeline).__name__} fails at the encoding of a prompt ({type(error).__name__}: {brief(error, 200)}): "
                "give parts that belong together, or install the package that it names."
            ) from error
        return results

    def first_latents(self, encode: Encode) -> tuple[Tensor, tuple[int, int]]:
        """The first state of one image, and `(height, width)` of the image."""
        view = self._view()
        own = getattr(view, "prepare_latents", None)
        if own is None:
            return self._first_input(view, encode)

        def prepared(*args: Any, **kwargs: Any) -> Any:
            told = inspect.signature(own).bind(*args, **kwargs).arguments
            result = own(*args, **kwargs)
            _reach((result[0] if isinstance(result, tuple) else result, (int(told["height"]), int(told["width"]))))

        generator = torch.Generator().manual_seed(0)  # so that no global one is drawn from
        scheduler = _Stages(self.pipeline.scheduler)
        latents, size = self._run(
            view, [""], {"generator": generator}, encode_prompt=encode, prepare_latents=prepared, scheduler=scheduler
        )
        return latents, size

    def _first_input(self, view: Any, encode: Encode) -> tuple[Tensor, tuple[int, int]]:
        """As `first_latents`, of a pipeline whose call draws the state itself and hands it to the network."""
        defaults = inspect.signature(self._call).parameters
        height, width = (int(self.arguments.get(side, defaults[side].default)) for side in ("height", "width"))

        def network(*args: Any, hidden_states: Tensor, **kwargs: Any) -> NoReturn:
            _reach((hidden_states[:1], (height, width)))

        parts = {self.denoiser: _Wrapped(getattr(self.pipeline, self.denoiser), network)}
        arguments = {"generator": torch.Generator().manual_seed(0)}
        scheduler = _Stages(self.pipeline.scheduler, torch.ones(1, 1))
        first: tuple[Tensor, tuple[int, int]] = self._run(
            view, [""], arguments, encode_prompt=encode, scheduler=scheduler, **parts
        )
        return first

    def levels(self, num_steps: int, latents: Tensor, encode: Encode) -> tuple[Tensor, Tensor]:
        """Timesteps `[N]` and sigmas `[N + 1]` of the pipeline's own scheduler, as the pipeline sets it."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        own = scheduler.set_timesteps

        @wraps(own)  # pipelines ask its signature what it takes
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            own(*args, **kwargs)
            _reach((scheduler.timesteps, scheduler.sigmas))

        scheduler.set_timesteps = set_timesteps
        arguments = {"num_inference_steps": num_steps, "latents": latents}
        levels: tuple[Tensor, Tensor] = self._run(
            self._view(), [""], arguments, encode_prompt=encode, scheduler=scheduler
        )
        return levels

    def velocity(
        self, network: nn.Module, latents: Tensor, timesteps: Tensor, guidance: Mapping[str, Any], encode: Encode
    ) -> Tensor:
        """The output that the pipeline hands to `scheduler.step`, with guidance and its own signs.

        Args:
            network: the denoiser or a wrapper of it, which is called; questions go to the denoiser.
            latents: states as the pipeline takes them, `[n, ...]`.
            timesteps: one for all, `[1]`; one each, `[1, n]`; or `[1, 2 n]` for pipelines that double the batch.
        """
        inner = getattr(self.pipeline, self.denoiser)
        parts = {} if network is inner else {self.denoiser: _Wrapped(inner, network)}
        scheduler = _Stages(self.pipeline.scheduler, timesteps, step=True)
        arguments = {**self._one_step, "latents": latents, **guidance}
        output: Tensor = self._run(
            self._view(), [""] * len(latents), arguments, encode_prompt=encode, scheduler=scheduler, **parts
        )
        return output

    def decoder_input(self, latents: Tensor, encode: Encode) -> Tensor:
        """The input of the autoencoder's decoder for final latents, in its own layout."""
        return self._decoding(latents, encode, vae=_Wrapped(self.pipeline.vae, decode=_reach))

    def decoder_output(self, latents: Tensor, encode: Encode) -> Tensor:
        """The autoencoder's output for final latents, before it is clamped."""
        processor = "image_processor" if hasattr(self.pipeline, "image_processor") else "video_processor"
        own = getattr(self.pipeline, processor)
        return self._decoding(
            latents, encode, **{processor: _Wrapped(own, postprocess=_reach, postprocess_video=_reach)}
        )

    def _decoding(self, latents: Tensor, encode: Encode, **parts: Any) -> Tensor:
        scheduler = _Stages(self.pipeline.scheduler, torch.empty(0, device=latents.device))
        arguments = {**self._one_step, "latents": latents, "output_type": "pt"}
        result: Tensor = self._run(
            self._view(), [""] * len(latents), arguments, encode_prompt=encode, scheduler=scheduler, **parts
        )
        return result

    def _view(self) -> Any:
        view: Any = object.__new__(self._view_class)
        view.__dict__.update(self.pipeline.__dict__, _progress_bar_config={"disable": True}, _view_device=self._device)
        return view

    def _run(self, view: Any, prompts: list[str], arguments: Mapping[str, Any], **parts: Any) -> Any:
        view.__dict__.update(parts)
        try:
            self._call(view, prompt=prompts, **{**self.arguments, **arguments})
        except _ReachedError as reached:
            return reached.value
        name = type(self.pipeline).__name__
        raise EtudeError(f"a {name} is not called as other pipelines are, so etude cannot run it stage by stage.")


_VIEWS: dict[type, type] = {}


def _view_class(kind: type) -> type:
    """The class of views of a pipeline: notes go into the view alone, and the device is the view's."""
    if kind in _VIEWS:
        return _VIEWS[kind]
    device = property(lambda self: self.__dict__["_view_device"])
    _VIEWS[kind] = type(kind.__name__, (kind,), {"__setattr__": object.__setattr__, "_execution_device": device})
    return _VIEWS[kind]


def _stop_with(value: Any) -> Callable[..., NoReturn]:
    return lambda *args, **kwargs: _reach(value)


class _Wrapped:
    """A part of a pipeline with some methods of ours, `__call__` among them as `call`; asked, it is the part."""

    def __init__(self, part: Any, call: Callable[..., Any] | None = None, **methods: Callable[..., Any]) -> None:
        self._part, self._called = part, call
        self.__dict__.update(methods)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._called or self._part)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


class _Stages:
    """A scheduler with the timesteps that it is given, each of any shape; the rest is the pipeline's own.

    Args:
        set_timesteps: ends the call when levels are asked for, with what it returns.
        step: ends the call at the first step, with the network's output.
    """

    order, init_noise_sigma = 1, 1.0

    def __init__(
        self,
        scheduler: Any,
        timesteps: Tensor | None = None,
        set_timesteps: Callable[[], Any] | None = None,
        step: bool = False,
    ) -> None:
        self._scheduler, self.timesteps = scheduler, timesteps
        self._on_levels, self._on_step = set_timesteps, step

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: Any = None,
        timesteps: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._on_levels is not None:
            _reach(self._on_levels())

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Nothing: there is one step at most."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._on_step:
            _reach(model_output)
        return (sample,)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)
