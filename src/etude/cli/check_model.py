"""`etude check-model`: does a model do under etude what its plain pipeline does?"""

from __future__ import annotations

import typer

from etude.cli import options
from etude.cli.errors import Debug
from etude.cli.waiting import heavy_imports, quiet_libraries


def check_model(
    model: options.Model,
    guidance: options.Guidance = None,
    resolution: options.Resolution = None,
    shift: options.Shift = None,
    dtype: options.Dtype = None,
    offload: options.Offload = False,
    pipeline_config: options.PipelineConfig = None,
    variant: options.Variant = None,
    family: options.Family = None,
    debug: Debug = False,
) -> None:
    """Check that a model does under etude what its plain pipeline does, and trains what it says.

    A batch of unequal prompts is compared with one by one, guidance with none, the ODE with the
    plain pipeline's images, and the export of an adapter with what was trained; gradients must
    reach exactly the adapter. The first check that fails ends the command with one sentence and
    exit code 1. It costs about 40 evaluations of the network.

    Example: `etude check-model emoji-flux`
    """
    with heavy_imports():
        quiet_libraries()
        from etude.policies import model_check
        from etude.policies.loading import load_source
        from etude.policies.pipeline import PipelinePolicy
        from etude.policies.source import ModelSource
    source = ModelSource(
        model, None, dtype or "float32", resolution, shift, variant, pipeline_config, offload, family=family
    )
    policy = load_source(source)
    assert isinstance(policy, PipelinePolicy)
    for name, figure in model_check.check_model(policy, guidance):
        typer.echo(f"{name}: {figure}" if figure else name)
    typer.echo(f"{model} passes")
