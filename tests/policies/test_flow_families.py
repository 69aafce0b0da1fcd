"""What holds of a flow transformer whose policy asks the plain pipeline itself: FLUX.2-klein, Z-Image, Qwen-Image, SANA."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKLQwenImage, AutoencoderKLWan, HiDreamImagePipeline
from diffusers.configuration_utils import FrozenDict
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from etude.config import LoraConfig
from etude.errors import EtudeError
from etude.policies import load_policy
from etude.policies.conventions import lacks
from etude.policies.flow import FlowPolicy
from etude.policies.flow_families import ChromaPolicy, Flux2KleinPolicy, QwenImagePolicy, WanPolicy, ZImagePolicy
from etude.policies.plain_call import PlainCall
from etude.policies.prompt_cache import PromptCache
from etude.policies.self_check import PROMPTS, batch_difference
from etude.policies.trial import check_agreement
from etude.registry import POLICIES
from etude.sampling.kernels import GDDIM
from etude.sampling.noise import NoiseSource
from etude.sampling.plans import SamplingPlan
from etude.sampling.replay import replay
from etude.sampling.rollout import rollout
from support.tiny_flow import FAMILIES, FIRST_CLASS, chroma, ernie_image, flux2_klein, qwen_image, sana, wan, z_image
from support.tiny_others import aura_flow, bria, cogview4, longcat_image, lumina_next, ovis_image
from support.tiny_parts import language

FIRST = pytest.mark.parametrize("directory", FIRST_CLASS, indirect=True)
"""The families that have recipes, and SANA for its scheduler."""
STEPS = 3
GUIDED = 3.0


def side(name: str) -> int:
    return 32 if name == "sana" else 16


@pytest.fixture(scope="module", autouse=True)
def _small_hidream() -> Iterator[None]:
    """Gives HiDream's class, which always draws 128 x 128 latents, the area of the tests' images."""
    init = HiDreamImagePipeline.__init__

    def small(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.default_sample_size = 8

    small.__signature__ = inspect.signature(init)  # type: ignore[attr-defined]  # which tells its parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HiDreamImagePipeline, "__init__", small)
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / request.param
    FAMILIES[request.param]().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def base(directory: Path) -> FlowPolicy:
    """A policy that no test changes."""
    return load(directory)


def load(directory: Path, **options: Any) -> FlowPolicy:
    policy = load_policy(directory, device="cpu", resolution=side(directory.name), **options)
    assert isinstance(policy, FlowPolicy)
    return policy


def scales(policy: FlowPolicy) -> list[float]:
    return [policy.off, GUIDED]


def plain(policy: FlowPolicy, scale: float, pipeline: Any = None) -> Tensor:
    """What the plain pipeline draws from the noise of images 0, 1, 2; a solver at order 1."""
    pipeline = copy.copy(pipeline or policy.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.scheduler.config.get("use_flow_sigmas"):
        own = {"disable_corrector": list(range(STEPS))} if isinstance(policy, WanPolicy) else {}
        order_one = type(pipeline.scheduler).from_config(pipeline.scheduler.config, solver_order=1, **own)
        pipeline.__dict__["scheduler"] = order_one
    noise = NoiseSource(0, "evaluation").initial([0, 1, 2], policy.latent_shape)
    arguments = {"num_inference_steps": STEPS, "latents": noise, "output_type": "pt", **policy.call_arguments(scale)}
    images: Tensor = pipeline(prompt=list(PROMPTS), **arguments)[0]
    return images.flatten(0, -4)  # a video of one frame has an axis more


def drawn(policy: FlowPolicy, scale: float) -> Tensor:
    table = SamplingPlan.ode(STEPS).tabulate(policy.grid(STEPS))
    noise = NoiseSource(0, "evaluation")
    told = policy.encode(list(PROMPTS))
    latents = rollout(policy, table, told, noise, [0, 1, 2], scale, batch_size=2).latents
    return policy.decoded(latents)


def moved(policy: FlowPolicy, by: float = 0.1) -> FlowPolicy:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return policy


def test_the_ode_plan_makes_the_pipelines_own_images(base: FlowPolicy) -> None:
    for scale in scales(base):
        assert (drawn(base, scale) - plain(base, scale)).abs().max() <= 1e-5


def test_guidance_changes_what_is_drawn(base: FlowPolicy) -> None:
    assert (drawn(base, GUIDED) - drawn(base, base.off)).abs().max() > 1e-3


def test_a_distilled_klein_draws_its_pipelines_images_and_refuses_guidance() -> None:
    policy = Flux2KleinPolicy(flux2_klein(distilled=True), resolution=16)
    assert (drawn(policy, 1.0) - plain(policy, 1.0)).abs().max() <= 1e-5
    assert policy.encode(["a"]).unconditional == {}
    with pytest.raises(EtudeError, match=r"guidance_scale = 3: .* no guidance"):
        drawn(policy, GUIDED)


def test_a_batch_of_unequal_prompts_at_unequal_times_is_what_each_gives_alone(base: FlowPolicy) -> None:
    for scale in scales(base):
        assert batch_difference(base, list(PROMPTS), scale) <= 2e-5


def test_images_become_latents_that_the_pipeline_decodes_as_its_autoencoder_does(base: FlowPolicy) -> None:
    images = torch.randint(256, (2, 3, *base.image_size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents, vae = base.encode_images(images), base.pipeline.vae
    video, pixels = isinstance(vae, AutoencoderKLQwenImage | AutoencoderKLWan), images / 127.5 - 1
    with torch.no_grad():
        encoded = vae.encode(pixels.unsqueeze(2) if video else pixels)
        own = encoded.latent if isinstance(vae, AutoencoderDC) else encoded.latent_dist.mode()
        expected = vae.decode(own).sample.reshape(images.shape) / 2 + 0.5
    assert latents.shape == (2, *base.latent_shape)
    assert (base.decoded(latents) - expected.clamp(0, 1)).abs().max() <= 1e-5


def test_a_pipeline_that_does_more_than_scale_its_latents_encodes_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ZImagePolicy(z_image(), resolution=16)
    decode = PlainCall.decoder_input
    monkeypatch.setattr(PlainCall, "decoder_input", lambda *told: decode(*told).tanh())
    with pytest.raises(EtudeError, match="more to latents than to scale, shift and reorder"):
        policy.encode_images(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


@FIRST
def test_what_a_family_says_of_mixed_timesteps_is_what_the_trial_finds(base: FlowPolicy) -> None:
    declared, base.mixed = base.mixed, None
    try:
        base.settle()
        assert base.mixed == declared
    finally:
        base.mixed = declared


@FIRST
def test_one_evaluation_for_each_distinct_timestep_is_the_same_prediction(base: FlowPolicy) -> None:
    declared, scale = base.mixed, scales(base)[-1]
    x = NoiseSource(0, "evaluation").initial([0, 1, 2], base.latent_shape)
    timesteps, told = base.grid(4).timesteps[torch.tensor([2, 0, 2])], base.encode(list(PROMPTS))
    with torch.no_grad():
        expected = base.predict(x, timesteps, told, scale)
        base.mixed = "one"
        try:
            assert torch.allclose(base.predict(x, timesteps, told, scale), expected, atol=2e-5)
        finally:
            base.mixed = declared


@FIRST
def test_the_pipeline_stays_as_it_was_loaded(directory: Path, base: FlowPolicy) -> None:
    before = dict(base.pipeline.__dict__), dict(base.pipeline.config)
    state = torch.get_rng_state()
    drawn(base, base.off)
    base.grid(5)
    assert before == (dict(base.pipeline.__dict__), dict(base.pipeline.config))
    assert torch.equal(state, torch.get_rng_state())


def test_an_adapter_gets_the_gradients_alone_and_its_export_draws_the_same_in_the_plain_pipeline(
    directory: Path, tmp_path: Path
) -> None:
    policy = load(directory)
    scale = scales(policy)[-1]
    before = drawn(policy, scale)
    policy.add_lora(LoraConfig(rank=2, alpha=6.0), seed=0)
    single = "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    assert directory.name != "flux2-klein" or any(single in name for name in policy.trainable())
    moved(policy)
    x, timesteps = torch.randn(3, *policy.latent_shape), policy.grid(4).timesteps[:3]
    policy.predict(x, timesteps, policy.encode(list(PROMPTS)), scale).square().mean().backward()
    assert all("lora" in name and p.grad is not None and p.grad.any() for name, p in policy.trainable().items())
    if directory.name != "chroma":
        found = {name: parameter.grad for name, parameter in policy.trainable().items()}
        policy.enable_gradient_checkpointing()
        for parameter in policy.trainable().values():
            parameter.grad = None
        policy.predict(x, timesteps, policy.encode(list(PROMPTS)), scale).square().mean().backward()
        for name, parameter in policy.trainable().items():
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, found[name])
    for component in policy.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            assert all(p.grad is None for name, p in component.named_parameters() if "lora" not in name)
    after = drawn(policy, scale)
    assert (after - before).abs().max() > 1e-2
    with policy.reference():
        assert torch.equal(drawn(policy, scale), before)
    policy.export(tmp_path / "lora")
    pipeline = type(policy.pipeline).from_pretrained(directory)
    pipeline.load_lora_weights(tmp_path / "lora")
    assert (plain(policy, scale, pipeline) - after).abs().max() <= 1e-5


@FIRST
def test_a_replayed_step_has_a_ratio_of_exactly_one(base: FlowPolicy) -> None:
    scale = scales(base)[-1]
    table, told = SamplingPlan.sde(STEPS, GDDIM(1.2)).tabulate(base.grid(STEPS)), base.encode(list(PROMPTS))
    trajectory = rollout(base, table, told, NoiseSource(0, "training"), [0, 1, 2], scale, batch_size=3)
    for column in range(len(trajectory.steps)):
        rows, columns = torch.arange(3), torch.full((3,), column)
        transition, target = replay(base, table, trajectory, rows, columns, told, scale, with_gradient=False)
        assert torch.equal(transition.log_prob(target), trajectory.log_prob[:, column])


def test_half_precision_stays_near_float32(directory: Path, base: FlowPolicy) -> None:
    x, timesteps = torch.randn(3, *base.latent_shape), base.grid(4).timesteps[:3]
    policy = type(base)(copy.deepcopy(base.pipeline), torch.bfloat16, resolution=side(directory.name))
    policy.mixed = base.mixed
    outputs = [p.predict(x, timesteps, p.encode(list(PROMPTS)), p.off).detach() for p in (policy, base)]
    assert outputs[0].dtype == torch.float32
    if base.pipeline_name != "ChromaPipeline":  # which rounds its timesteps to bfloat16 (28 % here)
        assert (outputs[0] - outputs[1]).norm() < 0.1 * outputs[1].norm()
    assert policy.decode(x).shape == base.decode(x).shape


def test_parts_that_wait_off_the_device_come_to_it_while_they_work_and_change_nothing(
    base: FlowPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = base.encode(["red heart"]), base.decode(torch.ones(2, *base.latent_shape))
    policy = copy.copy(base)
    policy.offload, policy._encoded = True, PromptCache(2**20)
    names = {id(part): name for name, part in policy.pipeline.components.items() if isinstance(part, torch.nn.Module)}
    sent: list[tuple[str, Any]] = []

    def move(module: Any, device: Any) -> Any:
        sent.append((names[id(module)], device))
        return module

    monkeypatch.setattr(torch.nn.Module, "to", move)
    encoders = [name for name in names.values() if name.startswith("text_encoder")]
    told, images = policy.encode(["red heart"]), policy.decode(torch.ones(2, *base.latent_shape))
    moves = [*((name, base.device) for name in encoders), *((name, "cpu") for name in encoders)]
    assert sent == [*moves, ("vae", base.device), ("vae", "cpu")]
    assert all(torch.equal(rows, expected[0].prompt[name]) for name, rows in told.prompt.items())
    assert torch.equal(images, expected[1])


@pytest.mark.parametrize("directory", ["z-image", "qwen-image", "sana", "wan"], indirect=True)
def test_a_whole_export_draws_the_same_in_the_plain_pipeline_and_keeps_its_scheduler(
    directory: Path, base: FlowPolicy, tmp_path: Path
) -> None:
    policy = type(base)(copy.deepcopy(base.pipeline), resolution=side(directory.name))
    policy.train_everything()
    moved(policy, 0.02)
    after = drawn(policy, GUIDED)
    assert (after - drawn(base, GUIDED)).abs().max() > 1e-2
    policy.export(tmp_path)
    pipeline = type(policy.pipeline).from_pretrained(tmp_path)
    assert (plain(policy, GUIDED, pipeline) - after).abs().max() <= 1e-5
    file = Path("scheduler", "scheduler_config.json")
    assert json.loads((tmp_path / file).read_text()) == json.loads((directory / file).read_text())


def test_full_fine_tuning_leaves_out_what_no_gradient_reaches() -> None:
    policy = QwenImagePolicy(qwen_image(), resolution=16)
    policy.train_everything(keep_reference=False)
    frozen = {name for name, parameter in policy.network.named_parameters() if not parameter.requires_grad}
    last = "transformer_blocks.1."
    kinds = ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    assert frozen == {f"{last}{kind}.{part}" for kind in kinds for part in ("weight", "bias")}
    x, told = torch.randn(1, *policy.latent_shape), policy.encode(["a"])
    output = policy.predict(x, policy.grid(4).timesteps[:1], told, 1.0)
    torch.autograd.grad(output.square().mean(), list(policy.trainable().values()))  # which refuses unused ones


@pytest.mark.parametrize("outlined", [False, True])
def test_a_layer_that_no_gradient_reaches_is_refused_by_name(outlined: bool, tmp_path: Path) -> None:
    qwen_image().save_pretrained(tmp_path)
    policy = load_policy(tmp_path, device="cpu", resolution=16, outline=outlined)
    said = r"lora\.targets: 'transformer_blocks\.1\.attn\.to_add_out' .* no gradient, since nothing reads"
    with pytest.raises(EtudeError, match=said):
        policy.add_lora(LoraConfig(targets=["to_q", "to_add_out"]), seed=0)
    policy.add_lora(LoraConfig(targets=["to_q", "transformer_blocks.0.attn.to_add_out"]), seed=0)


def test_lengths_of_prompts_are_read_from_the_device_once_for_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ZImagePolicy(z_image(), resolution=16)
    read, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: read.append(tensor.shape) or tolist(tensor))
    told = policy.encode(list(PROMPTS))
    x, timesteps = torch.randn(3, *policy.latent_shape), policy.grid(4).timesteps
    read.clear()
    for timestep in timesteps:
        policy.predict(x, timestep.expand(3), told, GUIDED)
    assert read == [(3,), (1,)]  # of the prompts, and of guidance's empty one


@pytest.mark.parametrize("setting", [{"boundary_ratio": 0.9}, {"expand_timesteps": True}])
def test_a_wan_of_two_transformers_or_of_timesteps_for_tokens_is_refused(setting: dict[str, Any]) -> None:
    pipeline = wan()
    pipeline.register_to_config(**setting)
    with pytest.raises(EtudeError, match="give a Wan 2"):
        WanPolicy(pipeline)


def test_a_tokenizer_may_allow_more_than_the_encoder_reads_where_the_pipeline_cuts(tmp_path: Path) -> None:
    pipeline = sana()
    pipeline.tokenizer.model_max_length = 10**30  # as published, beside 8192 positions
    pipeline.save_pretrained(tmp_path)
    load_policy(tmp_path, device="cpu", resolution=32)


@FIRST
def test_an_outline_has_the_shapes_of_the_model(directory: Path, base: FlowPolicy) -> None:
    outline = load(directory, outline=True)
    assert (outline.latent_shape, outline.image_size) == (base.latent_shape, base.image_size)
    told, expected = (policy.encode([PROMPTS[1]]).prompt for policy in (outline, base))
    assert {name: rows.shape for name, rows in told.items()} == {name: rows.shape for name, rows in expected.items()}
    assert torch.equal(outline.grid(4).s, base.grid(4).s)


def test_other_layers_than_the_default_are_taken_as_named() -> None:
    policy = ZImagePolicy(z_image(), resolution=16)
    policy.add_lora(LoraConfig(targets=["attention.to_q"]), seed=0)
    assert all("attention.to_q" in name for name in policy.trainable())


def test_a_network_for_latents_of_another_autoencoder_is_refused_in_one_sentence(
    base: FlowPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_agreement("model", base)
    config = dict(base._trained_network.config)
    wide = 2 * config["in_channels"]
    network = SimpleNamespace(config=FrozenDict(config | {"in_channels": wide}))
    monkeypatch.setattr(type(base), "_trained_network", network)
    with pytest.raises(EtudeError, match=rf"transformer\.in_channels is {wide}, but .*vae\.(latent_channels|z_dim) is"):
        check_agreement("model", base)


def test_a_model_whose_padding_is_seen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = QwenImagePolicy(qwen_image(), resolution=16)
    network = policy.network.forward
    monkeypatch.setattr(
        policy.network,
        "forward",
        lambda *args, **told: network(*args, **{**told, "encoder_hidden_states_mask": None}),
    )
    with pytest.raises(EtudeError, match=r"other predictions in a batch than one by one, by \d+%"):
        policy.settle()
    policy.mixed = None
    with pytest.raises(EtudeError, match="needs a family of its own"):
        policy.settle()


@pytest.mark.parametrize(
    ("make", "mixed"),
    [(z_image, "one"), (aura_flow, "one"), (bria, "doubled"), (ovis_image, "vector")],
)
def test_a_pipeline_that_no_family_describes_loads_with_a_word_on_what_was_checked(
    make: Any, mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    monkeypatch.delitem(POLICIES.builtin, type(pipeline).__name__, raising=False)
    with pytest.warns(UserWarning, match="knows by the conventions of diffusers alone; checked so far"):
        policy = load_policy(tmp_path, device="cpu", resolution=32, family="etude.policies.flow:FlowPolicy")
    assert (type(policy), policy.mixed) == (FlowPolicy, mixed)
    assert (drawn(policy, GUIDED) - plain(policy, GUIDED)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("make", "how"),
    [(cogview4, r"by \d+%: a CogView4Pipeline"), (lumina_next, r"or cannot be evaluated \(.*\): a LuminaPipeline")],
)
def test_a_pipeline_that_pads_a_prompt_by_its_neighbours_is_refused(make: Any, how: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(EtudeError, match=f"a batch than one by one, {how} needs a family"):
        load_policy(tmp_path, device="cpu", resolution=32)


@pytest.mark.parametrize(
    ("name", "lack"),
    [
        ("KandinskyPipeline", "transformer"),
        ("NoPipeline", ""),
        ("HunyuanImagePipeline", "the argument guidance_scale"),
        ("LTXPipeline", "images, since it makes videos"),
        ("Ideogram4Pipeline", "a convention for its part prompt_enhancer_head"),
        ("GlmImagePipeline", "a convention for its part processor"),
    ],
)
def test_a_pipeline_without_the_conventions_is_refused_with_what_it_lacks(name: str, lack: str) -> None:
    said = lacks(name)
    assert said is not None
    assert lack in said


def test_a_longcat_trains_whole_and_draws_its_pipelines_images_without_rewriting_prompts(tmp_path: Path) -> None:
    longcat_image().save_pretrained(tmp_path)
    policy = load(tmp_path)
    for scale in scales(policy):
        assert (drawn(policy, scale) - plain(policy, scale)).abs().max() <= 1e-5
        assert batch_difference(policy, list(PROMPTS), scale) <= 2e-5
    assert (drawn(policy, GUIDED) - drawn(policy, 1.0)).abs().max() > 1e-3
    with pytest.raises(EtudeError, match=r"loads no LoRA: set lora\.rank to 0"):
        policy.add_lora(LoraConfig(), seed=0)
    policy.train_everything(keep_reference=False)
    x, told = torch.randn(1, *policy.latent_shape), policy.encode(["a"])
    output = policy.predict(x, policy.grid(4).timesteps[:1], told, GUIDED)
    torch.autograd.grad(output.square().mean(), list(policy.trainable().values()))
    moved(policy, 0.02).export(tmp_path / "model")
    pipeline = type(policy.pipeline).from_pretrained(tmp_path / "model", **policy.loading_arguments())
    assert (plain(policy, GUIDED, pipeline) - drawn(policy, GUIDED)).abs().max() <= 1e-5


def test_ernies_rewriter_of_prompts_is_not_loaded(tmp_path: Path) -> None:
    pipeline = ernie_image()
    words = pipeline.tokenizer
    pipeline.register_modules(pe=LlamaForCausalLM(LlamaConfig(**language(words))), pe_tokenizer=words)
    pipeline.save_pretrained(tmp_path)
    for outlined in (False, True):
        assert load(tmp_path, outline=outlined).pipeline.pe is None


def test_chroma_is_refused_with_gradient_checkpointing() -> None:
    with pytest.raises(EtudeError, match="gives Chroma other gradients"):
        ChromaPolicy(chroma(), resolution=16).enable_gradient_checkpointing()
