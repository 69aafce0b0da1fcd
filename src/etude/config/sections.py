"""The settings of a run: one typed tree. The text below a field is its help line.

Defaults are those of the `sd15-ddpo` recipe (Black et al. 2023, arXiv 2305.13301, and its public
hyper-parameters) unless the help line says otherwise.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.functional_validators import AfterValidator, BeforeValidator, field_validator, model_validator

from etude.config.sampler_settings import SamplerSettings
from etude.config.sampling_sections import SamplingConfig
from etude.config.section import Section
from etude.config.yaml_text import dump_yaml
from etude.registry import ADVANTAGES, OBJECTIVES, POLICIES
from etude.rewards.reward import WEIGHTED_SUM

Beta = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["float32", "bfloat16", "float16"]
_COUNT: TypeAdapter[int] = TypeAdapter(Annotated[int, Field(ge=1)])


def _count_or_auto(value: Any) -> Any:
    """A size as it is if it is `auto`, otherwise as a number from 1 on."""
    if value == "auto":
        return value
    try:
        return _COUNT.validate_python(value)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"]) from None


BatchSize = Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)]
"""A number, or `auto`: the largest number that fits into memory."""


class PromptsConfig(Section):
    train: str = "emoji-train"
    """Prompts to train on: a built-in set (`emoji-train`, `emoji-eval`, `animals`, `animals-eval`),
    a file (text, JSON, JSON lines, CSV or TSV), package.module:function, or hub:dataset. After any
    of them, `#train` takes nine tenths of it and `#eval` the rest."""
    evaluation: str = "emoji-eval"
    """Prompts for the held-out evaluation of the gap: any source that `train` takes."""


class RolloutConfig(Section):
    images_per_iteration: int = Field(256, ge=1, le=1_000_000)
    """Images sampled in one iteration, over all processes."""
    images_per_prompt: int = Field(1, ge=1)
    """Images of one prompt in one iteration (the group of GRPO; 1 for DDPO)."""
    batch_size: BatchSize = 8
    """Images per network call while sampling. Changes memory and speed, never the noise. Halved
    when memory runs out. auto: the largest number that fits, tried out on the GPU before the first
    iteration, the smallest of all processes, and kept in the checkpoints; on a CPU 8."""
    dtype: Precision | None = None
    """Precision of the network while training images are sampled. null: the run's `dtype`. bfloat16
    or float16 samples a float32 run in half precision; objective.old_log_prob then chooses the
    log-probabilities that the ratios compare with."""
    shared_noise: bool = False
    """true: the images of one prompt start from the same noise and differ by the stochastic steps
    alone (DanceGRPO, MixGRPO); the steps before a window are then computed once per group. false:
    each image starts from its own noise (DDPO, Flow-GRPO)."""
    score_ahead: bool = True
    """true: score each micro-batch of images while the next one is sampled. false: score all images
    of an iteration at once after the rollout, for rewards that compare images with one another.
    memory.offload implies false."""
    reward_timeout: float = Field(3600.0, gt=0, le=30 * 24 * 3600)
    """Longest wait, in seconds, for the scores of one batch of images. A reward that takes longer
    counts as hung and ends the run; finished iterations stay."""


class AttentionConfig(Section):
    backend: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"
    """Attention kernel of the network, in rollout, replay and evaluation. auto: on a GPU flash,
    efficient or math, whichever torch prefers for a call; on a CPU torch's own choice. cuDNN's is
    left out because it fails, or gives NaN, in the backward of FLUX.1 in bfloat16. A name: that
    kernel alone, and an error where it cannot compute the network's attention, or that of a reward's
    network that scores meanwhile (rollout.score_ahead)."""


class LoraConfig(Section):
    rank: int = Field(4, ge=0, le=16_384)
    """LoRA rank; 0 trains the whole network."""
    alpha: float = Field(4.0, gt=0)
    """LoRA alpha: the update is scaled by alpha / rank."""
    targets: list[str] = Field(["to_q", "to_k", "to_v", "to_out.0"], min_length=1)
    """Names of the layers that get an adapter (suffix match, as in peft). The default adds the layers
    that a family's attention has besides: to_qkv_mlp_proj in FLUX.2."""
    init: str | None = None
    """Adapter to train on from: a directory that a run exported, or a safetensors file. Ranks,
    alphas and layers are then the file's, and rank, alpha and targets are not read. The base model
    stays the model without it. null: a new adapter, which changes nothing at first."""


class OptimizerConfig(Section):
    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps the optimiser's moments in 8 bits (bitsandbytes, the extra
    etude[bitsandbytes]). It pays in full fine-tuning, where the moments take twice the memory of
    the weights; the moments of an adapter are small."""
    learning_rate: float = Field(3e-4, gt=0)
    """AdamW learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW decay rates of the first and second moments."""
    weight_decay: float = Field(1e-4, ge=0)
    """AdamW weight decay."""
    epsilon: float = Field(1e-8, gt=0)
    """AdamW constant that keeps the denominator above 0."""
    fused: bool = False
    """true: torch's fused AdamW, one kernel for all parameters. Changes speed and the last bits. Not
    for adamw8bit, which has kernels of its own."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerConfig:
        if self.fused and self.kind != "adamw":
            raise ValueError(f"fused = true is for kind = adamw, not {self.kind}; set fused to false")
        return self


class ObjectiveConfig(Section):
    kind: Annotated[str, AfterValidator(OBJECTIVES.check)] = Field(
        "ppo", description=f"Loss of an optimiser step: a name, or module:Class of your own. {OBJECTIVES.about()}."
    )
    options: dict[str, Any] = Field({})
    """Arguments of the objective by name: of nft, awm, elbo_pg or dpo, ppo's ratio and kl_limit, or
    those of an objective of your own. Default: none."""
    clip_range: float | None = Field(1e-4, gt=0)
    """PPO clips the ratio to 1 +- clip_range. Give either clip_range or clip_nats."""
    clip_nats: float | None = Field(None, gt=0)
    """The clip range in nats of the whole image's log-probability. With logprob_reduction = mean
    over D latent dimensions, clip_range = clip_nats / D: a clip_range of 1e-4 is 1.6 nats for SD1.5
    at 512 px, but 0.05 nats at D = 512."""
    old_log_prob: Literal["rollout", "replay"] = "rollout"
    """Log-probabilities that the ratios compare with. rollout: as computed while the images were
    drawn, in the precision and batches of the rollout, which gives the exact importance ratio.
    replay: computed again before the first update, in the precision and batches of the replay;
    every ratio then starts at exactly 1, at the cost of one more evaluation of each trained
    step."""
    mismatch_limit: float | None = Field(None, gt=0, allow_inf_nan=False)
    """ppo and reinforce: largest mean distance between the log-probabilities of rollout and replay
    before the first update, in nats a step (`rollout_mismatch` in the metrics). The run stops above
    it, and its last checkpoint is the iteration before. null: no limit."""
    logprob_reduction: Literal["mean", "sum"] = "mean"
    """Log-probability of a step: mean over the latent dimensions (as other libraries) or sum (the
    true density)."""
    adv_clip_max: float = Field(5.0, gt=0)
    """Advantages are clipped to +- this."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL to the reference model: in closed form, for each step, reduced like the
    log-probability."""
    num_inner_epochs: int = Field(1, ge=1)
    """Passes over a rollout."""
    updates_per_epoch: int = Field(2, ge=1)
    """Optimiser steps in one pass; the rollout is split evenly among them."""
    batch_size: BatchSize = 8
    """(sample, step) pairs per network call while replaying. Changes memory and speed only. Halved
    when memory runs out. auto: as rollout.batch_size."""
    gradients: Literal["replay", "rollout"] = "replay"
    """Forward that the gradients belong to. replay: a second one, after the rewards. rollout: that of
    the rollout, for ppo and reinforce where one optimiser step follows each rollout: every ratio is
    then 1, and the gradient of each image is kept until its advantage is known. Saves the replay's
    forward, and takes the adapter's size in float32 for each image. Needs one process, a LoRA of
    linear layers, and num_inner_epochs, updates_per_epoch and timestep_fraction of 1."""
    timestep_fraction: float = Field(1.0, gt=0, le=1)
    """Share of each sample's stochastic steps that is trained. The steps are drawn anew each
    iteration."""

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        if self.gradients == "replay":
            return self
        needed = {"num_inner_epochs": 1, "updates_per_epoch": 1, "timestep_fraction": 1, "old_log_prob": "rollout"}
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"gradients = rollout needs {name} = {value}, not {getattr(self, name)}; set either of them"
                )
        return self


class AdvantageConfig(Section):
    kind: Annotated[str, AfterValidator(ADVANTAGES.check)] = Field(
        "per_prompt", description=f"Comparison of rewards: a name, or module:Class of your own. {ADVANTAGES.about()}."
    )
    options: dict[str, Any] = Field({})
    """Arguments of an advantage of your own, by name. Default: none."""
    buffer_size: int = Field(16, ge=2)
    """per_prompt: number of past rewards remembered for each prompt."""
    min_count: int = Field(16, ge=2)
    """per_prompt: a prompt with fewer remembered rewards is compared with the mean and std of the
    whole batch."""


class EmaConfig(Section):
    decay: float = Field(0.0, ge=0, lt=1)
    """Decay of the exponential moving average of the trained weights, which evaluation and export
    use. 0: no average."""


class EvaluationConfig(Section):
    every: int = Field(5, ge=1)
    """Iterations between evaluations. Iteration 0 and the last iteration are always evaluated."""
    num_steps: int | None = Field(None, ge=1, le=10_000)
    """Denoising steps of both sides of the gap, ODE and SDE. null: sampling.num_steps. Flow-GRPO
    trains at 10 steps and evaluates at 40."""
    num_images: int = Field(64, ge=2, le=1_000_000)
    """Pairs of images per evaluation, ODE and SDE from the same noise, on held-out prompts."""
    images_per_prompt: int | None = Field(None, ge=1)
    """Images of each prompt, of which num_images must be a multiple. Diversity needs at least 2.
    null: as few as the prompts allow."""
    deployment: SamplerSettings | None = None
    """The sampler that will serve the tuned model, measured beside ODE and SDE from the same noise:
    its reward, its gap to the SDE, and the improvement under it. Keys: solver, steps, guidance,
    size, eta, kernel, first_step; steps, guidance and size are those of training where null."""
    held_out_rewards: list[str] = Field([])
    """Rewards that are measured but not trained on: the guard against reward hacking."""
    gold_rewards: list[str] = Field([])
    """Held-out rewards that stand for what is wanted: evaluations then have the divergence of the
    trained reward from each, in standard deviations of the base model's images, with its interval,
    and the report says since which iteration it is sure. Each must be in held_out_rewards."""
    stop_on_fall: dict[str, Annotated[float, Field(ge=0)]] = Field({})
    """Largest fall of a reward's held-out ODE mean below that of the base model: reward name to
    fall, in the reward's own unit. Once the whole 95 % interval of the change lies below this
    limit, the run exports its weights and stops."""
    path_kl: bool = False
    """true: evaluations also have the KL of the SDE's path from that of the model before training, in
    nats an image, at the cost of one more network evaluation for each stochastic step. Needs an eta
    above 0: a deterministic path has no KL. Full fine-tuning then keeps a copy of the model before
    training."""
    grid_images: int = Field(24, ge=1, le=4096)
    """Images in the before / after grids."""
    strip_images: int = Field(4, ge=0, le=64)
    """Images of each evaluation that are kept in samples/along/, under the ODE, from the same noise
    each time and at most 128 px wide. The report shows them as a strip for each prompt. 0: none."""
    image_scores: bool = False
    """true: metrics.jsonl also has the scores of every image of an evaluation, under `scores`, so that
    runs can be compared image by image. false: means and intervals alone."""


class CheckpointConfig(Section):
    every: int = Field(1, ge=1)
    """Iterations between checkpoints."""
    keep: int = Field(2, ge=1)
    """Number of checkpoints to keep. With two, a damaged one costs a single interval."""
    best: str | None = None
    """Reward that chooses the best weights: those of the evaluation with its highest held-out ODE
    mean. They are exported to lora-best/, beside the last weights in lora/, and measured again from
    fresh noise. null: export the last weights alone."""


class MemoryConfig(Section):
    gradient_checkpointing: bool = False
    """Keep few activations of the replay and compute the rest again: far less memory, about a third
    more time in the replay."""
    offload: bool = False
    """Text encoders, autoencoder and rewards' networks wait on the CPU. Text encoders move there
    once the run's prompts are encoded (as many as prompt_cache_mb holds); the autoencoder and the
    rewards' networks, whenever they are not used."""
    decode_batch_size: BatchSize | None = None
    """Images decoded at a time. Changes memory and speed only. Halved when memory runs out. auto: as
    rollout.batch_size, on a CPU as null. null: 32, and at most 2 million pixels."""
    prompt_cache_mb: int = Field(4096, ge=0)
    """MiB of encoded prompts that each process keeps in the machine's memory. A prompt takes 4 MiB
    for FLUX in bfloat16 and 0.2 MiB for SD1.5. A prompt that does not fit is encoded again whenever
    it is drawn, with the same bits."""


class TrainConfig(Section):
    """Everything that determines a run: one tree, whose keys `etude recipes --keys` explains.

    Example:
        >>> import etude
        >>> config = etude.TrainConfig(iterations=10, sampling={"eta": 1.5})
        >>> config.sampling.eta, config.model
        (1.5, 'emoji-sd')
    """

    model: str = "emoji-sd"
    """Model to train: embedded name, local diffusers directory, single safetensors file or hub id.
    owner/name@revision names a branch, tag or commit of the hub."""
    pipeline_config: str | None = None
    """Diffusers directory or hub id that supplies a single-file model's configuration, tokenizers
    and missing parts. null: the hub repository that diffusers infers from the weights."""
    family: Annotated[str, AfterValidator(POLICIES.check)] | None = None
    """Adapter for the model's pipeline: name of the pipeline class, or module:Class of your own.
    null: the pipeline class that model_index.json names."""
    variant: str | None = Field(None, pattern=r"^[\w-]+$")
    """Weight files to read from a directory or hub id. fp16 reads
    diffusion_pytorch_model.fp16.safetensors. null: the files without a suffix."""
    resolution: int | None = Field(None, ge=8, le=65_536)
    """Side of the images in pixels. null: the pipeline's own (512 for SD1.5, 1024 for SD3 and
    FLUX)."""
    dtype: Precision = "float32"
    """Precision of the frozen weights and of the network's computation. Adapters, latents and
    rewards stay float32. float16 is for GPUs without bfloat16: the loss is scaled so that gradients
    do not underflow."""
    compile: Literal["off", "regional", "full", "graphs", "auto"] = "off"
    """Compilation of the network by torch.compile. regional: its repeated blocks. full: the whole
    network, which takes longer to compile. Rollout and replay then round differently, so set
    objective.old_log_prob to replay for ratios that start at 1. graphs: no compilation, but CUDA
    graphs of the network's calls, with the same kernels: for small networks, whose kernels are
    shorter than their launches. auto: on a GPU graphs for a network of fewer than 100 million
    parameters, regional for a larger one if the run makes at least 20,000 network evaluations,
    otherwise off."""
    autocast: bool = True
    """false: a network in half precision computes in that alone, as the plain pipeline does, and the
    float32 adapter is cast for each call. true: torch.autocast, which on a GPU computes norms,
    softmax and sums in float32; of a UNet the backward then keeps a third more."""
    channels_last: bool = False
    """true: the weights of convolutions lie channel by channel, as a GPU's half-precision kernels
    for a UNet and an autoencoder read them. Changes speed and the last bits."""
    tf32: bool = False
    """true: a GPU multiplies float32 matrices in TF32, with 10 bits behind the point instead of 23.
    For runs in float32; the weights stay float32."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the whole run. Noise is a pure function of (seed, stream, iteration, sample,
    step)."""
    iterations: int = Field(100, ge=1, le=100_000_000)
    """Number of iterations: one rollout and its update each."""
    rewards: dict[str, float] = Field({"jpeg_compressibility": 1.0}, min_length=1)
    """Rewards to train on: name (or module:function, or http://host:port/path) to weight."""
    prompts: PromptsConfig = PromptsConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    attention: AttentionConfig = AttentionConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    ema: EmaConfig = EmaConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    memory: MemoryConfig = MemoryConfig()
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field([])
    """Trackers that receive the metrics, too: a name or a list of names."""

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        rollout, sampling, evaluation = self.rollout, self.sampling, self.evaluation
        if rollout.images_per_iteration % rollout.images_per_prompt:
            raise ValueError(
                f"rollout.images_per_iteration = {rollout.images_per_iteration} is not a multiple of "
                f"rollout.images_per_prompt = {rollout.images_per_prompt}"
            )
        if self.lora.init is not None and self.lora.rank == 0:
            raise ValueError(
                f"lora.init = {self.lora.init!r} is an adapter to train on from, but lora.rank = 0 trains the whole network; "
                "leave lora.rank at its default, or set lora.init to null"
            )
        if rollout.shared_noise and rollout.images_per_prompt < 2:
            raise ValueError("rollout.shared_noise needs rollout.images_per_prompt of at least 2")
        if self.dtype != "float32" and rollout.dtype not in (None, self.dtype):
            raise ValueError(
                f"rollout.dtype = {rollout.dtype} needs weights in float32, but dtype = {self.dtype} loads them in {self.dtype}; "
                "set dtype to float32, or rollout.dtype to null"
            )
        if not self.autocast and (self.dtype == "float32" or not self.lora.rank):
            other = "dtype = float32" if self.dtype == "float32" else "lora.rank = 0"
            raise ValueError(
                f"autocast = false does not go with {other}, because float32 weights are then trained or computed with; "
                "set autocast to true"
            )
        if isinstance(sampling.eta, list) and evaluation.num_steps not in (None, sampling.num_steps):
            raise ValueError(
                f"evaluation.num_steps = {evaluation.num_steps} needs an eta for each of its steps, but sampling.eta lists "
                f"{sampling.num_steps}; set evaluation.num_steps to null, or use sampling.eta_schedule over steps"
            )
        if evaluation.num_images % (evaluation.images_per_prompt or 1):
            raise ValueError(
                f"evaluation.num_images = {evaluation.num_images} is not a multiple of evaluation.images_per_prompt = "
                f"{evaluation.images_per_prompt}"
            )
        if any(not math.isfinite(w) or w == 0 for w in self.rewards.values()):
            raise ValueError(
                "every weight in rewards must be finite and not 0; measure without training by evaluation.held_out_rewards"
            )
        measured = dict.fromkeys([*self.rewards, *evaluation.held_out_rewards])
        if len(self.rewards) > 1:
            measured[WEIGHTED_SUM] = None
        guards = [("evaluation.stop_on_fall", name) for name in evaluation.stop_on_fall]
        for key, name in [*guards, ("checkpoint.best", self.checkpoint.best)]:
            if name is not None and name not in measured:
                raise ValueError(
                    f"{key} names the reward {name!r}, which is not measured: add it to evaluation.held_out_rewards, "
                    f"or name one of {', '.join(measured)}"
                )
        if self.objective.gradients == "rollout":
            others: list[tuple[str, Any, Any]] = [("dtype", self.dtype, "float16"), ("lora.rank", self.lora.rank, 0)]
            others += [("compile", self.compile, how) for how in ("regional", "full", "graphs", "auto")]
            for name, value, wrong in others:
                if value == wrong:
                    raise ValueError(
                        f"objective.gradients = rollout does not go with {name} = {value}; set one of them back"
                    )
        if evaluation.path_kl and max(sampling.all_etas) == 0:
            raise ValueError(
                "evaluation.path_kl = true needs a stochastic step, and sampling.eta = 0 has none: a deterministic path "
                "has no KL; set sampling.eta above 0, or evaluation.path_kl to false"
            )
        for name in evaluation.gold_rewards:
            if name not in evaluation.held_out_rewards or name in self.rewards:
                raise ValueError(
                    f"evaluation.gold_rewards names {name!r}, which is trained on or not measured: list it in "
                    "evaluation.held_out_rewards, and not in rewards"
                )
        # A trained reward need not be held out, so that several runs can share one list.
        held_out = [name for name in evaluation.held_out_rewards if name not in self.rewards]
        self.__dict__["evaluation"] = evaluation.model_copy(update={"held_out_rewards": held_out})
        return self

    def to_yaml(self) -> str:
        return dump_yaml(self.model_dump(mode="json"))
