"""Lines of plain diffusers that draw with a tuned model as etude does: ODE and SDE."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from os.path import expanduser
from typing import Any, NamedTuple

from etude import zoo
from etude.policies import TrainablePolicy
from etude.policies.loading import split_revision
from etude.policies.single_file import absent_parts, configuration, is_single_file
from etude.policies.source import ModelSource
from etude.policies.trial import OWN_SCHEDULERS
from etude.sampling.paths import VPPath
from etude.sampling.solver_path import SolverPath, first_order


def deployment_snippet(
    policy: TrainablePolicy, source: ModelSource, num_steps: int, guidance_scale: float, suffix: str = ""
) -> str:
    """Python that loads a policy's export and draws one picture with the ODE on etude's levels.

    Every argument whose default in the plain pipeline differs is spelt out: size, sequence length,
    and the scheduler where the model's own is not the ODE on these levels.

    Args:
        policy: after training; its `export_name` tells an adapter from a whole model.
        source: the base model, which an adapter is loaded on top of. An embedded one comes from the package.
        suffix: end of the directory's name after `export_name`.
    """
    adapter, tuned = policy.export_name == "lora", f"{policy.export_name}{suffix}"
    named = expanduser(source.name)
    embedded = adapter and named in zoo.names()
    model, revision = split_revision(named)
    loading: dict[str, Any] = {} if source.dtype == "float32" else {"torch_dtype": f"torch.{source.dtype}"}
    loading |= {name: repr(value) for name, value in policy.loading_arguments().items()}
    published = {"revision": revision, "variant": source.variant} if adapter else {}
    loading |= {name: repr(value) for name, value in published.items() if value is not None}
    if adapter and is_single_file(model):
        config = None if source.pipeline_config is None else expanduser(str(source.pipeline_config))
        classes, load = _single_file(policy, model, config, loading)
    else:
        place = f"zoo.path({model!r})" if embedded else repr(model if adapter else tuned)
        classes, load = {policy.pipeline_name: "diffusers"}, [f"pipe = {_loaded(policy.pipeline_name, place, loading)}"]
    if adapter:
        load.append(f"pipe.load_lora_weights({tuned!r})")
    load.append('pipe.to("cuda" if torch.cuda.is_available() else "cpu")')
    ode = ode_scheduler(policy, num_steps)
    imports = classes | ({ode.name: ode.package} if ode.package else {})
    scheduler = [f"# {ode.why}", *([_scheduler(ode.name, ode.settings)] if ode.package else [])]
    names = sorted(name for name, package in imports.items() if package == "diffusers")
    head = ["import torch", f"from diffusers import {', '.join(names)}"]
    if policy.scheduler_config["_class_name"] in OWN_SCHEDULERS and "GDDIMScheduler" not in imports:
        head.append("import etude  # whose scheduler the saved pipeline names")
    head += ["from etude import zoo"] if embedded else []
    head += [f"from {package} import {name}" for name, package in imports.items() if package != "diffusers"]
    return "\n".join([*head, "", *load, *scheduler, _picture(policy, num_steps, guidance_scale)])


def stochastic_scheduler(policy: TrainablePolicy) -> str:
    """The scheduler of etude that draws as the SDE on the model's path."""
    return "GDDIMScheduler" if isinstance(policy.path, VPPath) else "FlowMatchGDDIMScheduler"


def stochastic_snippet(
    policy: TrainablePolicy, num_steps: int, guidance_scale: float, kernel: str, eta: float, first_step: str
) -> str:
    """Python that follows `deployment_snippet` and draws with the SDE.

    The kernel applies with that eta at every step, as in an evaluation.
    """
    name = stochastic_scheduler(policy)
    levels = _vp_levels(policy.path, policy) if isinstance(policy.path, VPPath) else _flow_levels(policy)
    scheduler = _scheduler(name, {**levels, "eta": eta, "kernel": kernel, "first_step": first_step})
    return "\n".join([f"from etude import {name}", "", scheduler, _picture(policy, num_steps, guidance_scale)])


def _picture(policy: TrainablePolicy, num_steps: int, guidance_scale: float) -> str:
    call = {"num_inference_steps": num_steps, **policy.call_arguments(guidance_scale)}
    texts = {name: f"{value:g}" if isinstance(value, float) else repr(value) for name, value in call.items()}
    return f'image = pipe(prompt="a prompt", {_keywords(texts)}){policy.picture}'


def _single_file(
    policy: TrainablePolicy, model: str, pipeline_config: str | None, loading: dict[str, Any]
) -> tuple[dict[str, str], list[str]]:
    """The classes with their packages, and the lines that load a single file as etude does."""
    pipeline, (part, network), networks = policy.pipeline_name, policy.denoiser_names, policy.networks()
    absent = absent_parts(model, networks, part)
    precision = {name: value for name, value in loading.items() if name == "torch_dtype"}
    if set(absent) != networks.keys() - {part}:
        config = {"config": repr(pipeline_config)} if pipeline_config else {}
        # The pipeline's class finds text encoders in the configuration itself if the file has none, but no autoencoder.
        some = any(name.startswith("text_encoder") for name in networks.keys() - set(absent))
        names = {name: networks[name] for name in absent if name == "vae" or some}
        place = repr(configuration(model, pipeline_config)) if names else ""
        lines = [
            f"{name} = {_loaded(kind, place, {'subfolder': repr(name)} | precision)}" for name, kind in names.items()
        ]
        arguments = config | {name: name for name in names} | loading
        lines.append(f"pipe = {_loaded(pipeline, repr(model), arguments, 'from_single_file')}")
        packages = {kind: "diffusers" if name == "vae" else "transformers" for name, kind in names.items()}
        return packages | {pipeline: "diffusers"}, lines
    place = repr(configuration(model, pipeline_config))
    of_part = {"config": place, "subfolder": repr(part)} | precision
    return {network: "diffusers", pipeline: "diffusers"}, [
        f"{part} = {_loaded(network, repr(model), of_part, 'from_single_file')}",
        f"pipe = {_loaded(pipeline, place, {part: part} | loading)}",
    ]


def _loaded(name: str, place: str, arguments: Mapping[str, str], method: str = "from_pretrained") -> str:
    return f"{name}.{method}({place}{', ' if arguments else ''}{_keywords(arguments)})"


def _scheduler(name: str, settings: Mapping[str, Any]) -> str:
    texts = {key: repr(value) for key, value in settings.items()}
    return f"pipe.scheduler = {name}.from_config(pipe.scheduler.config, {_keywords(texts)})"


def _keywords(arguments: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items())


class OdeScheduler(NamedTuple):
    """A scheduler that is the ODE on the levels of `policy.grid(num_steps)`.

    Attributes:
        package: of its class, `diffusers` or `etude`. None: the pipeline's own scheduler is that ODE.
        settings: arguments of `from_config` that differ from the pipeline's own scheduler.
        why: a clause for the model card.
    """

    package: str | None
    name: str
    settings: Mapping[str, Any]
    why: str

    def put_into(self, pipeline: Any) -> None:
        """Puts the scheduler into a pipeline, and nothing into its configuration."""
        if self.package is not None:
            kind = getattr(import_module(self.package), self.name)
            pipeline.__dict__["scheduler"] = kind.from_config(pipeline.scheduler.config, **self.settings)


def ode_scheduler(policy: TrainablePolicy, num_steps: int) -> OdeScheduler:
    """The scheduler with which the plain pipeline draws the ODE of so many steps."""
    path, name = policy.path, "FlowMatchEulerDiscreteScheduler"
    if isinstance(path, VPPath):
        settings = _vp_levels(path, policy)
        if ddim_visits(path, num_steps):
            return OdeScheduler("diffusers", "DDIMScheduler", settings, "DDIM at eta 0 is the ODE.")
        why = (
            f"The ODE. Under {path.timestep_spacing} spacing diffusers' DDIM steps to levels that the next step does not "
            "start from."
        )
        return OdeScheduler("etude", "GDDIMScheduler", settings | {"eta": 0.0}, why)
    levels = _flow_levels(policy)
    if isinstance(path, SolverPath):
        solver = str(policy.scheduler_config["_class_name"])
        if solver in OWN_SCHEDULERS:
            return OdeScheduler(
                "etude", solver, levels | {"eta": 0.0}, "At eta 0 the model's own scheduler is the ODE."
            )
        why = "The model's own solver at order 1 is the ODE at the levels that the model was tuned on."
        return OdeScheduler("diffusers", solver, levels | first_order(solver, num_steps), why)
    if levels:
        why = "The ODE at the levels that the model was tuned on, whose shift is not that of its own scheduler."
    elif policy.scheduler_config.get("_class_name") == name and not policy.scheduler_config.get("stochastic_sampling"):
        why = "The pipeline's own scheduler is the ODE at the levels that the model was tuned on."
        return OdeScheduler(None, name, {}, why)
    else:
        why = "Euler steps of the flow are the ODE."
    return OdeScheduler("diffusers", name, {**levels, "stochastic_sampling": False}, why)


def _flow_levels(policy: TrainablePolicy) -> dict[str, Any]:
    """Settings that give a loaded flow scheduler the policy's levels. Empty: it has them already."""
    if policy.shift is None or policy.export_name != "lora":  # a whole model is saved with its scheduler
        return {}
    name = "flow_shift" if isinstance(policy.path, SolverPath) else "shift"
    return {name: policy.shift, "use_dynamic_shifting": False}


def _vp_levels(path: VPPath, policy: TrainablePolicy) -> dict[str, Any]:
    """Settings that give a VP scheduler the path's levels and switch clipping and thresholding off."""
    return path.scheduler_settings() | ({"thresholding": False} if policy.scheduler_config.get("thresholding") else {})


def ddim_visits(path: VPPath, num_steps: int) -> bool:
    """Whether diffusers' DDIM, with steps from t to t - T // N, visits exactly the path's levels."""
    if num_steps == 1 and path.timestep_spacing == "linspace":
        return False  # diffusers starts at timestep 0, where the network expects clean data
    timesteps = path.timesteps(num_steps)
    targets = timesteps - path.num_train_timesteps // num_steps
    return targets[:-1].tolist() == timesteps[1:].tolist() and int(targets[-1]) < 0
