"""The base of every configuration class."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole, 0 to 1."""


class Config(BaseModel):
    """Immutable configuration that refuses unknown fields, so that a misspelt field is an error and not a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
