"""The time of one iteration by part, and by operation of torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from benchmarks.bare import _adapters_off
from etude.policies.pipeline import PipelinePolicy
from etude.training.trainer import Trainer

SAMPLING, REFERENCE, FORWARD = "rollout: network", "rollout: network without the adapter", "replay: network, forward"
BACKWARD, DECODE = "replay: network, backward", "rollout: autoencoder"
CLIP, STEP, SAVE = "replay: clipping", "replay: optimiser", "checkpoint"
GROUPS = {
    "matrix products": r"aten::(mm|addmm|bmm|baddbmm)",
    "convolutions": r".*convolution.*",
    "attention": r".*(scaled_dot_product|softmax).*",
    "normalisation": r".*_norm.*",
    "copies": r"aten::(copy_|cat|clone|index|stack|_to_copy|contiguous|index_put_|upsample\w+)",
    "arithmetic by element": r"aten::(mul|add|sub|div|neg|pow|exp|log|sqrt|rsqrt|sum|mean|gelu|silu|tanh|maximum|clamp|sin|cos)_?(_backward)?",
}
"""Groups of operations by a pattern of their names; the first that fits counts."""
OTHERS = "other operations"


class Stopwatch:
    """Seconds by the name of a part, read from the clock `now`."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.seconds, self._started = now, dict[str, float](), 0.0

    def start(self, *ignored: Any) -> None:
        self._started = self.now()

    def stop(self, part: str) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - self._started

    @contextmanager
    def on(self, owner: Any, method: str, part: str) -> Iterator[None]:
        """Context in which the calls of a method are timed."""
        original = getattr(owner, method)

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.start()
            result = original(*args, **kwargs)
            self.stop(part)
            return result

        setattr(owner, method, timed)
        try:
            yield
        finally:
            delattr(owner, method)  # deletes the instance's attribute, so that the class's method applies again

    @contextmanager
    def on_network(self, network: nn.Module) -> Iterator[None]:
        """Context in which the calls of a network are timed."""

        def stop(module: nn.Module, *ignored: Any) -> None:
            self.stop(FORWARD if torch.is_grad_enabled() else REFERENCE if _adapters_off(module) else SAMPLING)

        hooks = [network.register_forward_pre_hook(self.start), network.register_forward_hook(stop)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def profile(trainer: Trainer, iterate: Callable[[], float], now: Callable[[], float]) -> dict[str, Any]:
    """Seconds of one iteration by part, and of another one by group of operations."""
    policy, watch = trainer.policy, Stopwatch(now)
    assert isinstance(policy, PipelinePolicy)
    methods = [
        (policy.pipeline.vae, "decode", DECODE),
        (trainer.accelerator, "backward", BACKWARD),
        (trainer.accelerator, "clip_grad_norm_", CLIP),
        (trainer.learner.optimizer, "step", STEP),
        (trainer.durability, "save", SAVE),
    ]
    with ExitStack() as stack:
        stack.enter_context(watch.on_network(policy._trained_network))
        for owner, method, part in methods:
            stack.enter_context(watch.on(owner, method, part))
        total = iterate()
    return {
        "seconds": total,
        "phases": dict(trainer.supervisor.seconds),
        "parts": watch.seconds,
        **_operations(iterate),
    }


def _operations(iterate: Callable[[], float]) -> dict[str, Any]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        total = iterate()
    seconds = dict.fromkeys((*GROUPS, OTHERS), 0.0)
    for event in profiler.key_averages():
        seconds[group_of(event.key)] += event.self_cpu_time_total / 1e6
    return {"operations": seconds, "operations_seconds": total}


def group_of(operation: str) -> str:
    """The group of an operation, by its name in torch's profiler."""
    return next((group for group, pattern in GROUPS.items() if re.fullmatch(pattern, operation)), OTHERS)
