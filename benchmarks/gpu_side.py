"""One model of real size on the accelerator: an iteration by phase, its network calls alone, FLOPs and memory."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_size import MODELS, random_pipeline, save_outline
from benchmarks.gpu import with_settings
from benchmarks.protocol import peak_bytes, serve
from etude.config import parse_config
from etude.policies.loading import DTYPES, load_source
from etude.policies.source import ModelSource
from etude.registry import POLICIES
from etude.training.blueprint import Blueprint
from etude.training.memory_estimate import IN_ALL, memory_estimate, network_call
from etude.training.trainer import Trainer

MATRIX = 8192
"""Side of the matrices whose product gives the device's own rate."""
TINY_MATRIX = 256


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Callable[..., dict[str, Any]]]]:
    """Imports the libraries; `measure` builds the model, trains, and reports on its later iterations.

    Args:
        settings: `model` (of `full_size.MODELS`, or an embedded one), `tiny`, `dtype`, `config` (a recipe's tree
            without its model).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    info = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "peft")},
    }
    return info, {"measure": lambda: _measure(settings, device)}


def _measure(settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    model, tiny, dtype = settings["model"], settings["tiny"], settings["dtype"]
    tree, policy, started = {**settings["config"], "model": model}, None, time.perf_counter()
    if model in MODELS:
        tree["dtype"] = dtype
        pipeline = random_pipeline(model, device, DTYPES[dtype], tiny)
        policy = POLICIES.get(type(pipeline).__name__)(pipeline, DTYPES[dtype], device, tree["resolution"])
    build = time.perf_counter() - started
    rate = _rate(device, TINY_MATRIX if tiny else MATRIX)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        trainer = Trainer(parse_config(tree), Path(folder) / "run", policy=policy)
        forget_trials(trainer)
        trainer.train()
        peak = peak_on(device)
        rows = [json.loads(line) for line in (trainer.out / "metrics.jsonl").read_text().splitlines()]
        plain = trainer.config.compile == "off" and trainer.config.objective.gradients == "replay"
        return {
            "build_seconds": build,
            "rate": rate,
            "phases": _phases(rows),
            "peak_bytes": peak,
            "estimated_bytes": estimated_bytes(tree, trainer, Path(folder), tiny) if model in MODELS else 0,
            "sizes": {batch.setting: batch.size for batch in trainer.sizes.automatic},
            "network": _network(trainer) if plain else {},
        }


def forget_trials(trainer: Trainer) -> None:
    """Lets the peak of a GPU's memory begin after the sizes of calls have been tried out, or now if they are given."""
    if trainer.policy.device.type != "cuda":
        return
    torch.cuda.reset_peak_memory_stats()
    agree = trainer.sizes.agree

    def then_forget(accelerator: Accelerator) -> None:
        agree(accelerator)
        torch.cuda.reset_peak_memory_stats()

    trainer.sizes.agree = then_forget  # type: ignore[method-assign]


def _phases(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each phase: the median of the iterations after the first, which loads kernels and compiles."""
    each = [row["seconds"] for row in rows[2:]]
    return {name: median(seconds[name] for seconds in each if name in seconds) for name in each[-1]}


def estimated_bytes(tree: dict[str, Any], trainer: Trainer, folder: Path, tiny: bool) -> int:
    """Bytes that a dry run tells for the sizes that the run found."""
    return told_bytes(with_settings(tree, trainer.sizes.state()), tree["model"], folder, tiny)


def told_bytes(tree: dict[str, Any], model: str, folder: Path, tiny: bool = False) -> int:
    """Bytes in all that a dry run tells for a model of `full_size.MODELS`, from an outline of it on the CPU."""
    outlined = {**tree, "model": str(save_outline(model, folder / "model", tiny))}
    blueprint = Blueprint(parse_config(outlined), folder / "estimated")
    outline = load_source(ModelSource.of(blueprint.config), outline=True)
    schedule = blueprint.schedule(outline)
    blueprint.make_trainable(outline)
    return memory_estimate(blueprint, outline, schedule)[IN_ALL]


def peak_on(device: torch.device) -> int:
    """Peak memory of the device's tensors, on a CPU of the process."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_bytes()


def _network(trainer: Trainer) -> dict[str, dict[str, float]]:
    """FLOPs and seconds of all network calls of an iteration, made alone, by phase."""
    policy, table, config = trainer.policy, trainer.schedule.table_at(1), trainer.config
    conditioning = policy.encode(trainer.train_prompts.texts[:1])
    call = network_call(policy, table, conditioning, config.sampling.guidance_scale)
    trained, images = list(trainer.parameters.values()), len(trainer.learner.indices)
    pairs = sum(len(rows) for rows, _ in trainer.learner.pairs(len(table.trained_steps), 1))

    def replay(count: int) -> tuple[Tensor, ...]:
        loss = call(count).square().mean()
        with policy.attention.allowed(policy.device, policy.denoiser):
            return torch.autograd.grad(loss, trained)

    counts = {
        "rollout": (torch.no_grad()(call), min(trainer.sizes.rollout.size, images), images * table.num_evaluations),
        "update": (replay, min(trainer.sizes.replay.size, pairs), pairs),
    }
    report = {}
    for phase, (work, size, rows) in counts.items():
        with FlopCounterMode(display=False) as counter:
            work(1)
        seconds = _seconds(partial(work, size), policy.device)
        report[phase] = {
            "flops": counter.get_total_flops() * rows,
            "seconds": seconds / size * rows,
            "rows": rows,
            "size": size,
        }
    return report


def _seconds(work: Callable[[], Any], device: torch.device, repeats: int = 2) -> float:
    """Seconds of one call: the fastest of some, after the device has finished."""

    def once() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return min(once() for _ in range(repeats))


def _rate(device: torch.device, side: int) -> float:
    """FLOP/s of a product of two bfloat16 matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / _seconds(lambda: a @ b, device, 10)


if __name__ == "__main__":
    serve(start)
