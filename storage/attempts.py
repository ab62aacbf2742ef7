"""Marks of shards that are being worked on, so that a worker which died on a shard is known to the next one.

`attempts/KEY/SHARD/UUID.json` is written before the work and removed after it, also when it fails with an exception.
What is left over stands for a process that died: killed, out of memory, or crashed by one of its inputs.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from storage.digests import canonical_json
from storage.objects.object_store import ObjectStore

FOLDER = "attempts"


@contextmanager
def attempt(objects: ObjectStore, action_key: str, shard: str) -> Iterator[int]:
    """Mark a shard as being worked on for the length of the block.

    Yields:
        How many earlier attempts never ended. One that is still running elsewhere counts too.
    """
    prefix = f"{FOLDER}/{action_key}/{shard}/"
    earlier = len(objects.list(prefix))
    name = uuid.uuid4().hex
    objects.put(f"{prefix}{name}.json", canonical_json({"attempt": name}))
    try:
        yield earlier
    finally:
        objects.delete(f"{prefix}{name}.json")


def forget(objects: ObjectStore, action_key: str, shard: str) -> None:
    """Remove the marks of a shard that is done."""
    objects.delete_prefix(f"{FOLDER}/{action_key}/{shard}/")
