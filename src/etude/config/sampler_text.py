"""A sampler in an option of a command: `heun,steps=10,guidance=4,size=512` or `eta=1.2,kernel=cps`."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from etude.config.sampler_settings import SamplerSettings
from etude.config.tree import explain
from etude.config.yaml_text import parse_yaml
from etude.errors import EtudeError


def parse_sampler(text: str, beside: SamplerSettings | None = None) -> SamplerSettings:
    """The settings in a text such as `heun,steps=10,guidance=4` or `eta=1.2,kernel=cps,steps=10`.

    A part without an equals sign is the solver.

    Args:
        text: parts between commas, each `key=value`.
        beside: settings that give steps, guidance and size where the text does not. Default: 20
            steps, guidance 5, the pipeline's own size.

    Raises:
        EtudeError: a part has no value or stands twice, a key is unknown, or a value cannot be used.
    """
    place, tree = f"the sampler '{text[:200]}'", {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        key, value = (key, value) if equals else ("solver", key)
        if not value or key in tree:
            problem = "stands twice" if key in tree else "has no value"
            raise EtudeError(f"{place}: {key or 'a part'} {problem}; write it as in heun,steps=10,guidance=4.")
        tree[key] = value if key in {"solver", "kernel", "first_step"} else parse_yaml(value, place)
    return check_sampler(tree, place).filled(beside)


def check_sampler(tree: dict[str, Any], place: str) -> SamplerSettings:
    """Validate plain values as settings of a sampler; errors name them by `place`."""
    try:
        return SamplerSettings.model_validate(tree)
    except ValidationError as error:
        raise explain(error, place, SamplerSettings) from None
