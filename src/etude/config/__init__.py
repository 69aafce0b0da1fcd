"""The configuration of a run: one typed tree, read from a built-in recipe or a YAML file and checked.

`sections` and `sampling_sections` declare every key, `tree` reads and changes configurations, and
`algorithm` gives the published name of the algorithm that a configuration describes.
"""

from __future__ import annotations

from etude.config.sampler_settings import SamplerSettings
from etude.config.sampler_text import check_sampler, parse_sampler
from etude.config.sampling_sections import SamplingConfig, WindowConfig
from etude.config.section import Section
from etude.config.sections import (
    LoraConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainConfig,
)
from etude.config.tree import (
    continuation,
    describe_fields,
    difference,
    leaves,
    load_config,
    parse_config,
    parse_rewards,
    recipe_names,
    recipe_text,
)

__all__ = [
    "LoraConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RolloutConfig",
    "SamplerSettings",
    "SamplingConfig",
    "Section",
    "TrainConfig",
    "WindowConfig",
    "check_sampler",
    "continuation",
    "describe_fields",
    "difference",
    "leaves",
    "load_config",
    "parse_config",
    "parse_rewards",
    "parse_sampler",
    "recipe_names",
    "recipe_text",
]
