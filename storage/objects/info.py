"""What a listing says of an object."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectInfo:
    """One object."""

    key: str
    size: int
    """Bytes."""
    modified: float
    """When it was written, seconds since the epoch."""
