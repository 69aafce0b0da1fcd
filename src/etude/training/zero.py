"""DeepSpeed's ZeRO, stages 1 and 2 (arXiv 1910.02054): every process has all weights, and optimises a part of the trained ones.

DeepSpeed strings the trained weights together and gives each process a range of the string, with a float32 copy and the moments of that
range, and in stage 2 its gradients. AdamW treats every number alone, so that its steps are those of a single process. It clips and steps
on its own, inside `accelerator.backward` of an optimiser step's last micro-batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, is_deepspeed_available
from torch import Tensor, nn

from etude.config import TrainConfig
from etude.errors import EtudeError


def wanted() -> bool:
    """Whether the launcher asks for DeepSpeed.

    Raises:
        EtudeError: it does, and DeepSpeed is not installed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return False
    if not is_deepspeed_available():
        raise EtudeError(
            "Accelerate's configuration asks for DeepSpeed, which is not installed: pip install deepspeed, or use DDP or FSDP2."
        )
    return True


def in_use(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed optimises."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def use_on_cpu(accelerator: Accelerator) -> None:
    """Lets DeepSpeed run on the CPU too, where Accelerate, which has it for accelerators only, would leave it out."""
    state, plugin = accelerator.state, DeepSpeedPlugin()
    plugin.set_mixed_precision("no")
    state.distributed_type = PartialState().distributed_type = DistributedType.DEEPSPEED
    state.deepspeed_plugins = {"default": plugin}
    plugin.select(_from_accelerator_state=True)


def configure(accelerator: Accelerator, config: TrainConfig) -> None:
    """Tells DeepSpeed what the recipe decides: the size of a micro-batch, when a step is taken, and the norm to clip to.

    Raises:
        EtudeError: its configuration or the recipe asks for what does not go together.
    """
    plugin = accelerator.state.deepspeed_plugin
    offloaded = plugin.deepspeed_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if plugin.zero_stage not in (1, 2):
        raise EtudeError(
            f"DeepSpeed's zero_stage = {plugin.zero_stage} is not supported: set it to 1 or 2 in Accelerate's configuration, or divide the "
            "network too by FSDP2."
        )
    if offloaded not in ("none", None):
        raise EtudeError(f"DeepSpeed's offload_optimizer_device = {offloaded} is not supported: set it to none.")
    if config.dtype == "float16":
        raise EtudeError(
            "dtype = float16 needs its losses scaled, and DeepSpeed takes a step before the scale is taken back: use bfloat16."
        )
    if config.optimizer.kind != "adamw":
        raise EtudeError(
            f"optimizer.kind = {config.optimizer.kind} cannot be divided by DeepSpeed: use adamw, whose moments it divides."
        )
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": config.objective.batch_size,
        "train_batch_size": config.objective.batch_size * accelerator.num_processes,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.max_grad_norm,
    }


def optimizer_tensors(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """What `checkpoint.optimizer_tensors` would say of a single process; all processes must call it."""
    state = optimizer.state.get(_own_range(optimizer), {})
    return {
        f"{name}.{key}": (_whole(accelerator, parameter, value) if value.ndim else value).to("cpu", copy=True)
        for name, parameter in parameters.items()
        for key, value in state.items()
    }


def take_up(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Restores what `optimizer_tensors` gave, and the float32 copies from the parameters, which hold the checkpoint's weights."""
    own = _own_range(optimizer)
    state: dict[str, Any] = {}
    for name, parameter in parameters.items():
        for weights, string in _places(parameter):
            own.data[string] = parameter.detach().flatten()[weights].to(own)
            for key in ("exp_avg", "exp_avg_sq") if tensors else ():
                moment = state.setdefault(key, torch.zeros_like(own))
                moment[string] = tensors[f"{name}.{key}"].flatten()[weights].to(own)
    if tensors:
        state["step"] = tensors[f"{next(iter(parameters))}.step"].clone()
    optimizer.state[own] = state


def _own_range(optimizer: torch.optim.Optimizer) -> Tensor:
    """This process's range of the string, which has taken the parameters' place in the optimiser."""
    (own,) = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return own


def _places(parameter: nn.Parameter) -> Iterator[tuple[slice, slice]]:
    """Where what this process optimises of a parameter lies: in the parameter, and in the process's range. Nothing if that is nothing."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is not None:
        weights, string = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield slice(weights.start, weights.start + weights.numel), slice(string.start, string.start + string.numel)


def _whole(accelerator: Accelerator, parameter: nn.Parameter, own: Tensor) -> Tensor:
    """The moments of one parameter, of which every process has a part in its range."""
    moments = torch.zeros(parameter.numel(), dtype=own.dtype, device=own.device)
    for weights, string in _places(parameter):
        moments[weights] = own[string]
    summed: Tensor = accelerator.reduce(moments, "sum")
    return summed.view_as(parameter)
