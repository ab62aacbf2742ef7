"""Re-hash what the store holds and set damaged bytes aside, so that the next run rebuilds them."""

import uuid
from dataclasses import dataclass

from storage.blobs import Blobs, blob_key
from storage.errors import DamagedObject, ObjectMissing
from storage.manifest import FileEntry, Manifest
from storage.objects import ObjectStore


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was written."""

    digest: str
    """The artifact's digest; '' for an action whose record is unreadable."""
    path: str
    """The file in the artifact; 'manifest', or the action's key, for those."""
    reason: str
    """What is wrong and what was done about it."""


def quarantine(objects: ObjectStore, key: str) -> str:
    """Move an object out of the way; return its new key."""
    new_key = f"quarantine/{key.rpartition('/')[2]}-{uuid.uuid4().hex[:8]}"
    objects.move(key, new_key)
    return new_key


def verify_artifact(objects: ObjectStore, blobs: Blobs, digest: str, known: dict[str, str | None]) -> list[Problem]:
    """Re-hash an artifact's manifest and blobs.

    Args:
        objects: the store's objects.
        blobs: the store's blobs.
        digest: the artifact's, in full.
        known: results by sha256 of earlier calls; blobs that artifacts share are read once. Added to.
    """
    size = objects.size(blob_key(digest))
    entry = FileEntry(path="manifest", size=size or 0, sha256=digest)
    if (reason := _check(objects, blobs, entry, known)) is not None:
        return [Problem(digest, "manifest", reason)]
    try:
        manifest = Manifest.from_bytes(blobs.read_bytes(entry))
    except (ObjectMissing, DamagedObject) as error:
        return [Problem(digest, "manifest", str(error))]
    problems = []
    for file in manifest.files:
        if (reason := _check(objects, blobs, file, known)) is not None:
            problems.append(Problem(digest, file.path, reason))
    return problems


def _check(objects: ObjectStore, blobs: Blobs, entry: FileEntry, known: dict[str, str | None]) -> str | None:
    if entry.sha256 in known:
        return known[entry.sha256]
    reason = blobs.problem(entry)
    if reason == "missing":
        reason = "missing; the next run of its stage rebuilds it"
    elif reason is not None:
        moved_to = quarantine(objects, blob_key(entry.sha256))
        reason = f"{reason}; moved to {moved_to}, the next run of its stage rebuilds it"
    known[entry.sha256] = reason
    return reason
