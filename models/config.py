"""The base class of every configuration class, and types for common ranges of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, field_validator

BelowOne = Annotated[float, Field(ge=0, lt=1)]
"""A number in [0, 1), such as a decay rate."""
Fraction = Annotated[float, Field(ge=0, le=1)]
"""A number in [0, 1]."""
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
"""A number in (0, 1]."""


def _in_order(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("input should be the smaller and then the larger number")
    return pair


InOrder = AfterValidator(_in_order)
"""Validator for pairs that are the lower and the upper end of a range."""


@dataclass(frozen=True)
class CountsByContent:
    """Marks a field whose value names either weights in a hub, or a local file or folder.

    A hub's name enters a result's identity as it is written. Of a file or folder the content enters, never the path.
    """

    prefix: str = ""
    """Prefix that marks a path in this field; a value without the prefix is not a path."""

    def path(self, value: str) -> str | None:
        """Return the path that a value names, or None if it names no path."""
        return value.removeprefix(self.prefix) if value.startswith(self.prefix) else None


def told_apart_by_kind(default: str) -> Discriminator:
    """Tells the config classes of a union apart by their field `kind`; one without it is of the default kind.

    Args:
        default: the kind that need not be named; each class of the union has its kind as its `Tag`.
    """

    def kind_of(value: Any) -> Any:
        return value.get("kind", default) if isinstance(value, Mapping) else getattr(value, "kind", default)

    return Discriminator(kind_of)


_LARGEST_INTEGER = 2**63 - 1
_LARGEST_FLOAT = 3.4e38


class Config(BaseModel):
    """Immutable configuration that refuses values that cannot work as soon as it is read.

    It refuses unknown fields, so that a misspelt field is an error and not a silent default, and numbers that are
    infinite or NaN, or that do not fit into the 64-bit integers and 32-bit floats that tensors hold.
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
    """Yield the numbers of a field: its value, or those inside its collections; nested configs check their own."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, Mapping):
        yield from _numbers(list(value.values()))


def configs_in(annotation: Any) -> list[type[Config]]:
    """Find the config classes in a field's type: the type itself, members of a union, items of a collection."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [found for argument in getattr(annotation, "__args__", ()) for found in configs_in(argument)]
