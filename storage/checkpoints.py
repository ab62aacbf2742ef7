"""Training checkpoints: the state of unfinished work, kept outside the content-addressed part and dropped at the end.

`checkpoints/KEY/STEP/UUID/...` holds a checkpoint's files. `checkpoints/KEY/STEP/complete.json` is written last of all,
in one atomic step, and lists them; without it, the step does not count.
"""

import logging
import re
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

from storage.digests import sha256_file
from storage.errors import DamagedObject, ObjectMissing
from storage.files import atomic_path
from storage.manifest import FileEntry, check_relative_path
from storage.objects.object_store import ObjectStore
from storage.records import read_record, record_bytes

logger = logging.getLogger(__name__)

_COMPLETE = "complete.json"
_DIGITS = re.compile("[0-9]+")


def save(objects: ObjectStore, action_key: str, step: int, folder: Path, keep: int) -> None:
    """Store `folder` as the checkpoint of `step`, replacing one of that step, then remove all but the newest `keep`."""
    if step < 0 or keep < 1:
        raise ValueError(f"checkpoint step {step}, keep {keep}: step must be 0 or more and keep 1 or more")
    local_files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not local_files:
        raise ValueError(f"checkpoint folder {folder} has no files; write the checkpoint before it is saved")
    base = _step_prefix(action_key, step)
    part = uuid.uuid4().hex

    def upload(path: Path) -> FileEntry:
        name = path.relative_to(folder).as_posix()
        entry = FileEntry(path=name, size=path.stat().st_size, sha256=sha256_file(path))
        objects.put_file(f"{base}{part}/{name}", path, sha256=entry.sha256)
        return entry

    entries = objects.map(upload, local_files)
    replaced = _replaced(objects, f"{base}{_COMPLETE}")
    record = {"step": step, "folder": part, "files": [entry.to_json() for entry in entries]}
    objects.put(f"{base}{_COMPLETE}", record_bytes(record))
    if replaced is not None:
        objects.delete_prefix(f"{base}{replaced}/")
    for old in [s for s in _steps(objects, action_key) if s <= step][keep:]:
        _remove(objects, _step_prefix(action_key, old))


def load(objects: ObjectStore, action_key: str, folder: Path) -> int | None:
    """Copy the newest complete and undamaged checkpoint into `folder`; return its step, None when there is none."""
    for step in _steps(objects, action_key):
        key = f"{_step_prefix(action_key, step)}{_COMPLETE}"
        try:
            # Before the copy, which may take long: what makes one object of it young, keeps all of it.
            objects.touch(key)
            _copy(objects, key, folder)
            return step
        except (ObjectMissing, DamagedObject, ValueError, KeyError, TypeError) as error:
            # Not every StoreError: a service that is down for a moment must not send a run back to its first step
            logger.warning("skipped the damaged checkpoint of step %d (%s): %s", step, key, error)
    return None


def drop(objects: ObjectStore, action_key: str) -> None:
    """Remove all checkpoints of an action."""
    _remove(objects, f"checkpoints/{action_key}/")


def _copy(objects: ObjectStore, key: str, folder: Path) -> None:
    record = read_record(objects, key)
    base = f"{key.removesuffix(_COMPLETE)}{_folder(record)}/"
    entries = [FileEntry.from_json(entry) for entry in record["files"]]
    folder.mkdir(parents=True, exist_ok=True)
    # All of it is checked before any of it appears, so that a damaged step leaves nothing for the next one to mix with.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".musevl-tmp-") as staged:

        def download(entry: FileEntry) -> None:
            target = Path(staged) / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            objects.get_file(base + entry.path, target)
            if target.stat().st_size != entry.size or sha256_file(target) != entry.sha256:
                raise DamagedObject(f"{base}{entry.path} does not have the bytes that were saved")

        objects.map(download, entries)
        for entry in entries:
            with atomic_path(folder / entry.path) as private:
                shutil.move(Path(staged) / entry.path, private)


def _replaced(objects: ObjectStore, key: str) -> str | None:
    """The folder of an earlier checkpoint of this step, None where there is none that is readable."""
    try:
        return _folder(read_record(objects, key))
    except (ObjectMissing, DamagedObject, ValueError):
        return None


def _folder(record: dict[str, Any]) -> str:
    folder = record.get("folder")
    check_relative_path(folder)
    return str(folder)


def _steps(objects: ObjectStore, action_key: str) -> list[int]:
    """Return the steps that have a `complete.json`, newest first."""
    prefix = f"checkpoints/{action_key}/"
    parts = [key.removeprefix(prefix).split("/") for key in objects.list(prefix)]
    return sorted(
        {int(p[0]) for p in parts if len(p) == 2 and p[1] == _COMPLETE and _DIGITS.fullmatch(p[0])}, reverse=True
    )


def _step_prefix(action_key: str, step: int) -> str:
    return f"checkpoints/{action_key}/{step:012d}/"


def _remove(objects: ObjectStore, prefix: str) -> None:
    # What says "complete" goes first: a removal that is cut short must not leave half a checkpoint that counts.
    keys = objects.list(prefix)
    objects.map(objects.delete, [key for key in keys if key.endswith("/" + _COMPLETE)])
    objects.map(objects.delete, [key for key in keys if not key.endswith("/" + _COMPLETE)])
