"""Trains several small runs one after another, alone or as one of several processes, and keeps what each process saw.

`torchrun ... two_process_driver.py DIRECTORY NAME...` trains the runs of those names in DIRECTORY, `NAME=OTHER` under another name, or
goes on with those that are there. With DIE_AT=n the first process of a run kills itself when it is to score its n-th batch of images. In
the run `ddpo-signalled` the second one gets SIGTERM, whereupon the run is resumed; in `ddpo-memory` it has
little memory; in `ddpo-failing` its reward fails; and somebody else writes `ddpo-locked`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch import Tensor

from etude.config import TrainConfig
from etude.errors import EtudeError
from etude.files import locked
from etude.policies import Policy
from etude.policies.sharding import sharded
from etude.training import trainer as trainer_module
from etude.training.processes import make_accelerator
from etude.training.supervision import Interrupted
from etude.training.trainer import Trainer
from support.figures import leave_figures_out
from support.tiny import save_flux, save_stable_diffusion
from support.tiny_flow import ernie_image, z_image

BATCHES: list[tuple[list[str], Tensor]] = []
RUNS: dict[str, dict[str, Any]] = {
    "ddpo-lora": {"lora": {"rank": 4}},
    "ddpo-full": {"lora": {"rank": 0}, "ema": {"decay": 0.5}, "iterations": 2},
    "mixgrpo-lora": {"lora": {"rank": 4}, "iterations": 3},
    "mixgrpo-full": {"lora": {"rank": 0}, "iterations": 2},
    "mixgrpo-z-image": {"model": "z-image", "iterations": 2, "resolution": 16},
    "ddpo-memory": {"lora": {"rank": 4}, "iterations": 2},
    "ddpo-locked": {"lora": {"rank": 4}},
    "ddpo-failing": {"lora": {"rank": 4}, "iterations": 3, "evaluation": {"every": 2}, "checkpoint": {"every": 3}},
    "ddpo-signalled": {"lora": {"rank": 4}, "checkpoint": {"every": 4}},
    "nft-lora": {
        "iterations": 2,
        "sampling": {"solver": "ddim"},
        "objective": {
            "kind": "nft",
            "options": {"beta": 0.5, "levels": 2, "old_rate": 0.2},
            "clip_range": 1e-4,
            "clip_nats": None,
            "kl_coef": 0.1,
        },
    },
    "dpo-lora": {
        "iterations": 2,
        "sampling": {"solver": "ddim"},
        "rollout": {"images_per_prompt": 2},
        "advantage": {"kind": "group"},
        "objective": {"kind": "dpo", "options": {"levels": 2, "beta": 200.0}, "clip_range": 1e-4, "clip_nats": None},
    },
    "fsdp-lora": {"lora": {"rank": 4}, "iterations": 2, "ema": {"decay": 0.5}, "checkpoint": {"best": "bright"}},
    "fsdp-full": {"lora": {"rank": 0}, "iterations": 2, "objective": {"kl_coef": 0.1}},
    "fsdp-ernie-image": {
        "model": "ernie-image",
        "resolution": 16,
        "lora": {"rank": 4},
        "iterations": 2,
        "objective": {"timestep_fraction": 0.5},  # so that the processes have other numbers of distinct timesteps
    },
}
"""A prefix names the algorithm: `nft` and `dpo` take DDPO's settings but for their own, and `fsdp` is DDPO with the network in parts where
there are several processes, which Accelerate remembers to the end of the process: those runs stand last."""
LAYERS = {"fsdp-ernie-image": "ErnieImageSharedAdaLNBlock"}
"""Classes of the layers that are held in parts, where they are not those of the launch."""
DDPO = {
    "model": "sd",
    "rollout": {"images_per_iteration": 8, "batch_size": 4},
    "objective": {"updates_per_epoch": 2, "batch_size": 8},
    "advantage": {"min_count": 4},
}
# Three groups of four for two processes: the second group is divided.
MIXGRPO = {
    "model": "flux",
    "sampling": {"window": {"strategy": "random", "size": 2}},
    "rollout": {"images_per_iteration": 12, "images_per_prompt": 4, "shared_noise": True, "batch_size": 6},
    "objective": {"updates_per_epoch": 3, "batch_size": 8},
    "advantage": {"kind": "group"},
}


def sharded_on_cpu(config: TrainConfig, out: Path) -> Accelerator:
    """The accelerator of a run that asks for FSDP, which Accelerate has for accelerators only, on CPUs."""
    wanted = os.environ.pop("ACCELERATE_USE_FSDP", "false")
    accelerator = make_accelerator(config, out)
    if wanted == "true" and accelerator.num_processes > 1:
        os.environ["ACCELERATE_USE_FSDP"] = wanted
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # The plugin looks at the type where it is used, and at nothing that a CPU lacks.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    return accelerator


def bright(images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
    """The share of the numbers in each picture above the middle: one last bit seldom matters to it."""
    BATCHES.append((list(prompts), images.clone()))
    for variable, rank, number in (("DIE_AT", "0", signal.SIGKILL), ("SIGNAL_AT", "1", signal.SIGTERM)):
        if len(BATCHES) == int(os.environ.get(variable, "0")) and os.environ.get("RANK") == rank:
            os.kill(os.getpid(), number)
    if len(BATCHES) == int(os.environ.get("FAIL_AT", "0")) and os.environ.get("RANK") == "1":
        raise RuntimeError("the scorer of one process is gone")
    return (images >= 128).float().mean((1, 2, 3))


def make_models(root: Path) -> None:
    """What the runs in `root` start from."""
    save_stable_diffusion(root / "sd")
    save_flux(root / "flux")
    z_image().save_pretrained(root / "z-image")
    ernie_image().save_pretrained(root / "ernie-image")
    (root / "prompts.txt").write_text("red heart\npizza\ntiger\n")


def config(root: Path, name: str) -> TrainConfig:
    """The settings of a run.

    AdamW divides each gradient by its own size, so that at the usual epsilon the gradients that are zero but for rounding take steps as long
    as the others, to either side by chance. The epsilon here is well above such gradients, and below those that matter.
    """
    tree: dict[str, Any] = {
        "iterations": 4,
        "rewards": {"support.two_process_driver:bright": 1.0},
        "prompts": {"train": str(root / "prompts.txt"), "evaluation": str(root / "prompts.txt")},
        "sampling": {"eta": 1.0, "num_steps": 4, "guidance_scale": 3.0},
        "objective": {"clip_range": None, "clip_nats": 1.6},
        "optimizer": {"learning_rate": 3e-3, "epsilon": 3e-3},
        "evaluation": {"every": 4, "num_images": 4, "grid_images": 2},
        "checkpoint": {"every": 1},
    }
    own = json.loads(json.dumps(RUNS[name]).replace('"bright"', '"support.two_process_driver:bright"'))
    for part in (MIXGRPO if name.startswith("mixgrpo") else DDPO, own):
        for key, value in part.items():
            tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return TrainConfig(**{**tree, "model": str(root / tree["model"])})


def train(root: Path, name: str, out: Path, resume: bool = False) -> dict[str, Tensor]:
    """One run, and what this process saw of it beside it; returns the trained weights before and after, for a run in one piece."""
    BATCHES.clear()
    trainer = Trainer(config(root, name), out, resume=resume)
    if name == "ddpo-memory" and os.environ.get("RANK") == "1":
        _take_memory(trainer.policy)
    assert sharded(trainer.parameters) == (name.startswith("fsdp") and trainer.accelerator.num_processes > 1)
    before = {f"before/{n}": p.detach().clone() for n, p in trainer.parameters.items()}
    trainer.train()
    rank = trainer.accelerator.process_index
    sizes = [trainer.rollout_batches.size, trainer.learner.micro_batches.size]
    Path(f"{out}-sizes-{rank}.json").write_text(json.dumps(sizes))
    save_file({"images": torch.cat([images for _, images in BATCHES]).contiguous()}, f"{out}-images-{rank}.safetensors")
    Path(f"{out}-prompts-{rank}.json").write_text(json.dumps([prompt for prompts, _ in BATCHES for prompt in prompts]))
    return before | {f"after/{n}": p.detach().clone() for n, p in trainer.parameters.items()}


def _take_memory(policy: Policy) -> None:
    """Leaves memory for two samples at a time."""
    predict = policy.predict

    def cramped(x: Tensor, *told: Any) -> Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError(f"no room for {len(x)}")
        return predict(x, *told)

    policy.predict = cramped  # type: ignore[method-assign]


def _refused(root: Path, name: str, out: Path) -> None:
    """What this process is told of a run that somebody else writes, or whose second process fails in the evaluation after iteration 2."""
    out.mkdir(exist_ok=True)
    os.environ["FAIL_AT"] = "5"
    with locked(out) if name == "ddpo-locked" and os.environ["RANK"] == "0" else nullcontext():
        try:
            train(root, name, out)
        except EtudeError as error:
            Path(f"{out}-told-{os.environ['RANK']}.txt").write_text(str(error))
    del os.environ["FAIL_AT"]


def _interrupted(root: Path, name: str, out: Path) -> None:
    """Begins a run, which the signal ends in its third iteration, and keeps what this process was told."""
    os.environ["SIGNAL_AT"] = "5"
    try:
        train(root, name, out)
    except Interrupted as end:
        Path(f"{out}-told-{os.environ['RANK']}.txt").write_text(str(end))
    del os.environ["SIGNAL_AT"]


def main(root: Path, names: list[str]) -> None:
    """The runs of those names in one group of processes, which outlives each of them."""
    torch.distributed.init_process_group("gloo")
    trainer_module.make_accelerator = sharded_on_cpu
    for place in names:
        name, _, other = place.partition("=")
        # The launcher's configuration asks for FSDP, and says how.
        os.environ["ACCELERATE_USE_FSDP"] = str(name.startswith("fsdp")).lower()
        if name in LAYERS:
            os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = LAYERS[name]
        out = root / "two" / (other or name)
        if name in ("ddpo-locked", "ddpo-failing"):
            _refused(root, name, out)
            continue
        try:
            if name == "ddpo-signalled":
                _interrupted(root, name, out)
            weights = train(root, name, out, resume=out.is_dir())
        except EtudeError as error:
            sys.exit(f"error: {error}")
        if os.environ["RANK"] == "0" and not name.startswith("fsdp"):
            save_file(weights, out.with_suffix(".safetensors"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    from support import two_process_driver  # the module that the reward's name means

    warnings.simplefilter("ignore")
    leave_figures_out()
    two_process_driver.main(Path(sys.argv[1]), sys.argv[2:])
