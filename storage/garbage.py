"""What a store no longer needs: found by marking from actions, pins and work in progress, and only then removed.

Marked are the artifacts that actions and pins stand for, everything that they were made from, and the shards of plans
whose action is not committed yet. Whatever else is older than a grace period is garbage. The grace period is for runs
at work: a blob is stored before the receipt or the manifest that names it.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from storage.errors import DamagedObject, ObjectMissing
from storage.manifest import Manifest
from storage.object_info import ObjectInfo
from storage.objects import ObjectStore

WORK_FOLDERS = ("plans", "receipts", "checkpoints", "attempts")
"""Where work in progress stands, by action key."""


@dataclass(frozen=True)
class Garbage:
    """An object that nothing needs."""

    key: str
    size: int
    """Bytes."""
    reason: str
    """Why it is not needed."""


def find_garbage(
    objects: ObjectStore,
    roots: Iterable[str],
    committed: set[str],
    read_manifest: Callable[[str], Manifest],
    cutoff: float,
) -> list[Garbage]:
    """Find what can go; nothing is changed.

    Args:
        objects: of the store.
        roots: digests of the artifacts that actions and pins stand for.
        committed: keys of the actions that have a result.
        read_manifest: of a digest; ObjectMissing or DamagedObject where that is so.
        cutoff: seconds since the epoch; what is younger stays.
    """
    live = _reachable(roots, read_manifest)
    found: list[Garbage] = []
    for action_key, held in _work(objects).items():
        if action_key in committed or max(item.modified for item in held) >= cutoff:
            live |= _planned(objects, held)
        if action_key in committed:
            # Receipts stay: with them a damaged artifact is rebuilt shard by shard.
            left = [item for item in held if item.key.startswith(("checkpoints/", "attempts/"))]
            found += _old(left, cutoff, "left over from a finished stage")
        elif max(item.modified for item in held) >= cutoff:
            live |= _received(objects, held)
        else:
            found += _old(held, cutoff, "work that was given up")
    found += _old(objects.details("quarantine/"), cutoff, "set aside as damaged")
    found += _old(objects.unfinished(), cutoff, "never finished")
    blobs = [item for item in objects.details("cas/") if item.key.rpartition("/")[2] not in live]
    return found + _old(blobs, cutoff, "no artifact, pin or work needs it")


def remove(objects: ObjectStore, garbage: Iterable[Garbage]) -> None:
    """Delete what was found, in its order: blobs go after the records that may name them."""
    objects.map(lambda item: objects.delete_any(item.key), garbage)


def _reachable(roots: Iterable[str], read_manifest: Callable[[str], Manifest]) -> set[str]:
    """Digests of the blobs of artifacts and of all that they were made from."""
    live: set[str] = set()
    waiting = list(roots)
    while waiting:
        digest = waiting.pop()
        if digest in live:
            continue
        live.add(digest)
        try:
            manifest = read_manifest(digest)
        except (ObjectMissing, DamagedObject):
            continue  # `verify` deals with it; its own blob, if any, stays. An outage ends the search instead
        live |= {entry.sha256 for entry in manifest.files}
        waiting += manifest.inputs.values()
    return live


def _work(objects: ObjectStore) -> dict[str, list[ObjectInfo]]:
    """Plans, receipts and checkpoints by action key."""
    held: dict[str, list[ObjectInfo]] = {}
    for folder in WORK_FOLDERS:
        for item in objects.details(f"{folder}/"):
            action_key = item.key.split("/")[1].removesuffix(".json")
            held.setdefault(action_key, []).append(item)
    return held


def _planned(objects: ObjectStore, held: Iterable[ObjectInfo]) -> set[str]:
    """Digests of the files that plans name (`rows`): without them no shard could be made again."""
    digests: set[str] = set()
    for data in objects.map(objects.read, [item.key for item in held if item.key.startswith("plans/")]):
        try:
            digests.add(json.loads(data)["rows"]["sha256"])
        except (ValueError, KeyError, TypeError):
            continue
    return digests


def _received(objects: ObjectStore, held: Iterable[ObjectInfo]) -> set[str]:
    """Digests of the files that receipts name; unreadable receipts name none, as for a run that resumes."""
    digests: set[str] = set()
    keys = [item.key for item in held if item.key.startswith("receipts/")]
    for data in objects.map(objects.read, keys):
        try:
            digests |= {entry["sha256"] for entry in json.loads(data)["files"]}
        except (ValueError, KeyError, TypeError):
            continue
    return digests


def _old(items: Iterable[ObjectInfo], cutoff: float, reason: str) -> list[Garbage]:
    return [Garbage(item.key, item.size, reason) for item in items if item.modified < cutoff]
