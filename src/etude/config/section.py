"""The base of every section of settings: unknown keys, infinite numbers, stray truth values and texts for numbers are errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo
from pydantic.functional_validators import field_validator

from etude.config.yaml_text import Word


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_what_it_looks_like(cls, value: Any, info: ValidationInfo) -> Any:
        return check_truth(value, cls.model_fields[info.field_name or ""].annotation)


def check_truth(value: Any, annotation: Any) -> Any:
    """The value of a field, after a look for truth values and texts where the field holds none, and for words of YAML 1.1."""
    values = value if isinstance(value, list | tuple) else [value]
    inside = value.items() if isinstance(value, dict) else ((None, each) for each in values)
    for key, each in inside:
        if isinstance(each, bool) and not _takes_truth(annotation):
            raise ValueError("true and false are no numbers and no texts; write the number, or the text in quotes")
        if isinstance(each, Word) and "Any" in str(annotation):
            raise ValueError(f"{each} may mean a truth value or a text; write true or false, or the text in quotes")
        if (
            isinstance(each, str)
            and not isinstance(each, Word)
            and _misread(each)
            and not _takes_text(annotation, each)
        ):
            where = "" if key is None else f"{key}: "
            raise ValueError(f"{where}the text '{each}' is no number and no truth value; write it without quotes")
    return value


def _misread(text: str) -> bool:
    """Whether pydantic would take a text for a number or a truth value."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return text.strip().lower() in {"true", "false", "yes", "no", "on", "off", "t", "f", "y", "n"}


def _takes_text(annotation: Any, text: str) -> bool:
    """Whether a field of this type may hold the text itself."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return text in parts
    if origin is Annotated:
        parts = parts[:1]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        parts = parts[1:]
    if not parts:
        return annotation not in (int, float, bool, type(None), Ellipsis)
    return any(_takes_text(part, text) for part in parts)


def _takes_truth(annotation: Any) -> bool:
    """Whether a field of this type may hold true or false, or a section, which checks its own fields."""
    if annotation in (bool, Any) or (isinstance(annotation, type) and issubclass(annotation, Section)):
        return True
    return any(_takes_truth(part) for part in get_args(annotation))
