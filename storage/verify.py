"""Re-hash what the store holds and set damaged bytes aside, so that the next run rebuilds them."""

import uuid
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from storage.blobs import Blobs, blob_key
from storage.errors import DamagedObject, ObjectMissing
from storage.manifest import FileEntry, Manifest
from storage.objects import ObjectStore
from storage.records import json_object, plan_files, receipt_files

_MISSING = "missing; the next run of its stage rebuilds it"


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was written."""

    digest: str
    """The artifact's digest; '' for an action record, a plan, a receipt and their files."""
    path: str
    """The file in the artifact, 'manifest' for that; the record's key, followed by the file's path where it is one."""
    reason: str
    """What is wrong and what was done about it."""


class Verifier:
    """Reads every byte that it is asked about, once, and collects what is wrong.

    Args:
        objects: the store's objects.
        blobs: the store's blobs.
    """

    def __init__(self, objects: ObjectStore, blobs: Blobs) -> None:
        self._objects = objects
        self._blobs = blobs
        self._known: dict[str, str | None] = {}
        """What is wrong with a blob, by sha256: blobs that artifacts share are read once."""
        self.problems: list[Problem] = []

    def check_store(self, actions: Mapping[str, str | None], pins: Iterable[str]) -> None:
        """Check all that a garbage collection keeps, but for checkpoints, which are checked when they are loaded.

        Args:
            actions: digest of each action's artifact by action key, None where the record is unreadable.
            pins: digests of the pinned artifacts.
        """
        for action_key, digest in actions.items():
            if digest is None:
                # It stays where it is: as long as it does, the garbage collection knows that something is missing.
                self._report(f"actions/{action_key}.json", "damaged: no action record; the next run writes it again")
        waiting = deque(sorted({*pins, *(digest for digest in actions.values() if digest is not None)}))
        seen: set[str] = set()
        while waiting:
            if (digest := waiting.popleft()) not in seen:
                seen.add(digest)
                manifest = self.check_artifact(digest)
                waiting += sorted(manifest.inputs.values()) if manifest is not None else []
        for key in self._objects.list("plans/"):
            self._check_plan(key)
        for key in self._objects.list("receipts/"):
            finished = actions.get(key.split("/")[1]) is not None
            self._check_receipt(key, finished=finished)

    def check_artifact(self, digest: str) -> Manifest | None:
        """Check an artifact's manifest and blobs; return its manifest unless that is damaged or missing."""
        size = self._objects.size(blob_key(digest))
        entry = FileEntry(path="manifest", size=size or 0, sha256=digest)
        if (reason := self._check(entry)) is not None:
            self.problems.append(Problem(digest, "manifest", reason))
            return None
        try:
            manifest = Manifest.from_bytes(self._blobs.read_bytes(entry))
        except (ObjectMissing, DamagedObject) as error:
            self.problems.append(Problem(digest, "manifest", str(error)))
            return None
        for file in manifest.files:
            if (reason := self._check(file)) is not None:
                self.problems.append(Problem(digest, file.path, reason))
        return manifest

    def _check_plan(self, key: str) -> None:
        try:
            files = plan_files(json_object(self._objects.read(key)))
        except ObjectMissing:
            return  # removed since it was listed
        except ValueError as error:
            moved_to = quarantine(self._objects, key)
            self._report(key, f"damaged: {error}; moved to {moved_to}, the next run of its stage plans again")
            return
        self._check_files(key, files, finished=False)

    def _check_receipt(self, key: str, *, finished: bool) -> None:
        try:
            files = receipt_files(json_object(self._objects.read(key)))
        except ObjectMissing:
            return
        except ValueError as error:
            self._report(key, f"damaged: {error}; the next run of its stage makes this shard again")
            return
        self._check_files(key, files, finished=finished)

    def _check_files(self, record: str, files: Iterable[FileEntry], *, finished: bool) -> None:
        for entry in files:
            if entry.sha256 in self._known:
                continue  # said of the artifact that has it too
            reason = self._check(entry)
            # A finished stage may have no more use for a shard, which the garbage collection has then taken.
            if reason is not None and not (finished and reason == _MISSING):
                self._report(f"{record} {entry.path}", reason)

    def _report(self, path: str, reason: str) -> None:
        self.problems.append(Problem("", path, reason))

    def _check(self, entry: FileEntry) -> str | None:
        if entry.sha256 in self._known:
            return self._known[entry.sha256]
        reason = self._blobs.problem(entry)
        if reason == "missing":
            reason = _MISSING
        elif reason is not None:
            moved_to = quarantine(self._objects, blob_key(entry.sha256))
            reason = f"{reason}; moved to {moved_to}, the next run of its stage rebuilds it"
        self._known[entry.sha256] = reason
        return reason


def quarantine(objects: ObjectStore, key: str) -> str:
    """Move an object out of the way; return its new key."""
    new_key = f"quarantine/{key.rpartition('/')[2]}-{uuid.uuid4().hex[:8]}"
    objects.move(key, new_key)
    return new_key
