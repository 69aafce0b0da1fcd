"""Settings of a run that change its speed and at most the last bits: compilation, layout, TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from etude.config import TrainConfig
from etude.policies import TrainablePolicy
from etude.training.sizes import BatchSizes

WORTH_COMPILING = 20_000
"""Network evaluations in a run from which `compile: auto` compiles on a GPU: a choice, not a measurement."""
SMALL = 100_000_000
"""Parameters below which `compile: auto` takes CUDA graphs: a choice. With 2.4 million they are worth a factor of 3."""


def compilation(config: TrainConfig, device: torch.device, evaluations: int, parameters: int) -> tuple[str, str]:
    """The compilation of the network, `off`, `regional`, `full` or `graphs`, and the reason in words.

    `evaluations` is the number of network evaluations in the run, one image at one step each, and
    `parameters` that of the network's weights.
    """
    if config.compile != "auto":
        return config.compile, config.compile
    if device.type == "cpu":
        return "off", "auto: off on a CPU"
    if device.type == "cuda" and parameters < SMALL and config.objective.gradients == "replay":
        return "graphs", f"auto: graphs for {parameters:,} parameters, fewer than {SMALL:,}"
    how = "regional" if evaluations >= WORTH_COMPILING else "off"
    return how, f"auto: {how} for {evaluations:,} network evaluations, where {WORTH_COMPILING:,} are worth it"


def choose_compilation(config: TrainConfig, policy: TrainablePolicy, evaluations: int) -> str:
    """How the network will be compiled, of which the policy keeps the reason in words.

    Raises:
        EtudeError: the network, or its device, cannot be compiled so.
    """
    parameters = sum(parameter.numel() for parameter in policy.network.parameters())
    how, reason = compilation(config, policy.device, evaluations, parameters)
    if how != "off":
        policy.check_compile(how)
    policy.compilation = None if config.compile == "off" else reason
    return how


def choices(config: TrainConfig, policy: TrainablePolicy, sizes: BatchSizes) -> dict[str, Any]:
    """What the run chose by itself or was told beside the defaults, for its summary, by setting."""
    told = {
        "attention.backend": policy.attention.text(policy.device),
        "compile": policy.compilation,
        "autocast": None if config.autocast else f"off: {config.dtype} alone",
        "channels_last": config.channels_last,
        "tf32": config.tf32 and policy.device.type == "cuda",
        **sizes.state(),
    }
    return {name: value for name, value in told.items() if value}


@contextmanager
def matrix_products(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Context in which a GPU multiplies float32 matrices, and convolves, in TF32 if `tf32` is set."""
    if not config.tf32 or device.type != "cuda":
        yield
        return
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution
