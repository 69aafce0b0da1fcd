"""Samplers: one value says how images are drawn from a model, and draws them.

    ODE(steps)                  the probability-flow ODE: deployment
    SDE(eta, steps)             every step a stochastic kernel at eta, or at an eta of its own
    Window(eta, start, size)    stochastic steps in a window and the ODE elsewhere (MixGRPO)
    Solver(name, steps)         a deterministic solver of diffusers (`etude.sampling.solvers`)

Image i starts from the noise keyed by (seed, stream, i) under every sampler, so the images of two
samplers are pairs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from etude.batching import MicroBatch, Progress, Size, silent
from etude.errors import EtudeError
from etude.sampling.etas import Eta, eta_text
from etude.sampling.kernels import Kernel, make_kernel
from etude.sampling.model import Conditioning, Policy
from etude.sampling.noise import NoiseSource
from etude.sampling.plans import SamplingPlan, Step, StepTable
from etude.sampling.rollout import rollout
from etude.undisturbed import undisturbed

KernelChoice = str | Callable[[float], Kernel]
"""A kernel by its registered name, or what makes one from an eta: a class such as `etude.CPS`."""
STREAM = "evaluation"
"""Stream of the noise that images are drawn from outside training."""


class Sampler(ABC):
    """A way to draw images, apart from the model, the prompts and the seed: a frozen dataclass.

    `guidance` is the plain pipeline's scale: at most 1 switches classifier-free guidance off.
    """

    steps: int
    guidance: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise EtudeError(f"guidance = {self.guidance}: give a finite number of at least 0.")

    @property
    @abstractmethod
    def label(self) -> str:
        """Name for a caption: `ODE`, `eta 1.2`, `dpmsolver++`."""

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """Number of network evaluations of one image, not counting guidance's second one."""

    @abstractmethod
    def check(self, policy: Policy) -> None:
        """Raises EtudeError if the policy's levels do not allow the steps or an eta; calls no network."""

    @abstractmethod
    def walk(
        self,
        policy: Policy,
        conditioning: Conditioning,
        noise: NoiseSource,
        samples: list[int],
        batch_size: Size | MicroBatch,
        on_step: Progress,
        on_rows: Callable[[slice, Tensor], None] | None = None,
    ) -> Tensor:
        """Final latents of the samples, one for each row of the conditioning; `on_rows` as in `rollout`."""

    @torch.no_grad()
    def draw(
        self,
        policy: Policy,
        prompts: Sequence[str],
        seed: int = 0,
        *,
        samples: Sequence[int] | None = None,
        stream: str = STREAM,
        batch_size: Size | MicroBatch = 32,
        on_step: Progress = silent,
        decode: bool = True,
    ) -> Tensor:
        """Draw one image for each prompt, uint8 `[n, 3, h, w]` on the CPU: see `sample`.

        Args:
            samples: index of each image, which keys its noise together with seed and stream.
                Default: 0 .. n - 1.
            stream: name of the noise's stream; another name is fresh noise under the same seed.
            decode: False gives the latents instead, fp32 `[n, *policy.latent_shape]`.
        """
        self.check(policy)
        keys = list(range(len(prompts)) if samples is None else samples)
        conditioning = policy.encode(list(prompts))
        latents = self.walk(policy, conditioning, NoiseSource(seed, stream), keys, batch_size, on_step)
        return policy.decode(latents) if decode else latents


class PlannedSampler(Sampler):
    """A sampler whose steps are transitions of kernels, listed in a plan without trained steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        eta = getattr(self, "eta", 0.0)
        if not isinstance(eta, int | float):
            object.__setattr__(self, "eta", tuple(eta))  # a list would make no key
        self.plan()

    @abstractmethod
    def plan(self) -> SamplingPlan:
        """The kernel of every step."""

    @property
    def evaluations(self) -> int:
        return self.plan().num_steps

    def check(self, policy: Policy) -> None:
        self.table(policy)

    def walk(
        self,
        policy: Policy,
        conditioning: Conditioning,
        noise: NoiseSource,
        samples: list[int],
        batch_size: Size | MicroBatch,
        on_step: Progress,
        on_rows: Callable[[slice, Tensor], None] | None = None,
    ) -> Tensor:
        table, guidance = self.table(policy).to(policy.device), self.guidance
        return rollout(
            policy, table, conditioning, noise, samples, guidance, batch_size, on_step=on_step, on_rows=on_rows
        ).latents

    @undisturbed()
    def table(self, policy: Policy) -> StepTable:
        """The coefficients of the plan on the policy's levels, on the CPU."""
        plan = self.plan()
        return plan.tabulate(policy.grid(plan.grid_size))


@dataclass(frozen=True)
class ODE(PlannedSampler):
    """The probability-flow ODE in every step, DDIM at eta 0: the sampler of deployment.

    Example:
        >>> import etude
        >>> etude.ODE(steps=20).evaluations
        20
    """

    steps: int = 20
    guidance: float = 5.0

    @property
    def label(self) -> str:
        return "ODE"

    def plan(self) -> SamplingPlan:
        return SamplingPlan.ode(self.steps)


@dataclass(frozen=True)
class SDE(PlannedSampler):
    """A stochastic kernel in every step.

    Args:
        eta: stochasticity in the kernel's own unit, one number or one for each step. 0 is the ODE.
        kernel: registered name ("gddim", "ddim", "cps"; for flow models also "flow_sde",
            "dance_sde"), or a class of kernels.
        first_step: treatment of a step that starts from pure noise, as in flow models. "ode" makes
            it deterministic, "sde" leaves it to the kernel, "capped" does the same and caps noise
            that would be infinite there.

    Example:
        >>> import etude
        >>> etude.SDE(eta=1.2, steps=20).label
        'eta 1.2'
        >>> sampler = etude.SDE(eta=[1.0, 0.5, 0.0], steps=3, kernel="cps")
    """

    eta: Eta
    steps: int = 20
    kernel: KernelChoice = "gddim"
    first_step: str = "ode"
    guidance: float = 5.0

    @property
    def label(self) -> str:
        return f"eta {eta_text(self.eta)}" if self.eta else "ODE"

    def plan(self) -> SamplingPlan:
        make = _maker(self.kernel)
        if isinstance(self.eta, int | float):
            plan = SamplingPlan.sde(self.steps, make(self.eta), trained=False, first_step=self.first_step)
            return plan if self.eta else SamplingPlan.ode(self.steps)
        if len(self.eta) != self.steps:
            raise EtudeError(f"eta lists {len(self.eta)} values for {self.steps} steps: give one for each step.")
        return SamplingPlan.from_etas(self.eta, make, trained=False, first_step=self.first_step)


@dataclass(frozen=True)
class Window(PlannedSampler):
    """A stochastic kernel in a window of steps and the ODE elsewhere (MixGRPO, arXiv 2507.21802).

    Args:
        eta: as in `SDE`, like `kernel` and `first_step`: one number or one for each of the window's
            `size` steps.
        start: first step of the window, counted from 0.
        compression: share of the steps after the window that MixGRPO-Flash keeps, in (0, 1]; they
            are steps of DPM-Solver++(2M). Default: all steps, as ODE steps.

    Example:
        >>> import etude
        >>> etude.Window(eta=1.2, start=2, size=4, steps=20).label
        'eta 1.2 in steps 2..5'
        >>> etude.Window(eta=1.2, start=2, size=4, steps=20, compression=0.5).evaluations
        13
    """

    eta: Eta
    start: int = 0
    size: int = 4
    steps: int = 20
    kernel: KernelChoice = "gddim"
    first_step: str = "ode"
    compression: float | None = None
    guidance: float = 5.0

    @property
    def label(self) -> str:
        return f"eta {eta_text(self.eta)} in steps {self.start}..{self.start + self.size - 1}"

    def plan(self) -> SamplingPlan:
        make = _maker(self.kernel)
        kernel = make(self.eta) if isinstance(self.eta, int | float) else [make(eta) for eta in self.eta]
        plan = SamplingPlan.window(self.steps, kernel, self.start, self.size, self.first_step, self.compression)
        return replace(plan, steps=tuple(Step(step.kernel) for step in plan.steps))


def sample(
    policy: Policy,
    prompts: str | Sequence[str],
    sampler: Sampler = ODE(),
    *,
    seed: int = 0,
    batch_size: Size | MicroBatch = 32,
    on_step: Progress = silent,
) -> Tensor:
    """Draw one image for each of n prompts, or for one text: uint8 `[n, 3, h, w]` on the CPU.

    Image i starts from the same noise under every sampler, so two calls that differ in the sampler
    alone give pairs.

    Args:
        policy: the model (`etude.load_policy`).
        sampler: how the images are drawn: `etude.ODE`, `etude.SDE`, `etude.Window` or
            `etude.Solver`; an EtudeError if it does not fit the model's levels.
        seed: key of the noise; the same seed gives the same images.
        batch_size: largest number of images in a network call, halved when memory runs out.
        on_step: called with the number of images that just made one step.

    Example:
        >>> import etude
        >>> policy = etude.load_policy("emoji-sd")
        >>> etude.sample(policy, ["red heart"], etude.SDE(eta=1.2, steps=4), seed=0).shape
        torch.Size([1, 3, 64, 64])
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    return sampler.draw(policy, texts, seed, batch_size=batch_size, on_step=on_step)


def _maker(kernel: KernelChoice) -> Callable[[float], Kernel]:
    """The function that makes the chosen kernel from an eta."""
    return (lambda eta: make_kernel(kernel, eta)) if isinstance(kernel, str) else kernel
