"""A policy whose law is known: the exact denoiser of independent Gaussians, with a trainable shift and feedback in every step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etude.config import LoraConfig
from etude.policies.trainable import TrainablePolicy, swapped
from etude.sampling.model import Conditioning
from etude.sampling.paths import FlowPath, VPPath
from etude.sampling.plans import StepTable

RESOLUTION, LARGEST = 2**-20, 2**11  # of the numbers that an image carries


def sd_path(spacing: str = "leading") -> VPPath:
    """The noise path of Stable Diffusion 1.x, whose last step ends a little above the data."""
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False}
    return VPPath.from_config({**config, "steps_offset": 1, "timestep_spacing": spacing})


def flow_path(shift: float = 3.0) -> FlowPath:
    """Rectified flow under Stable Diffusion 3's static shift."""
    return FlowPath.from_config({"shift": shift})


class GaussianDenoiser(nn.Module):
    """`E[eps | x_t]` of x0 ~ N(mean, variance), plus what moves step i's mean by `(shift_i + feedback_i d) std_i`.

    d is the state's distance from the path's mean in standard deviations of the path. Without a table nothing is trained. On
    rectified flow it predicts the velocity, `E[eps - x0 | x_t]`, and what moves the mean alike.
    """

    def __init__(
        self, path: VPPath | FlowPath, mean: Tensor, variance: Tensor, table: StepTable | None, with_feedback: bool
    ) -> None:
        super().__init__()
        self.path, self.mean, self.variance = path, mean.double(), variance.double()
        self.count = table.num_steps if table else 0
        self.timesteps = table.timesteps if table else torch.zeros(0)
        self.scale = torch.zeros(self.count, dtype=torch.float64)
        if table:
            # x_u = c_x0 x0 + c_eps eps + std z, where eps moves x0 by -s / a, and the velocity both: x0 by -s, eps by a.
            a, s = table.a[:-1].double(), table.s[:-1].double()
            towards_eps, towards_x0 = (torch.ones_like(a), s / a) if isinstance(path, VPPath) else (a, s)
            self.scale = table.std.double() / (table.eps.double() * towards_eps - table.x0.double() * towards_x0)
        self.shift = nn.Parameter(torch.zeros(self.count))
        self.feedback = nn.Parameter(torch.zeros(self.count), requires_grad=with_feedback)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        a, s = (level.reshape(-1, 1, 1, 1) for level in _level(self.path, timesteps))
        spread = a**2 * self.variance + s**2
        deviation = x.double() - a * self.mean
        output = s * deviation / spread
        if isinstance(self.path, FlowPath):
            output = output - (self.mean + a * self.variance * deviation / spread)
        if self.count:
            step = (timesteps[:, None] == self.timesteps).int().argmax(1)
            scale, shift, feedback = (
                v[step].reshape(-1, 1, 1, 1) for v in (self.scale, self.shift.double(), self.feedback.double())
            )
            output = output + scale * (shift + feedback * deviation / spread.sqrt())
        return output.float()


def _level(path: VPPath | FlowPath, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """(a, s) in fp64 at what the network is given."""
    if isinstance(path, VPPath):
        return path.level(timesteps)
    s = timesteps.double() / path.config["num_train_timesteps"]
    return 1 - s, s


class GaussianPolicy(TrainablePolicy):
    """Latents [c, h, w] of independent Gaussians, one mean and variance a channel; every prompt is the same to it.

    A latent of one number is decoded to an image of 2 x 2 pixels, the number's four digits to the base 256; `read` is the inverse.
    """

    export_name = "model"

    def __init__(
        self,
        mean: float | Sequence[float],
        variance: float | Sequence[float],
        path: VPPath | FlowPath,
        size: tuple[int, int] = (1, 1),
        table: StepTable | None = None,
        with_feedback: bool = True,
    ) -> None:
        means, variances = (torch.tensor(v).reshape(-1, 1, 1) for v in (mean, variance))
        self.path, self.device = path, torch.device("cpu")
        self.scheduler_config = _scheduler_config(path)
        self.latent_shape = (len(means), *size)
        self.network = GaussianDenoiser(path, means, variances, table, with_feedback)

    def encode(self, prompts: list[str]) -> Conditioning:
        return Conditioning({"row": torch.zeros(len(prompts))}, {"row": torch.zeros(1)})

    def predict(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        return self.network(x, timesteps)

    def decode(self, latents: Tensor) -> Tensor:
        number = ((latents.double().flatten() + LARGEST) / RESOLUTION).round().long()
        digits = torch.stack([(number >> 8 * k) & 255 for k in range(4)], dim=1)
        return digits.to(torch.uint8).reshape(-1, 1, 2, 2).expand(-1, 3, -1, -1)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def reference(self) -> AbstractContextManager[None]:
        """The denoiser without corrections."""
        parameters = self.trainable()
        return swapped(parameters, {name: torch.zeros_like(p) for name, p in parameters.items()})

    def train_everything(self, keep_reference: bool = True) -> None:
        """Its parameters are trainable from the start."""

    def add_lora(self, config: LoraConfig, seed: int) -> None:
        raise NotImplementedError("a Gaussian has no layers to adapt")

    def load_lora(self, directory: Path) -> None:
        raise NotImplementedError("a Gaussian has no layers to adapt")

    def export(self, directory: Path) -> None:
        (directory / "corrections.txt").write_text(str({n: p.tolist() for n, p in self.trainable().items()}))


def _scheduler_config(path: VPPath | FlowPath) -> dict[str, Any]:
    """The config of a scheduler of that path."""
    if isinstance(path, FlowPath):
        return {**path.config, "_class_name": "FlowMatchEulerDiscreteScheduler"}
    alphas = path.alphas_cumprod
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=alphas.dtype), alphas[:-1]])
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": path.num_train_timesteps,
        "trained_betas": betas.tolist(),
        "prediction_type": path.prediction_type,
        "timestep_spacing": path.timestep_spacing,
        "steps_offset": path.steps_offset,
        "set_alpha_to_one": path.final_alpha_cumprod == 1,
        "clip_sample": False,
    }


def read(images: Tensor) -> Tensor:
    """The numbers that `GaussianPolicy.decode` wrote: float64 `[n]`, exact to RESOLUTION / 2."""
    weights = 256 ** torch.arange(4)
    return (images[:, 0].reshape(-1, 4).long() * weights).sum(1).double() * RESOLUTION - LARGEST
