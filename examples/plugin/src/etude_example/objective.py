"""An objective without log-probabilities: regression onto final images, weighted by advantage."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from etude.errors import EtudeError
from etude.learning.metrics import Metric, mean
from etude.learning.objectives import Keep, Loss, Objective, Samples
from etude.policies import TrainablePolicy
from etude.sampling.noise import to_device
from etude.sampling.paths import per_sample, to_x0_eps
from etude.sampling.plans import StepTable


class WeightedMatching(Objective):
    """`mean w |eps_hat(a x0 + s eps) - eps|^2`, `w = exp(A / temperature)`, over noise levels.

    x0 are the latents of a sampled image. The rollout stores nothing else, and may be the ODE.
    Equal advantages teach nothing new.

    Args:
        levels: number of noise levels at which each image is trained, evenly spaced over the
            sampler's steps. Default: 4.
        temperature: difference in advantage that makes an image e times as important. Default: 1.

    Raises:
        EtudeError: `levels` is below 1, or `temperature` is not above 0.
    """

    label = "advantage-weighted matching of noise"
    title = "weighted matching"
    keep = Keep.IMAGES
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "matching_weight",
            "mean weight of a pair",
            "The mean of exp(A / temperature): far above 1, few images decide the update.",
            compute=mean("weight"),
            needs=("weight",),
        ),
    )

    def __init__(self, levels: int = 4, temperature: float = 1.0) -> None:
        if levels < 1 or not temperature > 0:
            raise EtudeError(f"levels = {levels} and temperature = {temperature} must be at least 1 and above 0.")
        self.levels, self.temperature = levels, temperature

    def columns(self, table: StepTable) -> int:
        """The number of levels."""
        return self.levels

    def averaged_dimensions(self, policy: TrainablePolicy) -> int:
        """All dimensions: the error is a mean over an image's latent dimensions."""
        return policy.dimensions

    def loss(self, policy: TrainablePolicy, samples: Samples, rows: Tensor, columns: Tensor) -> Loss:
        steps = columns * samples.table.num_steps // self.levels
        noise = [
            samples.noise.step([samples.indices[row]], column, policy.latent_shape)
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        ]
        eps, x0 = to_device(torch.cat(noise), policy.device), samples.trajectory.latents[rows]
        a, s = samples.table.a[steps], samples.table.s[steps]
        x = per_sample(a, x0) * x0 + per_sample(s, x0) * eps
        output = policy.predict(
            x, samples.table.timesteps[steps], samples.conditioning.take(rows), samples.guidance_scale
        )
        _, eps_hat = to_x0_eps(output, x, a, s, policy.prediction_type)
        weight = (samples.advantages[rows] / self.temperature).exp()
        error = (eps_hat - eps).square().flatten(1).mean(1)
        return Loss((weight * error).mean(), {"weight": weight})
