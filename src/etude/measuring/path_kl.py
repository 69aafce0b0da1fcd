"""The KL of a stochastic sampler's path from that of the model before training, in nats an image.

    KL = E sum_t ||m(x_t) - m_ref(x_t)||^2 / (2 std_t^2)        x_t drawn by the tuned model, t over the stochastic steps

m and m_ref are the means of the tuned and of the reference model out of the same state. Each term is
the exact KL of two Gaussians of one std. Where every step is stochastic, an image's sum is therefore
an unbiased estimate of the KL between the two laws of the path (the chain rule), which bounds the KL
between those of its last state. Equal weights give exactly 0.

A deterministic step has no density: its KL is 0 or infinite, and the sum leaves it out. Under eta = 0
every step is deterministic, so the KL is not defined, and asking for it is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from etude.batching import MicroBatch, Progress, silent
from etude.errors import EtudeError
from etude.measuring.pairs import Measurement
from etude.policies import TrainablePolicy
from etude.sampling.noise import NoiseSource
from etude.sampling.rollout import rollout
from etude.sampling.sampler import PlannedSampler


@torch.no_grad()
def images_and_path_kl(
    policy: TrainablePolicy,
    sampler: PlannedSampler,
    measurement: Measurement,
    on_step: Progress = silent,
    samples: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw the images of `Measurement.images`, to the bit, and each one's sum of the KL, fp32 `[n]` in nats.

    The reference model is evaluated once more at each stochastic step. Images `[n, 3, h, w]` and sums
    are on the CPU; `samples` are the indices of the images. Default: all.

    Raises:
        EtudeError: no step of the sampler is stochastic, or the policy keeps no reference model.
    """
    table = sampler.table(policy)
    if not any(table.stochastic):
        raise EtudeError(
            f"the {sampler.label} of {table.num_steps} steps has no stochastic step, and a deterministic path has no "
            "KL: measure it under an eta above 0."
        )
    table = replace(table, trained=table.stochastic).to(policy.device)
    texts = measurement.shown(samples).texts
    keys = list(range(len(texts)) if samples is None else samples)
    conditioning, noise = policy.encode(texts), NoiseSource(measurement.seed, measurement.stream)
    batches, start = MicroBatch.of(measurement.batch_size), 0
    latents: list[Tensor] = []
    nats: list[Tensor] = []
    while start < len(keys):  # a trajectory of all images would not fit into memory
        rows = slice(start, start + batches.size)
        start = rows.stop
        own, guidance = conditioning.take(rows), sampler.guidance
        path = rollout(
            policy, table, own, noise, keys[rows], guidance, batches, "sum", policy.reference, on_step, keep_means=True
        )
        assert path.mean is not None
        assert path.reference_mean is not None
        distances = (path.mean - path.reference_mean).flatten(2).square().sum(2)  # [rows, steps]
        nats.append((distances / (2 * table.std[path.step_index].square())).sum(1).cpu())
        latents.append(path.latents)
    return policy.decode(torch.cat(latents)), torch.cat(nats)
