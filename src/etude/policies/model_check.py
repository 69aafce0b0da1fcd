"""The check of a model: does its policy do what the plain pipeline does, and train what it says?"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from etude.config import LoraConfig
from etude.errors import EtudeError
from etude.policies.deployment import ode_scheduler
from etude.policies.pipeline import ADAPTER, PipelinePolicy
from etude.policies.self_check import PROMPTS, batch_difference, guidance_difference, states, tolerance
from etude.sampling.noise import NoiseSource, to_device
from etude.sampling.plans import SamplingPlan
from etude.sampling.rollout import rollout


def check_model(policy: PipelinePolicy, guidance_scale: float | None = None) -> Iterator[tuple[str, str]]:
    """The checks of a model, one after another: yields the name and the figure of each that passes.

    A batch of unequal prompts gives what each gives alone; guidance changes the prediction;
    gradients reach exactly the adapter; the ODE plan draws the plain pipeline's images; so does the
    exported adapter, loaded by the plain pipeline. The policy has an adapter afterwards.

    Args:
        guidance_scale: scale of the guided checks. Default: 2 above the largest that is no guidance.

    Raises:
        EtudeError: a check fails; the sentence says which, and by how much.
    """
    off = getattr(policy, "off", 1.0)
    embedded = bool(policy._trained_network.config.get("guidance_embeds"))
    guides = getattr(policy, "guides", policy.classifier_free or embedded)
    scale = guidance_scale if guidance_scale is not None else off + 2 if guides else off
    difference, most = batch_difference(policy, list(PROMPTS), scale), tolerance(policy)
    _refuse(difference > most, f"predictions of unequal prompts differ in a batch by {difference:.2g} from one by one")
    yield "a batch of unequal prompts is as one by one", f"{difference:.1e}"
    if scale > off:
        difference = guidance_difference(policy, off, scale)
        _refuse(difference <= 1e-6, f"guidance at {scale:g} predicts what it does at {off:g}")
        yield f"guidance at {scale:g} differs from {off:g}", f"{difference:.1e}"
    else:
        yield "the model has no guidance", ""
    yield _images_agree(policy, scale, "the ODE plan draws the plain pipeline's images")
    if not hasattr(policy.pipeline, "save_lora_weights"):
        yield "the pipeline loads no LoRA: the whole network can be trained", ""
        return
    policy.add_lora(LoraConfig(), seed=0)
    _move(policy)
    yield "gradients reach exactly the adapter", f"{_check_gradients(policy, scale)} tensors"
    yield _images_agree(policy, scale, "the export draws the same in the plain pipeline", exported=True)


def _refuse(failed: bool, what: str) -> None:
    if failed:
        raise EtudeError(f"the model fails its check: {what}; do not train it, and report the pipeline's class.")


def _move(policy: PipelinePolicy) -> None:
    """Moves every weight of the adapter, so that it changes what is drawn."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))


def _check_gradients(policy: PipelinePolicy, scale: float) -> int:
    (x, timesteps), told = states(policy, 1), policy.encode([PROMPTS[-1]])
    trained = policy.trainable()
    policy.predict(x, timesteps, told, scale).square().mean().backward()
    without = [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()]
    _refuse(
        bool(without),
        f"{len(without)} of {len(trained)} trained tensors get no gradient, {next(iter(without), None)} first",
    )
    ours = {id(parameter) for parameter in trained.values()}
    parts = [part for part in policy.pipeline.components.values() if isinstance(part, nn.Module)]
    stray = [name for part in parts for name, p in part.named_parameters() if p.grad is not None and id(p) not in ours]
    _refuse(bool(stray), f"{len(stray)} frozen tensors get a gradient, {next(iter(stray), None)} first")
    for parameter in trained.values():
        parameter.grad = None
    return len(trained)


def _images_agree(
    policy: PipelinePolicy, scale: float, what: str, exported: bool = False, steps: int = 3
) -> tuple[str, str]:
    """Compares the ODE plan's images with the plain pipeline's; of an adapter, after its export and anew."""
    prompts, noise, samples = list(PROMPTS[1:]), NoiseSource(0, "trial"), [0, 1]
    table = SamplingPlan.ode(steps).tabulate(policy.grid(steps)).to(policy.device)
    latents = rollout(policy, table, policy.encode(prompts), noise, samples, scale, batch_size=2).latents
    parts = [part for part in policy.pipeline.components.values() if isinstance(part, nn.Module)]
    with policy._on_device(*parts), torch.no_grad(), TemporaryDirectory() as place:
        ours = policy.decoded(latents)
        if exported:
            policy.export(Path(place))
            policy.pipeline.delete_adapters(ADAPTER)
            policy.pipeline.load_lora_weights(place)
        initial = to_device(noise.initial(samples, policy.latent_shape), policy.device)
        theirs = _plain_images(policy, prompts, steps, initial, scale)
    difference, most = float((ours - theirs).abs().mean()), tolerance(policy)
    failed = what.replace("draws", "does not draw")
    _refuse(not difference <= most, f"{failed}; they differ by {difference:.2g} of the range in the mean")
    return what, f"{difference:.1e}"


def _plain_images(policy: PipelinePolicy, prompts: list[str], steps: int, latents: Tensor, scale: float) -> Tensor:
    pipeline = copy.copy(policy.pipeline)
    pipeline.__dict__["_progress_bar_config"] = {"disable": True}
    ode_scheduler(policy, steps).put_into(pipeline)
    arguments: dict[str, Any] = {"num_inference_steps": steps, "latents": latents, "output_type": "pt"}
    images: Tensor = pipeline(prompt=prompts, **arguments, **policy.call_arguments(scale))[0]
    return images.flatten(0, -4).float()  # a video of one frame has an axis more
