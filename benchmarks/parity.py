"""A check that two implementations of DDPO compute the same: etude scores a rollout of the peer again.

The peer writes its samples with their log-probabilities, loss and gradient. etude computes these
numbers from the same latents with its own encoder call, path, kernel and objective.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from etude.learning.objectives.ppo import PPO, ppo_loss
from etude.sampling.rollout import denoise
from etude.training.trainer import Trainer


def compare(trainer: Trainer, path: Path, prompts: list[str]) -> dict[str, float]:
    """Largest differences between the peer's values in `path` and etude's.

    Returns:
        `log_prob`: largest absolute difference, in units of the mean over latent dimensions.
            `loss`:
        absolute difference. `gradient`: norm of the difference over the norm. `clipped`: share of
        terms with an active clip; a loss without the clip could not agree on them.
    """
    peer, config, table = load_file(path), trainer.config, trainer.schedule.table_at(1)
    assert isinstance(trainer.objective, PPO)
    conditioning = trainer.policy.encode(prompts)
    advantages, losses, differences, clipped = peer["advantages"], [], [], []
    trainer.learner.optimizer.zero_grad()
    for column in range(peer["timesteps"].shape[1]):
        step = table.timesteps.tolist().index(int(peer["timesteps"][0, column]))
        steps = torch.full((len(prompts),), step)
        transition = denoise(
            trainer.policy,
            table,
            steps,
            peer["latents"][:, column],
            conditioning,
            config.sampling.guidance_scale,
        )
        log_prob = transition.log_prob(peer["next_latents"][:, column], config.objective.logprob_reduction)
        differences.append((log_prob - peer["log_prob"][:, column]).abs().max().item())
        old = peer["old_log_prob"][:, column]
        result = ppo_loss(
            log_prob, old, advantages, trainer.objective.clip_range(trainer.policy), config.objective.adv_clip_max
        )
        (result.value / peer["timesteps"].shape[1]).backward()
        losses.append(result.value.item())
        clipped.append(result.records["clipped"].float().mean().item())
    gradient = torch.cat([_gradient(parameter) for _, parameter in sorted(trainer.parameters.items())])
    trainer.learner.optimizer.zero_grad()
    return {
        "log_prob": max(differences),
        "loss": abs(sum(losses) / len(losses) - peer["loss"].item()),
        "gradient": ((gradient - peer["gradient"]).norm() / peer["gradient"].norm()).item(),
        "clipped": sum(clipped) / len(clipped),
    }


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros(parameter.numel()) if parameter.grad is None else parameter.grad.flatten()
