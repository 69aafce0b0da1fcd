"""The base of every section of settings: unknown keys, infinite numbers, stray truth values and texts for numbers are errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

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
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    for each in inside:
        if isinstance(each, bool) and not _takes_truth(annotation):
            raise ValueError("true and false are no numbers and no texts; write the number, or the text in quotes")
        if isinstance(each, Word) and "Any" in str(annotation):
            raise ValueError(f"{each} may mean a truth value or a text; write true or false, or the text in quotes")
        if isinstance(each, str) and not isinstance(each, Word) and _takes_numbers_alone(annotation):
            raise ValueError("a text is no number and no truth value; write it without quotes")
    return value


def _takes_numbers_alone(annotation: Any) -> bool:
    """Whether each value of a field of this type is a number or a truth value, or null."""
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        parts = parts[:1]
    if isinstance(get_origin(annotation), type) and issubclass(get_origin(annotation), Mapping):
        parts = parts[1:]
    if not parts:
        return annotation in (int, float, bool)
    return all(_takes_numbers_alone(part) for part in parts if part not in (type(None), Ellipsis))


def _takes_truth(annotation: Any) -> bool:
    """Whether a field of this type may hold true or false, or a section, which checks its own fields."""
    if annotation in (bool, Any) or (isinstance(annotation, type) and issubclass(annotation, Section)):
        return True
    return any(_takes_truth(part) for part in get_args(annotation))
