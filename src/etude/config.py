"""The configuration of a run: one typed tree. Every field has a default, a unit and a help line.

Defaults are those of the `sd15-ddpo` recipe (Black et al. 2023, arXiv 2305.13301, and its public hyper-parameters) unless the
help says otherwise; those of `sampling.window` are MixGRPO's (arXiv 2507.21802). Unknown keys are errors. A run writes the
resolved tree to `config.yaml`, and that file reproduces the run.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from etude.errors import EtudeError, unknown

Beta = Annotated[float, Field(ge=0, lt=1)]
KernelName = Literal["gddim", "ddim", "cps", "flow_sde", "dance_sde"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class PromptsConfig(Section):
    train: str = Field(
        "emoji-train",
        description="Prompts to train on: a built-in set (`emoji-train`, `emoji-eval`, `animals`) or a text file.",
    )
    evaluation: str = Field(
        "emoji-eval", description="Prompts for the held-out evaluation of the gap: a built-in set or a text file."
    )


class WindowConfig(Section):
    """MixGRPO (arXiv 2507.21802): the kernel inside a moving window of steps, which alone are trained; the ODE elsewhere."""

    strategy: Literal["progressive", "random", "decay", "fixed"] = Field(
        "progressive",
        description="How the window moves. progressive: by stride steps every iters_per_shift iterations (the paper's choice). random: drawn anew "
        "each iteration. decay: progressive, but staying ever shorter as it moves on. fixed: never.",
    )
    size: int = Field(4, ge=1, description="Consecutive stochastic steps, all of them trained. The paper's default.")
    iters_per_shift: int = Field(
        25,
        ge=1,
        description="Iterations before a progressive window moves, and before a decay window first does. The paper's default.",
    )
    stride: int = Field(1, ge=1, description="Steps that the window moves at a time. The paper's default.")
    roll_back: bool = Field(
        True,
        description="From its last place the window goes back to the first; otherwise it stays there, and trains no other steps any more.",
    )
    start: int | None = Field(
        None, ge=0, description="First step that the window can hold; null is the first step that is stochastic at all."
    )
    end: int | None = Field(
        None,
        ge=1,
        description="Step before which the window ends (it holds end - 1 at most); null is after the last step that is stochastic at all.",
    )
    decay_rate: float = Field(
        0.1,
        ge=0,
        description="decay: with its first step at l the window stays iters_per_shift * exp(-decay_rate * max(0, l - decay_threshold)) "
        "iterations.",
    )
    decay_threshold: int = Field(
        13,
        ge=0,
        description="decay: the step from which on the window stays ever shorter; the default is meant for 25 steps.",
    )
    compression: float | None = Field(
        None,
        gt=0,
        le=1,
        description="MixGRPO-Flash: the steps after the window become this share of them, taken by second-order DPM-Solver++ (the paper's is 0.4). "
        "null: plain MixGRPO.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> WindowConfig:
        if self.stride > self.size:
            raise ValueError(
                f"a window of size {self.size} that moves by stride = {self.stride} would pass over steps; use at most {self.size}"
            )
        return self


class SamplingConfig(Section):
    kernel: KernelName = Field(
        "gddim",
        description="Transition kernel of the training sampler: gddim (any model, any eta), ddim (to a largest eta), cps (eta at most 1), and for "
        "flow models flow_sde (Flow-GRPO) and dance_sde (DanceGRPO).",
    )
    eta: float = Field(
        1.0,
        ge=0,
        description="Stochasticity while training, in the kernel's own unit. gddim: 0 is the ODE, 1 the DDPM posterior, any value above is valid. "
        "flow_sde at 0.7, the ecosystem's usual value, amounts to gddim at 0.5.",
    )
    num_steps: int = Field(
        50, ge=1, description="Denoising steps in training, and in evaluation unless that says otherwise."
    )
    guidance_scale: float = Field(
        5.0,
        ge=0,
        description="Guidance, the same in rollout, replay and evaluation: classifier-free (1 switches it off), or the embedded scale of FLUX.",
    )
    first_step: Literal["ode", "sde"] = Field(
        "ode",
        description="What becomes of a step that starts at pure noise (flow models): ode leaves it deterministic and untrained; "
        "sde redraws all of the noise at any eta above 0. Published flow samplers cap the noise there instead.",
    )
    window: WindowConfig | None = Field(
        None,
        description="null: every step is stochastic and trained (DDPO, Flow-GRPO). A section: MixGRPO, with the kernel in a window and "
        "the ODE elsewhere; with compression MixGRPO-Flash.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> SamplingConfig:
        if self.kernel == "cps" and self.eta > 1:
            raise ValueError(
                f"eta = {self.eta:g} is beyond cps, which redraws all of the noise at 1; use at most 1, or gddim"
            )
        if self.window is not None:
            first, end = self.window.start or 0, self.window.end or self.num_steps
            if end > self.num_steps:
                raise ValueError(f"window.end = {end} is beyond num_steps = {self.num_steps}")
            if first + self.window.size > end:
                raise ValueError(
                    f"a window of size {self.window.size} does not fit in steps {first} to {end - 1}; lower window.size or raise num_steps"
                )
        return self


class RolloutConfig(Section):
    images_per_iteration: int = Field(256, ge=1, description="Images sampled in one iteration, over all processes.")
    images_per_prompt: int = Field(
        1, ge=1, description="Images of one prompt in one iteration (the group of GRPO; 1 for DDPO)."
    )
    batch_size: int = Field(
        8, ge=1, description="Images per network call while sampling. Changes memory and speed, never the noise."
    )
    shared_noise: bool = Field(
        False,
        description="The images of one prompt start from the same noise (DanceGRPO, MixGRPO) and differ by the stochastic steps alone; "
        "with a window the steps before it are then computed once a group. false: each from its own (DDPO, Flow-GRPO).",
    )


class LoraConfig(Section):
    rank: int = Field(4, ge=0, description="LoRA rank; 0 trains the whole network.")
    alpha: float = Field(4.0, gt=0, description="LoRA alpha: the update is scaled by alpha / rank.")
    targets: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0"],
        min_length=1,
        description="Names of the layers that get an adapter (suffix match, as in peft).",
    )


class OptimizerConfig(Section):
    learning_rate: float = Field(3e-4, gt=0, description="AdamW learning rate.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW decay rates of the first and second moments.")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay.")
    epsilon: float = Field(1e-8, gt=0, description="AdamW addition to the denominator, which keeps it from 0.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")


class ObjectiveConfig(Section):
    kind: Literal["ppo", "reinforce"] = Field(
        "ppo", description="ppo: clipped importance ratio. reinforce: -A log p, one optimiser step a rollout."
    )
    clip_range: float | None = Field(
        1e-4, gt=0, description="PPO clips the ratio to 1 +- clip_range. Give this or clip_nats, not both."
    )
    clip_nats: float | None = Field(
        None,
        gt=0,
        description="The clip range in nats of the whole image's log-probability: clip_range = clip_nats / D for D latent dimensions under the mean "
        "(1e-4 is 1.6 nats for SD1.5 at 512 px, but 0.05 nats at D = 512).",
    )
    logprob_reduction: Literal["mean", "sum"] = Field(
        "mean", description="mean over latent dimensions (as the peers) or the true density."
    )
    adv_clip_max: float = Field(5.0, gt=0, description="Advantages are clipped to +- this.")
    kl_coef: float = Field(
        0.0,
        ge=0,
        description="Weight of the KL to the reference model, closed form per step, reduced like the log-probability.",
    )
    num_inner_epochs: int = Field(1, ge=1, description="Passes over a rollout.")
    updates_per_epoch: int = Field(
        2, ge=1, description="Optimiser steps in one pass; the rollout is split evenly among them."
    )
    batch_size: int = Field(
        8, ge=1, description="(sample, step) pairs per network call while replaying. Changes memory and speed only."
    )
    timestep_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the stochastic steps of each sample that is trained, drawn anew each iteration.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        if (self.clip_range is None) == (self.clip_nats is None):
            raise ValueError("give exactly one of clip_range and clip_nats, and set the other to null")
        if self.kind == "reinforce" and (self.num_inner_epochs, self.updates_per_epoch) != (1, 1):
            raise ValueError("reinforce is on-policy: num_inner_epochs and updates_per_epoch must be 1")
        return self


class AdvantageConfig(Section):
    kind: Literal["per_prompt", "group", "group_mean_global_std"] = Field(
        "per_prompt", description="What rewards are compared with."
    )
    buffer_size: int = Field(16, ge=2, description="per_prompt: how many past rewards of a prompt are remembered.")
    min_count: int = Field(
        16,
        ge=2,
        description="per_prompt: below this many rewards of a prompt, the whole batch's mean and std are used.",
    )


class EmaConfig(Section):
    decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Exponential moving average of the trained weights, used in evaluation and export; 0 is off.",
    )


class EvaluationConfig(Section):
    every: int = Field(
        5, ge=1, description="Iterations between evaluations (iteration 0 and the last are always evaluated)."
    )
    num_steps: int | None = Field(
        None,
        ge=1,
        description="Denoising steps of both sides of the gap, ODE and SDE; null is sampling.num_steps. Flow-GRPO evaluates at 40 steps "
        "what it trains at 10.",
    )
    num_images: int = Field(
        64, ge=2, description="Held-out pairs of images (ODE and SDE from the same noise) per evaluation."
    )
    held_out_rewards: list[str] = Field(
        [], description="Rewards that are measured and not trained on: the guard against reward hacking."
    )
    grid_images: int = Field(24, ge=1, description="Images in the before / after grids.")


class CheckpointConfig(Section):
    every: int = Field(1, ge=1, description="Iterations between checkpoints.")
    keep: int = Field(2, ge=1, description="Checkpoints kept; two, so that a torn one costs one interval.")


class TrainConfig(Section):
    """Everything that determines a run."""

    model: str = Field("emoji-sd", description="Embedded name, local diffusers directory or hub id.")
    resolution: int | None = Field(
        None,
        ge=8,
        description="Side of the images in pixels; null is the pipeline's own (512 for SD1.5, 1024 for SD3 and FLUX).",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Network weights and inputs; the rest stays float32. No float16: the gradients underflow.",
    )
    seed: int = Field(
        0, ge=0, description="Seeds everything; noise is a pure function of (seed, stream, iteration, sample, step)."
    )
    iterations: int = Field(100, ge=1, description="Rollout-and-update iterations.")
    rewards: dict[str, float] = Field(
        {"jpeg_compressibility": 1.0}, min_length=1, description="Reward name (or module:function) to weight."
    )
    prompts: PromptsConfig = PromptsConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    ema: EmaConfig = EmaConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="Accelerate trackers that also receive the metrics: a name or a list of names."
    )

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        rollout, sampling = self.rollout, self.sampling
        if rollout.images_per_iteration % rollout.images_per_prompt:
            raise ValueError(
                f"rollout.images_per_iteration = {rollout.images_per_iteration} is not a multiple of "
                f"rollout.images_per_prompt = {rollout.images_per_prompt}"
            )
        if self.advantage.kind != "per_prompt" and rollout.images_per_prompt < 2:
            raise ValueError(f"advantage.kind = {self.advantage.kind} needs rollout.images_per_prompt of at least 2")
        if rollout.shared_noise and rollout.images_per_prompt < 2:
            raise ValueError("rollout.shared_noise needs rollout.images_per_prompt of at least 2")
        if sampling.eta == 0:
            raise ValueError(
                "sampling.eta = 0 is the ODE, which has no log-probability to train; use an eta above 0 (0.5 is mild, 1 is DDPM)"
            )
        if any(not math.isfinite(w) or w == 0 for w in self.rewards.values()):
            raise ValueError(
                "every weight in rewards must be finite and not 0; measure without training by evaluation.held_out_rewards"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(source: str, overrides: list[str] | None = None) -> TrainConfig:
    """Reads a built-in recipe's name or a YAML file, applies `a.b=value` overrides and validates.

    Raises:
        EtudeError: naming the key, the value and the remedy.
    """
    tree, place = _read_tree(source)
    for item in overrides or []:
        _apply_override(tree, item)
    return parse_config(tree, place)


def parse_config(tree: dict[str, Any], place: str = "configuration") -> TrainConfig:
    """Validates a tree of plain values; `place` names it in errors."""
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, place) from None


def recipe_names() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(p.name.removesuffix(".yaml") for p in _recipes().iterdir() if p.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """A built-in recipe as YAML, comments included."""
    if name not in recipe_names():
        raise unknown("recipe", name, recipe_names())
    return (_recipes() / f"{name}.yaml").read_text(encoding="utf-8")


def _recipes() -> Any:
    return resources.files("etude") / "recipes"


def _read_tree(source: str) -> tuple[dict[str, Any], str]:
    path = Path(source)
    if source not in recipe_names() and (path.suffix in {".yaml", ".yml"} or path.exists()):
        if not path.is_file():
            problem = "is a directory" if path.is_dir() else "does not exist"
            raise EtudeError(
                f"recipe file '{source}' {problem}: give a YAML file, or a built-in recipe ({', '.join(recipe_names())})."
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EtudeError(f"recipe file '{source}' cannot be read as UTF-8 text: {error}.") from None
    else:
        text = recipe_text(source)
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise EtudeError(f"'{source}' is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(tree, dict):
        raise EtudeError(f"'{source}' must hold a mapping of configuration keys, not {type(tree).__name__}.")
    return tree, f"'{source}'"


def _apply_override(tree: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise EtudeError(f"--set takes key=value, for example sampling.eta=1.2, not '{item}'.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise EtudeError(f"--set {item}: '{text}' is not a YAML value; quote it.") from None
    value = _number_like(value)
    *parents, leaf = key.split(".", 1) if key.startswith("rewards.") else key.split(".")  # package.module:function
    for name in parents:
        if tree.get(name) is None:
            tree[name] = {}
        child = tree[name]
        if not isinstance(child, dict):
            raise EtudeError(f"--set {item}: '{name}' is a value, not a section.")
        tree = child
    if leaf == "clip_nats" and value is not None:
        tree["clip_range"] = None
    if leaf == "clip_range" and value is not None:
        tree["clip_nats"] = None
    tree[leaf] = value


def _number_like(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; a user means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: ValidationError, place: str) -> EtudeError:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    others = error.error_count() - 1
    where = f"{place} (and {others} more error{'s' if others > 1 else ''} there)" if others else place
    if first["type"] == "extra_forbidden":
        return EtudeError(f"{where}: {_unknown_key(location)}")
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    at = f"{key} = {first['input']!r}" if key and not isinstance(first["input"], dict) else key
    return EtudeError(f"{where}: {at + ': ' if at else ''}{message}.")


def _unknown_key(location: list[str]) -> str:
    """Says which key is meant: the one of that name in another section, else the nearest in this one."""
    asked, section = ".".join(location), location[:-1]
    siblings = [".".join([*section, name]) for name in _keys(section)]
    everywhere = [key for key, _, _ in describe_fields()]
    near = [key for key in everywhere if key.rpartition(".")[2] == location[-1]]
    near = near or difflib.get_close_matches(asked, siblings, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"unknown key '{asked}': {hint}the keys there are {', '.join(siblings)}."


def _keys(section: list[str]) -> list[str]:
    model: Any = TrainConfig
    for name in section:
        model = _section(model.model_fields[name].annotation)
    return list(model.model_fields)


def _section(annotation: Any) -> type[Section] | None:
    """The section that a field holds, be it optional, or None for a plain value."""
    candidates = get_args(annotation) or (annotation,)
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def describe_fields(model: type[BaseModel] = TrainConfig, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, default, help) of every field, in order; an optional section is described itself and then its fields."""
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is None or field.default is None:
            yield f"{prefix}{name}", field.default, field.description or ""
        if section is not None:
            yield from describe_fields(section, f"{prefix}{name}.")


def difference(old: TrainConfig, new: TrainConfig) -> tuple[str, Any, Any] | None:
    """The first setting that differs, as (dotted key, old value, new value); None if the two are one configuration."""
    for (key, before), (_, after) in zip(leaves(old.model_dump()), leaves(new.model_dump()), strict=True):
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
            inner = next(name for name in before if before[name] != after[name])
            return f"{key}.{inner}", before[inner], after[inner]
        return key, before, after
    return None


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value), the same keys for every configuration: the rewards and the window, which differ in theirs, are one value each."""
    for key, value in tree.items():
        if isinstance(value, dict) and key not in {"rewards", "window"}:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
