"""The base of every configuration class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

BelowOne = Annotated[float, Field(ge=0, lt=1)]
"""A decay rate, or another part of a whole that is never all of it."""
Fraction = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole, 0 to 1."""
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
"""A part of a whole that is not nothing."""


def _in_order(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("input should be the smaller and then the larger number")
    return pair


InOrder = AfterValidator(_in_order)
"""For pairs that are the ends of a range."""


@dataclass(frozen=True)
class CountsByContent:
    """Marks a field that names weights in a hub, or a file or folder of this machine.

    A hub's name is part of a result's identity as it stands; of a file or folder it is the content, never the place.
    """

    prefix: str = ""
    """What a path begins with in this field; a value without it is no path."""

    def path(self, value: str) -> str | None:
        """The path that a value names, if there is one."""
        return value.removeprefix(self.prefix) if value.startswith(self.prefix) else None


_LARGEST_INTEGER = 2**63 - 1
_LARGEST_FLOAT = 3.4e38


class Config(BaseModel):
    """Immutable configuration that refuses what cannot work when it is read.

    Unknown fields, so that a misspelt field is an error and not a default; numbers that are infinite or not a number,
    or that 64-bit integers and 32-bit floats, all that tensors hold, cannot take.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _check_range(cls, value: Any) -> Any:
        for number in _numbers(value):
            if abs(number) > (_LARGEST_INTEGER if isinstance(number, int) else _LARGEST_FLOAT):
                raise ValueError("input should be a number that fits 64-bit integers or 32-bit floats")
        return value


def _numbers(value: Any) -> Iterator[int | float]:
    """The numbers of a field: itself, or those in its collections; other configs check their own."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, Mapping):
        yield from _numbers(list(value.values()))
