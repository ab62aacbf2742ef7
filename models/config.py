"""The base of every configuration class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole, 0 to 1."""
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
"""A part of a whole that is not nothing."""


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


class Config(BaseModel):
    """Immutable configuration that refuses unknown fields, so that a misspelt field is an error and not a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
