"""One attention call, forward and backward, by one kernel: whether it fails, gives no numbers, or how long it takes.

A process of its own, because a kernel that accesses memory it must not ends all work on the device:
`python -m benchmarks.attention_side '{"kernel": "cudnn", "shape": [4, 24, 1536, 128]}'`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from etude.policies.attention import KERNELS


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Calls it as diffusers does, and compares result and gradients with float32 arithmetic.

    Args:
        settings: `kernel` (of `KERNELS`), `shape` [n, heads, tokens, width]; `keys`, number of keys if
            they are others than the queries; `layout`: "heads first" (contiguous) or "tokens first" (a
            transposed view, as after a linear layer); `dtype`; `slope`: "heads first" or
            "tokens first", the layout of the gradient that arrives; `only`: which of q, k, v need a gradient.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, heads, tokens, width = settings["shape"]
    keys, dtype = settings.get("keys", tokens), getattr(torch, settings.get("dtype", "bfloat16"))
    generator = torch.Generator(device).manual_seed(0)

    def drawn(count: int, layout: str) -> Tensor:
        size = (rows, heads, count, width) if layout == "heads first" else (rows, count, heads, width)
        value = torch.randn(size, generator=generator, device=device, dtype=dtype)
        return value if layout == "heads first" else value.transpose(1, 2)

    layout, only = settings.get("layout", "tokens first"), settings.get("only", "qkv")
    q, k, v = (
        drawn(count, layout).requires_grad_(name in only)
        for name, count in zip("qkv", (tokens, keys, keys), strict=True)
    )
    slope = drawn(tokens, settings.get("slope", "tokens first"))
    wanted = [tensor for tensor in (q, k, v) if tensor.requires_grad]
    report: dict[str, Any] = {**settings, "torch": torch.__version__}
    try:
        with sdpa_kernel(KERNELS[settings["kernel"]]):
            output = scaled_dot_product_attention(q, k, v)
            found = [output, *torch.autograd.grad(output, wanted, slope)]
            _wait(device)
            started = time.perf_counter()
            again = scaled_dot_product_attention(q, k, v)
            torch.autograd.grad(again, wanted, slope)
            _wait(device)
        report["milliseconds"] = 1e3 * (time.perf_counter() - started)
    except RuntimeError as error:
        return {**report, "error": str(error).strip().splitlines()[0][:200]}
    with sdpa_kernel(KERNELS["math"]):
        first = slice(0, 1)
        exact = [tensor[first].detach().float().requires_grad_(tensor.requires_grad) for tensor in (q, k, v)]
        truth = scaled_dot_product_attention(exact[0], exact[1], exact[2])
        gradients = torch.autograd.grad(truth, [t for t in exact if t.requires_grad], slope[first].float())
    errors = [
        ((ours[first].float() - right).norm() / right.norm()).item()
        for ours, right in zip(found, [truth, *gradients], strict=True)
    ]
    return {**report, "finite": all(bool(t.isfinite().all()) for t in found), "relative_error": max(errors)}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
