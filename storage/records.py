"""The store's small JSON records: what actions, pins, plans, receipts, checkpoints and runs say.

A record begins with a checksum of all the rest, so that a flipped bit anywhere in it is seen, and the record is taken
for absent. Records that older versions wrote have none and are read as they are.
"""

import json
import logging
import re
from typing import Any

from storage.digests import canonical_json, is_sha256, sha256_bytes
from storage.errors import DamagedObject, ObjectMissing
from storage.manifest import FileEntry
from storage.objects.object_store import ObjectStore

logger = logging.getLogger(__name__)

CHECKSUM = "checksum"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HEAD = b'{"checksum":"'
_HEAD_BYTES = len(_HEAD) + 64 + len(b'"')
_RUN_FIELDS: dict[str, type | tuple[type, ...]] = {
    "id": str, "event": str, "run_id": str, "recipe": str, "stage": str, "action_key": str, "artifact": str,
    "finished": str, "hit": bool, "seconds": (int, float), "machine": dict,
}  # fmt: skip
"""What readers of run records rely on, where a field is there."""


def record_bytes(record: dict[str, Any]) -> bytes:
    """Spell a record with its checksum: the sha256 of its canonical JSON, put in front of it.

    Raises:
        ValueError: it is not JSON, or has a field of that name.
    """
    if CHECKSUM in record:
        raise ValueError(f"a record has a field {CHECKSUM!r}, the name of what the store adds; give it another name")
    plain = canonical_json(record)
    head = _HEAD + sha256_bytes(plain).encode() + b'"'
    return head + (b"," + plain[1:] if record else b"}")


def parse_record(data: bytes) -> dict[str, Any]:
    """Read what `record_bytes` wrote, or a record without a checksum, as older versions wrote them.

    Raises:
        ValueError: the bytes are no JSON object, or not those that the checksum was taken of.
    """
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it is a JSON {type(value).__name__} instead of an object")
    rest = data[_HEAD_BYTES:]
    found = sha256_bytes(b"{" + rest.removeprefix(b",")).encode()
    if data[: _HEAD_BYTES + 1] == _HEAD + found + b'"' + (b"," if len(value) > 1 else b"}"):
        del value[CHECKSUM]
    # The name itself may be what is damaged
    elif CHECKSUM in value or found in data[:_HEAD_BYTES]:
        raise ValueError("its checksum is not that of its contents")
    return value


def has_checksum(data: bytes) -> bool:
    """Say whether a readable record has a checksum."""
    return data.startswith(_HEAD)


def checked_name(name: str, what: str) -> str:
    """Return a name that may stand in a key; ValueError, naming `what` it is of, when it may not."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what} {name!r} is no plain name; use letters, digits, '.', '_' and '-'")
    return name


def read_record(objects: ObjectStore, key: str) -> dict[str, Any]:
    """Return the record of that key; DamagedObject when it is not JSON or its checksum is wrong."""
    data = objects.read(key)
    try:
        return parse_record(data)
    except ValueError as error:
        raise DamagedObject(
            f"{key} in the store {objects.uri} is damaged ({error}); remove it and run the stage again"
        ) from error


def read_pins(objects: ObjectStore) -> dict[str, str]:
    """Return the note of every pinned artifact, by digest."""

    def note_of(key: str) -> str | None:
        try:
            return str(read_record(objects, key).get("note", ""))
        except ObjectMissing:
            return None  # taken away since it was listed
        except DamagedObject:
            return "(its note is damaged)"  # what counts is the name of the record

    keys = {digest: key for key in objects.list("pins/") if is_sha256(digest := pinned_digest(key))}
    notes = zip(keys, objects.map(note_of, keys.values()), strict=True)
    return {digest: note for digest, note in notes if note is not None}


def pinned_digest(key: str) -> str:
    """Return what the name of a pin's record says is pinned."""
    return key.removeprefix("pins/").removesuffix(".json")


def action_digest(record: dict[str, Any]) -> str:
    """Return the digest of the artifact that an action stands for; ValueError when the record has none."""
    digest = record.get("manifest")
    if not isinstance(digest, str) or not is_sha256(digest):
        raise ValueError(f"its manifest is {digest!r} instead of a sha256")
    return digest


def plan_files(plan: dict[str, Any]) -> list[FileEntry]:
    """Return the files that a plan needs, its values that are objects; ValueError when one is no file entry."""
    return [FileEntry.from_json(value) for value in plan.values() if isinstance(value, dict)]


def receipt_files(receipt: dict[str, Any]) -> list[FileEntry]:
    """Return the files of a finished shard; ValueError when they are not a list of file entries."""
    files = receipt.get("files")
    if not isinstance(files, list):
        raise ValueError(f"receipt has files {files!r}; give a list of entries with path, size and sha256")
    return [FileEntry.from_json(entry) for entry in files]


def read_runs(objects: ObjectStore, limit: int | None) -> list[dict[str, Any]]:
    """Return the records of runs, newest first, at most `limit` of them; a damaged one is left out with a warning."""

    def read(key: str) -> dict[str, Any] | None:
        try:
            run = parse_record(objects.read(key))
            check_run(run)
        except ObjectMissing:
            return None  # removed since it was listed
        except (ValueError, DamagedObject) as error:
            logger.warning("skipped %s, the damaged record of a run: %s", key, error)
            return None
        return run

    runs = objects.map(read, objects.list("runs/")[::-1][:limit])
    return [run for run in runs if run is not None]


def check_run(run: dict[str, Any]) -> None:
    """Raise ValueError where a field of a run's record is not of the type that its readers rely on."""
    for name, kind in _RUN_FIELDS.items():
        if name in run and not isinstance(run[name], kind):
            raise ValueError(f"its {name} is {run[name]!r}")
