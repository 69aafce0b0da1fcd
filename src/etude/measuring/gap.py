"""The reward gap and the improvement, paired on prompt and initial noise.

    reward gap  = E r(ODE samples of the tuned model) - E r(SDE_eta samples of the tuned model)
    improvement = E r(ODE samples of the tuned model) - E r(ODE samples of the base model)

Every sampler gets the same weights, prompts, steps, guidance and initial noise, so the difference is taken image by image and
its interval is that of a mean of differences, clustered by prompt (images of one prompt are not independent).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from etude.batching import MicroBatch
from etude.errors import EtudeError
from etude.measuring.statistics import mean_summary, paired_summary
from etude.policies import TrainablePolicy, load_policy
from etude.prompts import PromptSet, load_prompts
from etude.rewards import WeightedRewards
from etude.sampling.etas import Eta
from etude.sampling.kernels import make_kernel
from etude.sampling.noise import NoiseSource
from etude.sampling.plans import SamplingPlan
from etude.sampling.rollout import rollout

Scores = dict[str, np.ndarray]
Progress = Callable[[int], None]


def _silent(images: int) -> None:
    """The progress callback of those who do not watch."""


@dataclass(frozen=True)
class Protocol:
    """How a policy is measured: everything that two measurements must share to be compared.

    Attributes:
        prompts: distinct held-out prompts; image i shows prompt i modulo their number.
        score: images, prompts and their metadata to every reward's scores.
        num_images: images per sampler.
        kernel: of the stochastic samplers.
        seed: keys the noise, the same in every measurement of a run.
        stream: of the noise; another one is fresh noise under the same seed.
        first_step: what becomes of a stochastic sampler's step out of pure noise: "ode", "sde" or "capped" (see
            `SamplingPlan`).
    """

    prompts: PromptSet
    score: Callable[[Tensor, list[str], Mapping[str, list[Any]]], dict[str, Tensor]]
    num_images: int
    guidance_scale: float
    kernel: str = "gddim"
    seed: int = 0
    batch_size: int | MicroBatch = 32
    first_step: str = "ode"
    stream: str = "evaluation"

    def shown(self, samples: Iterable[int] | None = None) -> PromptSet:
        """The prompt of each image: of all, or of those with the indices `samples`."""
        chosen = range(self.num_images) if samples is None else samples
        return self.prompts.select(i % len(self.prompts) for i in chosen)

    @property
    def clusters(self) -> list[int]:
        """Which prompt each image shows: images of one prompt are one cluster of the bootstrap."""
        return [i % len(self.prompts) for i in range(self.num_images)]

    def plan(self, eta: Eta, num_steps: int) -> SamplingPlan:
        """Every step under the kernel at that eta, or at its own of a list; 0 is the ODE."""
        if not isinstance(eta, int | float):
            return SamplingPlan.from_etas(
                eta, partial(make_kernel, self.kernel), trained=False, first_step=self.first_step
            )
        if eta == 0:
            return SamplingPlan.ode(num_steps)
        return SamplingPlan.sde(num_steps, make_kernel(self.kernel, eta), trained=False, first_step=self.first_step)

    def images(
        self,
        policy: TrainablePolicy,
        eta: Eta,
        num_steps: int,
        on_step: Progress = _silent,
        samples: Sequence[int] | None = None,
    ) -> Tensor:
        """uint8 `[n, 3, h, w]` under the sampler of that eta (0: the ODE): all images, or those with the indices `samples`."""
        chosen = list(range(self.num_images) if samples is None else samples)
        table = self.plan(eta, num_steps).tabulate(policy.grid(num_steps)).to(policy.device)
        noise, conditioning = NoiseSource(self.seed, self.stream), policy.encode(self.shown(chosen).texts)
        trajectory = rollout(
            policy, table, conditioning, noise, chosen, self.guidance_scale, self.batch_size, on_step=on_step
        )
        return policy.decode(trajectory.latents)

    def scores(self, images: Tensor, samples: Sequence[int] | None = None) -> Scores:
        """Every reward of every image."""
        shown = self.shown(samples)
        scores = self.score(images, shown.texts, shown.metadata)
        return {name: values.double().numpy() for name, values in scores.items()}


def summarise(ode: Scores, sde: Scores, base: Scores | None, clusters: list[int]) -> dict[str, Any]:
    """Estimates by quantity and reward: `ode`, `sde`, `gap`, and `improvement` where the base model's scores are given."""
    result: dict[str, Any] = {
        "ode": {r: mean_summary(v, clusters).to_dict() for r, v in ode.items()},
        "sde": {r: mean_summary(v, clusters).to_dict() for r, v in sde.items()},
        "gap": {r: paired_summary(v - sde[r], clusters).to_dict() for r, v in ode.items()},
    }
    if base is not None:
        result["improvement"] = {r: paired_summary(v - base[r], clusters).to_dict() for r, v in ode.items()}
    return result


@dataclass(frozen=True)
class GapReport:
    """What `reward_gap` found.

    Attributes:
        rows: one per (steps, eta, reward): `num_steps`, `eta`, `reward` and the estimates `ode`, `sde`, `gap`, and `improvement`
            where an adapter was given. An estimate is a dict of mean, standard_error, low, high (95 % bootstrap), n.
        settings: everything needed to measure it again.
    """

    rows: list[dict[str, Any]]
    settings: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps({"settings": self.settings, "rows": self.rows}, indent=2) + "\n"


def reward_gap(
    model: str | Path | TrainablePolicy,
    *,
    lora: str | Path | None = None,
    etas: list[float] | None = None,
    steps: list[int] | None = None,
    rewards: list[str] | None = None,
    prompts: str | list[str] | PromptSet = "emoji-eval",
    num_images: int = 128,
    guidance_scale: float = 5.0,
    kernel: str = "gddim",
    seed: int = 0,
    batch_size: int = 32,
    resolution: int | None = None,
    first_step: str = "ode",
    dtype: str = "float32",
    offload: bool = False,
    pipeline_config: str | Path | None = None,
    shift: float | None = None,
    variant: str | None = None,
    on_start: Callable[[int], None] = _silent,
    on_step: Progress = _silent,
) -> GapReport:
    """The reward gap of any model, base or tuned, with 95 % intervals.

    Args:
        model: embedded name, directory, hub id, or a policy already loaded.
        lora: an adapter that a run exported; with it the improvement over the base model is measured too.
        etas: stochasticities compared with the ODE. Default: 1.2.
        steps: step counts. Default: 20.
        rewards: names. Default: alignment.
        prompts: a source that `load_prompts` takes, or prompts, of which a list is freed of repeats.
        num_images: images per sampler, spread evenly over the prompts.
        guidance_scale: the same under every sampler.
        kernel: of the stochastic samplers; `etas` are in its own unit.
        resolution: side of the images in pixels; default: the pipeline's own. Not for a policy already loaded, which has one.
        first_step: "ode", or "sde" to let a flow model's step out of pure noise redraw all of the noise, or "capped" for flow_sde.
        dtype, offload, pipeline_config, shift, variant: of a model that is yet to be loaded, as `load_policy` takes them.
        on_start: told the number of image-steps to come; `on_step` is then told as they are done.

    Raises:
        EtudeError: an eta, a step count, a reward, a model or a prompt file that cannot be used.
    """
    etas, steps, rewards = etas or [1.2], steps or [20], list(rewards or ["alignment"])
    if isinstance(prompts, str):
        prompts = load_prompts(prompts)
    elif not isinstance(prompts, PromptSet):
        prompts = PromptSet(list(dict.fromkeys(prompts)))
    shown = prompts.head(num_images)
    if num_images < 2:
        raise EtudeError(f"num_images = {num_images}: an interval needs at least 2 images.")
    policy = (
        model
        if isinstance(model, TrainablePolicy)
        else load_policy(
            model,
            lora,
            dtype,
            resolution=resolution,
            pipeline_config=pipeline_config,
            offload=offload,
            shift=shift,
            variant=variant,
        )
    )
    score = WeightedRewards(dict.fromkeys(rewards, 1.0))
    score.load()
    protocol = Protocol(shown, score, num_images, guidance_scale, kernel, seed, batch_size, first_step)
    for count in steps:
        for eta in etas:
            protocol.plan(eta, count).tabulate(policy.grid(count))
    samplers = 1 + (lora is not None) + len(etas)
    on_start(num_images * samplers * sum(steps))
    rows = []
    for count in steps:
        ode = protocol.scores(protocol.images(policy, 0.0, count, on_step))
        base = None
        if lora is not None:
            with policy.reference():
                base = protocol.scores(protocol.images(policy, 0.0, count, on_step))
        for eta in etas:
            sde = protocol.scores(protocol.images(policy, eta, count, on_step))
            summary = summarise(ode, sde, base, protocol.clusters)
            rows += [
                {"num_steps": count, "eta": eta, "reward": reward}
                | {q: by_reward[reward] for q, by_reward in summary.items()}
                for reward in rewards
            ]
    settings = {
        "model": str(model) if not isinstance(model, TrainablePolicy) else type(model).__name__,
        "lora": str(lora) if lora is not None else None,
        "kernel": kernel,
        "first_step": first_step,
        "shift": shift,
        "resolution": resolution,
        "dtype": None if isinstance(model, TrainablePolicy) else dtype,
        "guidance_scale": guidance_scale,
        "num_images": num_images,
        "prompts": shown.texts,
        "seed": seed,
    }
    return GapReport(rows, settings)
