"""Trained tensors that no gradient can reach, since nothing reads what their layers compute.

Some networks end in a block that computes for the text as well as for the image, and return the
image alone: Qwen-Image's last `to_add_out` and `txt_mlp`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from etude.errors import EtudeError, brief_value
from etude.policies.outline import is_outline
from etude.sampling.shapes import Shapes

if TYPE_CHECKING:
    from etude.policies.trainable import TrainablePolicy


def unreached(policy: TrainablePolicy) -> list[str]:
    """Names of the trained tensors that are not in the graph of a prediction.

    It takes one evaluation of one sample, which keeps no activations. Empty for an outline of a
    network that computes with numbers.
    """
    x, timesteps = (
        each.to(policy.device) for each in (torch.zeros(1, *policy.latent_shape), policy.grid(4).timesteps[:1])
    )
    no_activations = torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda kept: kept)
    try:
        with Shapes() if is_outline(policy) else nullcontext(), torch.enable_grad(), no_activations:
            output = policy.predict(x, timesteps, policy.encode([""]), getattr(policy, "off", 1.0))
    except NotImplementedError:
        if is_outline(policy):
            return []
        raise
    nodes: list[Any] = [output.grad_fn]
    seen: set[Any] = {None}
    reached: set[int] = set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        reached.add(id(getattr(node, "variable", None)))
        nodes += [each for each, _ in node.next_functions]
    return [name for name, parameter in policy.trainable().items() if id(parameter) not in reached]


def check_reached(policy: TrainablePolicy) -> None:
    """Raises EtudeError: a layer that `lora.targets` names gets no gradient."""
    layers = sorted({name.partition(".lora_")[0] for name in unreached(policy)})
    if layers:
        named = ", ".join(brief_value(layer) for layer in layers[:3]) + (
            f" and {len(layers) - 3} more" if layers[3:] else ""
        )
        raise EtudeError(
            f"lora.targets: {named} of the {policy.denoiser} would get no gradient, since nothing reads what the last block computes "
            "there: leave the name out, or list the layers of the other blocks by their full names."
        )
