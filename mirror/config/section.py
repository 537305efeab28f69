"""The base of every section of the settings, and the types of values that sections share.

Lives here: how a size, a duration or a ratio is read and written, and the error of one key. Must
not know: which sections and keys there are.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from mirror.config import values
from mirror.config.values import format_duration, format_size

_as_duration = PlainSerializer(format_duration, return_type=str, when_used="json")
_read_duration = BeforeValidator(values.parse_duration)
Size = Annotated[
    int,
    BeforeValidator(values.parse_size),
    PlainSerializer(format_size, return_type=str, when_used="json"),
    WithJsonSchema(values.SIZE_SCHEMA),
]
"""Bytes, or bytes per second."""
Duration = Annotated[float, _read_duration, _as_duration, WithJsonSchema(values.DURATION_SCHEMA)]
"""Seconds; 0 and ``inf`` are allowed."""
FiniteDuration = Annotated[
    float,
    AfterValidator(values.check_finite),
    _read_duration,
    _as_duration,
    WithJsonSchema(values.FINITE_DURATION_SCHEMA),
]
"""Seconds; 0 is allowed."""
PositiveDuration = Annotated[
    float,
    AfterValidator(values.check_positive),
    _read_duration,
    _as_duration,
    WithJsonSchema(values.POSITIVE_DURATION_SCHEMA),
]
"""Seconds; neither 0 nor ``inf``."""
Age = Annotated[
    float,
    AfterValidator(values.check_finite),
    BeforeValidator(values.parse_age),
    PlainSerializer(values.format_age, return_type=str, when_used="json"),
    WithJsonSchema(values.AGE_SCHEMA),
]
"""Seconds after which something is removed; 0 is allowed. The text of it must have a unit."""
Ratio = Annotated[float, BeforeValidator(values.parse_ratio), WithJsonSchema(values.RATIO_SCHEMA)]
"""More than 0 and at most 1."""
NonEmptyText = Annotated[str, AfterValidator(values.check_not_empty)]
FilePath = Annotated[str, AfterValidator(values.check_path)]
Host = Annotated[str, AfterValidator(values.check_host)]
KeyPath: TypeAlias = tuple[str | int, ...]
"""Keys and list indexes from the root to one value: ``("upstreams", "docker.io", "ca")``."""


def key_error(below: KeyPath, reason: str) -> PydanticCustomError:
    """Return the error of one key of a section. ``below``: the path of the key in the section."""
    return PydanticCustomError("key_error", "{reason}", {"reason": reason, "below": below})


class Section(BaseModel):
    """The base of every section. Unknown keys are errors, and values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid")
