"""The store's small JSON records: what actions, pins, plans and receipts name."""

import json
from typing import Any

from storage.digests import is_sha256
from storage.errors import DamagedObject, ObjectMissing
from storage.manifest import FileEntry
from storage.objects import ObjectStore


def json_object(data: bytes) -> dict[str, Any]:
    """Read a record; ValueError when the bytes are no JSON object."""
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"it is a JSON {type(value).__name__} instead of an object")
    return value


def read_record(objects: ObjectStore, key: str) -> dict[str, Any]:
    """Return the record of that key; DamagedObject when it is not JSON."""
    data = objects.read(key)
    try:
        return json_object(data)
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

    keys = objects.list("pins/")
    notes = zip(keys, objects.map(note_of, keys), strict=True)
    return {key.removeprefix("pins/").removesuffix(".json"): note for key, note in notes if note is not None}


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
