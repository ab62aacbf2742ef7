"""Verification of the store's content: damaged objects are moved to quarantine, so that the next run rebuilds them."""

import logging
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from storage.blobs import Blobs, blob_key
from storage.digests import is_sha256
from storage.errors import DamagedObject, ObjectMissing, StoreError
from storage.manifest import FileEntry, Manifest
from storage.objects.object_store import ObjectStore
from storage.records import check_run, has_checksum, parse_record, pinned_digest, plan_files, receipt_files

logger = logging.getLogger(__name__)

_Read = TypeVar("_Read")

_MISSING = "missing; the next run of its stage rebuilds it"


@dataclass(frozen=True)
class Problem:
    """An object that is damaged or missing."""

    digest: str
    """Digest of the artifact; '' for an action record, a plan, a receipt and their files."""
    path: str
    """Path of the file in the artifact, or 'manifest'; for records the key, followed by the path of the file if any."""
    reason: str
    """What is wrong, and what was done about it."""


class Verifier:
    """Reads every byte that it is asked to check, once, and collects the problems.

    Damaged objects are moved to quarantine if the store is writable; otherwise they stay where they are.

    Args:
        objects: the store's objects.
        blobs: the store's blobs.
        on_file: called after each file, even if its blob was read before under another name.
    """

    def __init__(self, objects: ObjectStore, blobs: Blobs, on_file: Callable[[FileEntry], object]) -> None:
        self._objects = objects
        self._on_file = on_file
        self._blobs = blobs
        self._known: dict[str, str | None] = {}
        """The problem of each blob, or None, by sha256, so that blobs that artifacts share are read once."""
        self.problems: list[Problem] = []
        self._num_without_checksum = 0

    def check_store(self, actions: Mapping[str, str | None], pins: Iterable[str]) -> None:
        """Check everything that a garbage collection keeps, except checkpoints, which are checked when they are loaded.

        Args:
            actions: digest of each action's artifact by action key, None where the record is unreadable.
            pins: digests of the pinned artifacts.
        """
        for action_key, digest in actions.items():
            if digest is None:
                # It is not moved: as long as it is there, the garbage collection knows that something is missing.
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
        for key in self._objects.list("pins/"):
            self._check_pin(key)
        for key in self._objects.list("runs/"):
            self._check_run(key)
        if self._num_without_checksum:
            logger.warning(
                "%d records are of a version without checksums: they are readable, and whether they say what was "
                "written is not known", self._num_without_checksum,
            )  # fmt: skip

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
        def set_aside(reason: str) -> None:
            self._report(key, f"damaged: {reason}; {self._set_aside(key, 'the next run of its stage plans again')}")

        if (files := self._record(key, plan_files, set_aside)) is not None:
            self._check_files(key, files, finished=False)

    def _check_receipt(self, key: str, *, finished: bool) -> None:
        def say(reason: str) -> None:
            self._report(key, f"damaged: {reason}; the next run of its stage makes this shard again")

        if (files := self._record(key, receipt_files, say)) is not None:
            self._check_files(key, files, finished=finished)

    def _check_pin(self, key: str) -> None:
        def say(reason: str) -> None:
            self._report(key, f"damaged: {reason}; it still pins, `musevl artifacts pin` writes its note again")

        if is_sha256(pinned_digest(key)):
            self._record(key, lambda pin: None, say)
        else:
            self._report(key, "its name is no digest, so it pins nothing; remove it")

    def _check_run(self, key: str) -> None:
        def set_aside(reason: str) -> None:
            self._report(key, f"damaged: {reason}; {self._set_aside(key, 'nothing needs the record of a run')}")

        self._record(key, check_run, set_aside)

    def _record(
        self, key: str, read: Callable[[dict[str, Any]], _Read], damaged: Callable[[str], None]
    ) -> _Read | None:
        """Parse a record with `read`; return None if it is gone or damaged, and report damage to `damaged`."""
        try:
            data = self._objects.read(key)
            found = read(parse_record(data))
        except ObjectMissing:
            return None  # removed since the keys were listed
        except (ValueError, DamagedObject) as error:
            damaged(str(error))
            return None
        self._num_without_checksum += not has_checksum(data)
        return found

    def _check_files(self, record: str, files: Iterable[FileEntry], *, finished: bool) -> None:
        for entry in files:
            if entry.sha256 in self._known:
                continue  # already reported for an artifact that has it too
            reason = self._check(entry)
            # The garbage collection removes shards that a finished stage no longer needs.
            if reason is not None and not (finished and reason == _MISSING):
                self._report(f"{record} {entry.path}", reason)

    def _report(self, path: str, reason: str) -> None:
        self.problems.append(Problem("", path, reason))

    def _check(self, entry: FileEntry) -> str | None:
        reason = self._checked(entry)
        self._on_file(entry)
        return reason

    def _checked(self, entry: FileEntry) -> str | None:
        if entry.sha256 in self._known:
            return self._known[entry.sha256]
        reason = self._blobs.problem(entry)
        if reason == "missing":
            reason = _MISSING
        elif reason is not None:
            reason = f"{reason}; {self._set_aside(blob_key(entry.sha256), 'the next run of its stage rebuilds it')}"
        self._known[entry.sha256] = reason
        return reason

    def _set_aside(self, key: str, then: str) -> str:
        """Move a damaged object to quarantine; return a text that says where it is and what happens next."""
        try:
            return f"moved to {quarantine(self._objects, key)}, {then}"
        except StoreError as error:
            return f"it stays there, for it could not be set aside: {error}"


def quarantine(objects: ObjectStore, key: str) -> str:
    """Move an object to quarantine; return its new key."""
    new_key = f"quarantine/{key.rpartition('/')[2]}-{uuid.uuid4().hex[:8]}"
    objects.move(key, new_key)
    return new_key
