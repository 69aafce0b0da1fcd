"""The base of every section of settings: unknown keys, infinite numbers and stray truth values are errors."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo
from pydantic.functional_validators import field_validator

from etude.config.yaml_text import Word


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        return check_truth(value, cls.model_fields[info.field_name or ""].annotation)


def check_truth(value: Any, annotation: Any) -> Any:
    """The value of a field, after a look for truth values where the field holds none, and for words of YAML 1.1."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    for each in inside:
        if isinstance(each, bool) and not _takes_truth(annotation):
            raise ValueError("true and false are no numbers and no texts; write the number, or the text in quotes")
        if isinstance(each, Word) and "Any" in str(annotation):
            raise ValueError(f"{each} may mean a truth value or a text; write true or false, or the text in quotes")
    return value


def _takes_truth(annotation: Any) -> bool:
    """Whether a field of this type may hold true or false, or a section, which checks its own fields."""
    if annotation in (bool, Any) or (isinstance(annotation, type) and issubclass(annotation, Section)):
        return True
    return any(_takes_truth(part) for part in get_args(annotation))
