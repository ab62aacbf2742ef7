"""The base of every configuration class."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Immutable configuration that refuses unknown fields, so that a misspelt field is an error and not a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
