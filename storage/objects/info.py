"""The entry of an object in a listing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectInfo:
    """Key, size and age of one object."""

    key: str
    size: int
    """Size in bytes."""
    modified: float
    """Time of the last write, in seconds since the epoch."""
