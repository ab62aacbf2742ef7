"""What a store no longer needs: found by marking from actions, pins and work in progress, and only then removed.

Marked are the artifacts that actions and pins stand for, everything that they were made from, and the files of plans
and receipts. Whatever else is older than a grace period is garbage. The grace period is for runs at work: a blob is
stored before the receipt or the manifest that names it, and a run that takes up earlier work renews its plan or its
checkpoint first (`Work.read_plan`, `Work.load_checkpoint`), which makes all of that work young.

What cannot be read cannot be marked from: while an action record, a manifest or a plan in use is damaged or missing, no
blob is garbage.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from storage.errors import DamagedObject, ObjectMissing
from storage.manifest import Manifest
from storage.objects.info import ObjectInfo
from storage.objects.object_store import ObjectStore
from storage.records import plan_files, read_record, receipt_files

WORK_FOLDERS = ("plans", "receipts", "checkpoints", "marks", "attempts")
"""Where work in progress stands, by action key; `attempts` has the marks of older versions."""


@dataclass(frozen=True)
class Garbage:
    """An object that nothing needs."""

    key: str
    size: int
    """Bytes."""
    reason: str
    """Why it is not needed."""


@dataclass(frozen=True)
class Collection:
    """What a garbage collection found, or removed."""

    garbage: list[Garbage]
    unreadable: list[str]
    """Records that say what is needed and cannot be read, a line each with the remedy; blobs stay meanwhile."""


@dataclass
class _Marks:
    """What the roots lead to."""

    live: set[str] = field(default_factory=set)
    """Digests of the blobs that something needs."""
    lost: set[str] = field(default_factory=set)
    """Digests of the artifacts whose manifest is damaged or missing."""
    unreadable: list[str] = field(default_factory=list)


def find_garbage(
    objects: ObjectStore,
    actions: Mapping[str, str | None],
    pins: Iterable[str],
    read_manifest: Callable[[str], Manifest],
    cutoff: float,
) -> Collection:
    """Find what can go; nothing is changed.

    Args:
        objects: of the store.
        actions: digest of each action's artifact by action key, None where the record is unreadable.
        pins: digests of the pinned artifacts.
        read_manifest: of a digest; ObjectMissing or DamagedObject where that is so.
        cutoff: seconds since the epoch; what is younger stays.
    """
    marks = _reachable(actions, pins, read_manifest)
    found: list[Garbage] = []
    for action_key, held in _work(objects).items():
        digest = actions.get(action_key)
        if action_key in actions and (digest is None or digest in marks.lost):
            continue  # what there is of it may be what its artifact can be made from again
        young = _newest(held) >= cutoff
        if young or action_key in actions:
            _mark_plan(objects, held, marks)
        if young:
            marks.live |= _received(objects, held)
        elif action_key in actions:
            # Plan and receipts stay: with them a damaged artifact is rebuilt shard by shard.
            left = [item for item in held if item.key.startswith(("checkpoints/", "marks/", "attempts/"))]
            found += _old(left, cutoff, "left over from a finished stage")
        else:
            found += _old(held, cutoff, "work that was given up")
    found += _old(objects.details("quarantine/"), cutoff, "set aside as damaged")
    found += _old(objects.unfinished(), cutoff, "never finished")
    if not marks.unreadable:
        blobs = [item for item in objects.details("cas/") if item.key.rpartition("/")[2] not in marks.live]
        found += _old(blobs, cutoff, "no artifact, pin or work needs it")
    return Collection(found, marks.unreadable)


def remove(objects: ObjectStore, found: Collection, look_again: Callable[[], Collection], cutoff: float) -> Collection:
    """Delete what was found and is still garbage: runs may have begun since.

    Records go first, blobs after them and after a second look, so that a run that takes up the same work meanwhile
    either keeps its shards or finds no receipt of them.

    Args:
        objects: of the store.
        found: by `find_garbage`.
        look_again: calls `find_garbage` once more.
        cutoff: as it was when `found` was found.

    Returns:
        What was removed.
    """
    removed: list[Garbage] = []
    by_action: dict[str, list[Garbage]] = {}
    for item in found.garbage:
        if item.key.startswith("cas/"):
            continue
        if (action_key := _action_key(item.key)) is not None:
            by_action.setdefault(action_key, []).append(item)
        else:
            objects.delete_any(item.key)
            removed.append(item)
    for action_key, records in by_action.items():
        if _newest(_work(objects, action_key).get(action_key, [])) < cutoff:
            objects.map(lambda item: objects.delete(item.key), records)
            removed += records

    again = look_again()
    still = {item.key for item in again.garbage}
    blobs = [item for item in found.garbage if item.key.startswith("cas/") and item.key in still]

    def delete_if_old(item: Garbage) -> bool:
        modified = objects.modified(item.key)
        if modified is None or modified >= cutoff:
            return False  # stored again since
        objects.delete(item.key)
        return True

    deleted = objects.map(delete_if_old, blobs)
    removed += [item for item, done in zip(blobs, deleted, strict=True) if done]
    return Collection(removed, again.unreadable)


def _reachable(
    actions: Mapping[str, str | None], pins: Iterable[str], read_manifest: Callable[[str], Manifest]
) -> _Marks:
    """Mark artifacts and all that they were made from."""
    marks, seen = _Marks(), set[str]()
    waiting: deque[tuple[str, str]] = deque()  # digests, each with what names it and how that is given up
    for action_key, digest in actions.items():
        if digest is None:
            marks.unreadable.append(
                f"actions/{action_key}.json is no action record: run its stage again, or "
                f"`musevl artifacts forget {action_key}`"
            )
        else:
            waiting.append((digest, f"action {action_key[:12]}: `musevl artifacts forget {digest[:12]}`"))
    waiting += [(digest, f"a pin: `musevl artifacts unpin {digest[:12]}`") for digest in pins]
    while waiting:
        digest, named_by = waiting.popleft()
        if digest in seen:
            continue
        seen.add(digest)
        marks.live.add(digest)
        try:
            manifest = read_manifest(digest)
        except (ObjectMissing, DamagedObject) as error:  # an outage ends the search instead
            what = "missing" if isinstance(error, ObjectMissing) else "damaged"
            marks.lost.add(digest)
            marks.unreadable.append(f"manifest {digest[:12]} is {what}: run its stage again, or give up {named_by}")
            continue
        marks.live |= {entry.sha256 for entry in manifest.files}
        made = f"{manifest.stage} {digest[:12]}, made from it: `musevl artifacts forget {digest[:12]}`"
        waiting += [(fed, made) for fed in manifest.inputs.values()]
    return marks


def _work(objects: ObjectStore, only: str = "") -> dict[str, list[ObjectInfo]]:
    """Plans, receipts, checkpoints and marks by action key; `only` those of keys that begin so."""
    held: dict[str, list[ObjectInfo]] = {}
    for folder in WORK_FOLDERS:
        for item in objects.details(f"{folder}/{only}"):
            if (action_key := _action_key(item.key)) is not None:
                held.setdefault(action_key, []).append(item)
    return held


def _action_key(key: str) -> str | None:
    """The action that an object in one of the folders of work belongs to, None for any other object."""
    folder, _, rest = key.partition("/")
    return rest.split("/")[0].removesuffix(".json") if folder in WORK_FOLDERS else None


def _newest(held: Iterable[ObjectInfo]) -> float:
    return max((item.modified for item in held), default=0.0)


def _mark_plan(objects: ObjectStore, held: Iterable[ObjectInfo], marks: _Marks) -> None:
    """Mark the files that a plan names: without them no shard could be made again."""
    for key in [item.key for item in held if item.key.startswith("plans/")]:
        try:
            marks.live |= {entry.sha256 for entry in plan_files(read_record(objects, key))}
        except ObjectMissing:
            continue  # given up, or being written, since it was listed
        except (ValueError, DamagedObject) as error:
            marks.unreadable.append(f"{key} is no plan ({error}): `musevl artifacts verify` sets it aside")


def _received(objects: ObjectStore, held: Iterable[ObjectInfo]) -> set[str]:
    """Digests of the files that receipts name; unreadable receipts name none, as for a run that resumes."""

    def digests(key: str) -> set[str]:
        try:
            return {entry.sha256 for entry in receipt_files(read_record(objects, key))}
        except (ValueError, DamagedObject, ObjectMissing):
            return set()

    return set[str]().union(*objects.map(digests, [item.key for item in held if item.key.startswith("receipts/")]))


def _old(items: Iterable[ObjectInfo], cutoff: float, reason: str) -> list[Garbage]:
    return [Garbage(item.key, item.size, reason) for item in items if item.modified < cutoff]
