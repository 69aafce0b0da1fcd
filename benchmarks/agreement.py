"""The agreement of rollout and replay in nats a step: precision and batch shape, before any weight has moved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.results import Headline, Ratio, Result
from etude.config import load_config
from etude.policies.loading import DTYPES, load_policy
from etude.policies.trainable import TrainablePolicy
from etude.prompts import load_prompts
from etude.sampling.kernels import make_kernel
from etude.sampling.model import Conditioning
from etude.sampling.noise import NoiseSource
from etude.sampling.paths import to_x0_eps
from etude.sampling.plans import SamplingPlan, StepTable
from etude.sampling.replay import replay
from etude.sampling.rollout import rollout

FULL = "float32"
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
LARGEST_ERROR = 16.0
"""Bound on the relative error of the guided output of the network in half precision, in units of its roundoff."""


@dataclass(frozen=True)
class Case:
    """A rollout in a precision, with so many rows in a call, and as many pairs in one of the replay."""

    dtype: str
    rows: int
    pairs: int

    @property
    def label(self) -> str:
        return f"{self.rows} / {self.pairs}"


IMAGES = 3
"""Few, since a CPU without half-precision arithmetic takes many times as long."""
CASES = (Case(FULL, 3, 3), Case(FULL, 3, 2), Case("bfloat16", 3, 3), Case("float16", 3, 3))


def run(recipes: list[str], threads: int | None, seed: int = 0) -> Result:
    """Replays rollouts of each recipe's model under its sampler, every step stochastic, in each case."""
    if threads is not None:
        torch.set_num_threads(threads)
    found, rows, heads = {}, [], []
    for recipe in recipes:
        config = load_config(recipe)
        policy, sampling = load_policy(config.model), config.sampling
        steps, eta = sampling.num_steps, sampling.all_etas[0]
        plan = SamplingPlan.sde(steps, make_kernel(sampling.kernel, eta), first_step=sampling.first_step)
        table = plan.tabulate(policy.grid(steps)).to(policy.device)
        conditioning = policy.encode(load_prompts(config.prompts.train).texts[:IMAGES])
        for case in CASES:
            numbers = measure(policy, table, conditioning, sampling.guidance_scale, case, seed)
            found[f"{recipe} {case.dtype} {case.label}"] = numbers
            error = numbers["error"] / UNIT_ROUNDOFF[case.dtype]
            cells = [f"{numbers[key]:.2g}" for key in ("mean", "largest", "expected")]
            rows.append([recipe, case.dtype, case.label, *cells, f"{error:.2g}"])
            name = f"{recipe}, rollout in {case.dtype}, {case.label} rows"
            if case.dtype != FULL:
                ratio = Ratio.of([error], [1.0])
                heads.append(Headline(f"{name}: error of the network's output / unit roundoff", ratio, LARGEST_ERROR))
            elif case.rows == case.pairs:
                heads.append(Headline(f"{name}: nats a step, largest", Ratio.of([numbers["largest"]], [1.0]), 0.0))
    columns = ["recipe", "rollout", "rows of a call, rollout / replay", "nats a step, mean", "largest", "expected mean"]
    settings = {"images": IMAGES, "seed": seed, "threads": torch.get_num_threads()}
    return Result("agreement", heads[0], [*columns, "error / unit roundoff"], rows, settings, found, further=heads[1:])


@torch.no_grad()
def measure(
    policy: TrainablePolicy, table: StepTable, conditioning: Conditioning, guidance: float, case: Case, seed: int
) -> dict[str, Any]:
    """Nats a step: mean and largest distance, and sqrt(2 / pi) k from the means; the output's largest relative error."""
    noise, dtype = NoiseSource(seed, "training", 1), DTYPES[case.dtype] if case.dtype != FULL else None
    with policy.precision(dtype):
        path = rollout(
            policy, table, conditioning, noise, list(range(IMAGES)), guidance, case.rows, "sum", keep_means=True
        )
    pairs = torch.arange(IMAGES * len(path.steps))
    row, column = pairs % IMAGES, pairs // IMAGES  # as the rollout calls: all images of a step together
    nats, k, errors = [], [], []
    for r, c in zip(row.split(case.pairs), column.split(case.pairs), strict=True):
        step, target = replay(policy, table, path, r, c, conditioning, guidance, with_gradient=False)
        nats.append((step.log_prob(target, "sum") - path.log_prob[r, c]).double())
        assert path.mean is not None
        distance = (step.mean - path.mean[r, c]).flatten(1).norm(dim=1)
        k.append((distance / step.std.flatten()).double())
        x, at = path.states[r, path.level_index[c]], path.step_index[c]
        output = policy.predict(x, table.timesteps[at], conditioning.take(r), guidance)
        errors.append(distance / (slope(policy, table)[at].abs() * output.flatten(1).norm(dim=1)))
    expected = math.sqrt(2 / math.pi) * torch.cat(k).mean().item()
    distances, error = torch.cat(nats).abs(), torch.cat(errors).max().item()
    return {"mean": distances.mean().item(), "largest": distances.max().item(), "expected": expected, "error": error}


def slope(policy: TrainablePolicy, table: StepTable) -> torch.Tensor:
    """The derivative of each step's mean by the network's output, `[N]`."""
    one = torch.ones_like(table.x0)
    x0, eps = to_x0_eps(one, torch.zeros_like(one), table.a[:-1], table.s[:-1], policy.prediction_type)
    return table.x0 * x0 + table.eps * eps
