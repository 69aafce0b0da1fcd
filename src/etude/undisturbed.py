"""Code of others, which leaves the state that a process shares as it was.

A function or a module of a user may set torch's default dtype, switch gradients off, seed a global
generator, silence warnings, change the directory, or close the standard output. The run around it
would go on with that, and its results would change, or nobody would see them. `undisturbed` puts
everything back.
"""

from __future__ import annotations

import io
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

_lock = threading.Lock()
_inside = 0  # calls in any thread: what all threads share is put back after the last of them
_program: list[tuple[Callable[[Any], Any], Any]] = []
_left: list[Any] | None = None  # the program's generators, as they were left
_guests: list[Any] | None = None  # the generators as the code of others left them
_streams: list[Any] = []  # the program's standard output and error


class LentStream:
    """A stream for the code of others: what is written goes to the program's own, which nobody else can close."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stream)

    def close(self) -> None:
        self._stream.flush()

    def detach(self) -> Any:
        raise io.UnsupportedOperation("the stream belongs to the program")


@contextmanager
def undisturbed() -> Iterator[None]:
    """A context for code of others, after which the shared state is as it was before.

    This is the state of torch (default dtype and device, gradient and inference mode, autocast,
    number of threads, deterministic and precision flags, kernels of attention), of NumPy (errors),
    of Python (filters of warnings, working directory, standard output and error, recursion limit),
    and the global generators of all three. The code of others has a sequence of its own from these
    generators, which goes on from call to call and begins anew by `begin_draws`, or where the program
    draws or seeds. Closing the output or the error flushes it.

    Where such code runs in several threads at once, state that belongs to no single thread is put
    back after the last of them.
    """
    import numpy as np
    import torch

    global _inside, _guests, _left
    with ExitStack() as own:
        own.enter_context(np.errstate(**np.geterr()))
        grad, device = torch.is_grad_enabled(), torch.get_default_device()
        own.enter_context(torch.inference_mode(torch.is_inference_mode_enabled()))
        own.enter_context(torch.set_grad_enabled(grad))
        autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
        caching, depth = torch.is_autocast_cache_enabled(), _autocast_depth()
        with _lock:
            if _inside == 0:
                _program[:] = [(write, read()) for read, write in _switches()]
                _streams[:] = sys.stdout, sys.stderr
                sys.stdout, sys.stderr = (None if each is None else LentStream(each) for each in _streams)
                before = _generators()
                if _guests is not None and _same(before, _left):
                    _set_generators(_guests)
                _left = before
            _inside += 1
        try:
            yield
        finally:
            with _lock:
                _inside -= 1
                if _inside == 0:
                    sys.stdout, sys.stderr = _streams
                    for (write, value), (read, _) in zip(_program, _switches(), strict=True):
                        if read() != value:
                            write(value)
                    _guests = _generators()
                    _set_generators(_left or [])
            if torch.get_default_device() != device:
                torch.set_default_device(None if device.type == "cpu" else device)
            for kind, on, dtype in autocast:
                torch.set_autocast_enabled(kind, on)
                torch.set_autocast_dtype(kind, dtype)
            torch.set_autocast_cache_enabled(caching)
            if (left_open := _autocast_depth() - depth) > 0:
                for _ in range(left_open):
                    torch.autocast_decrement_nesting()
                torch.clear_autocast_cache()


def _autocast_depth() -> int:
    """Return how many autocast contexts are open: torch keeps its cast weights until the last one ends."""
    import torch

    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _switches() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Functions that read and write each setting of the process, generators apart."""
    import torch

    attention, cudnn = torch.backends.cuda, torch.backends.cudnn

    def flag(name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        return lambda: getattr(cudnn, name), lambda value: setattr(cudnn, name, value)

    return [
        (sys.getrecursionlimit, sys.setrecursionlimit),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        (_determinism, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])),
        (_precision, _set_precision),
        (attention.flash_sdp_enabled, attention.enable_flash_sdp),
        (attention.mem_efficient_sdp_enabled, attention.enable_mem_efficient_sdp),
        (attention.math_sdp_enabled, attention.enable_math_sdp),
        *(flag(name) for name in ("enabled", "benchmark", "deterministic")),
        (_warnings, _set_warnings),
        (_directory, _change_directory),
    ]


def _determinism() -> tuple[bool, bool]:
    import torch

    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


_ARITHMETIC = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


def _precision() -> list[str | None]:
    """The precision of float32 arithmetic: that of products, then by kind; None where torch has no such setting."""
    import torch

    with suppress(RuntimeError):  # torch's two ways to set it contradict each other
        return [torch.get_float32_matmul_precision(), *(getattr(kind, "fp32_precision", None) for kind in _kinds())]
    return []


def _set_precision(values: list[str | None]) -> None:
    import torch

    if values:
        torch.set_float32_matmul_precision(values[0] or "highest")
    for kind, value in zip(_kinds(), values[1:], strict=False):
        if value is not None:
            kind.fp32_precision = value


def _kinds() -> list[Any]:
    import torch

    def find(path: str) -> Any:
        part: Any = torch.backends
        for name in path.split("."):
            part = getattr(part, name, None)
        return part

    return [find(path) for path in _ARITHMETIC]


def _warnings() -> tuple[Any, ...]:
    return [*warnings.filters], warnings.showwarning, warnings.formatwarning


def _set_warnings(value: tuple[Any, ...]) -> None:
    warnings.resetwarnings()  # also makes Python forget which warnings it has shown
    warnings.filters[:], warnings.showwarning, warnings.formatwarning = value  # type: ignore[index]


def _directory() -> str | None:
    with suppress(OSError):
        return os.getcwd()
    return None


def _change_directory(path: str | None) -> None:
    if path is not None:
        with suppress(OSError):
            os.chdir(path)


def _generators() -> list[Any]:
    """The states of the global generators of Python, NumPy and torch."""
    import numpy as np
    import torch

    states: list[Any] = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else states


def _set_generators(states: list[Any]) -> None:
    import numpy as np
    import torch

    writers: tuple[Callable[[Any], Any], ...] = (
        random.setstate,
        np.random.set_state,
        torch.set_rng_state,
        torch.cuda.set_rng_state,
    )
    for state, write in zip(states, writers, strict=False):
        write(state)


def _same(states: list[Any], others: list[Any] | None) -> bool:
    """Whether the generators are in the same states; one that is new since counts for nothing."""
    return others is not None and all(_plain(a) == _plain(b) for a, b in zip(states, others, strict=False))


def _plain(state: Any) -> Any:
    """A state that can be compared: NumPy's and torch's hold arrays."""
    if isinstance(state, tuple):
        return state if isinstance(state[1], tuple) else (state[1].tobytes(), *state[2:])
    return state.numpy().tobytes()


def begin_draws() -> None:
    """Lets the code of others begin anew with its draws, where the program's generators are now."""
    global _guests
    with _lock:
        _guests = None
