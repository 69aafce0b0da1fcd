"""The embedded models: small trained models, ordinary diffusers directories inside the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from etude.errors import unknown

_ROOT = Path(__file__).parent / "checkpoints"


def names() -> list[str]:
    """Names of the embedded models."""
    return sorted(index.parent.name for index in _ROOT.glob("*/model_index.json"))


def path(name: str) -> Path:
    """Directory of an embedded model, for any diffusers `from_pretrained`.

    Raises:
        EtudeError: there is no embedded model of that name.
    """
    if name not in names():
        raise unknown("embedded model", name, names())
    return _ROOT / name


def models() -> list[dict[str, Any]]:
    """The card of each embedded model: its pipeline, data, licence and quality figures."""
    return [json.loads((path(name) / "card.json").read_text(encoding="utf-8")) for name in names()]
