"""Work in progress on one action: its plan, the receipts of its shards, marks of shards at work, and checkpoints.

`plans/KEY.json` and `receipts/KEY/SHARD.json` are create-only. `marks/KEY/SHARD/UUID.json` stands for a process that
works on a shard: it is written before the work and removed after it, also when the work fails with an exception, so
what is left over stands for a process that died. `checkpoints/KEY/STEP/` holds the state of a training.
"""

import logging
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from storage import checkpoints
from storage.blobs import Blobs
from storage.digests import canonical_json
from storage.errors import DamagedObject, ObjectMissing
from storage.objects.object_store import ObjectStore
from storage.records import checked_name, parse_record, plan_files, read_record, receipt_files, record_bytes

logger = logging.getLogger(__name__)

_RECEIPTS_AT_A_TIME = 256


class Work:
    """The work in progress on one action; `Store.work` makes it.

    Args:
        objects: of the store.
        blobs: of the store.
        action_key: letters, digits, '.', '_' and '-'.

    Raises:
        ValueError: the action key is no plain name.
    """

    def __init__(self, objects: ObjectStore, blobs: Blobs, action_key: str) -> None:
        self._objects, self._blobs = objects, blobs
        self.action_key = checked_name(action_key, "action key")

    # Plan

    def create_plan(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Fix the plan (shard boundaries), create-only; return the plan that holds.

        Args:
            plan: JSON. Those of its values that are objects are entries of stored files, which the garbage collection
                keeps for as long as the action or its work is there.
        """
        plan_files(plan)
        data = record_bytes(plan)
        if self._objects.create(self._plan_path, data):
            return plan
        earlier = self.read_plan()
        if earlier is not None:
            return earlier
        self._objects.put(self._plan_path, data)
        return plan

    def read_plan(self) -> dict[str, Any] | None:
        """Return the plan, None when there is none that is readable.

        Whoever asks is about to take up the work, so plan, receipts and all become young for the garbage collection.
        """
        try:
            data = self._objects.read(self._plan_path)
            plan = parse_record(data)
            plan_files(plan)
        except ObjectMissing:
            return None
        except (ValueError, DamagedObject) as error:
            logger.warning("ignored the plan %s: %s", self._plan_path, error)
            return None
        self._objects.put(self._plan_path, data)
        return plan

    # Receipts

    def write_receipt(self, shard: str, receipt: dict[str, Any]) -> dict[str, Any]:
        """Record that a shard is done, create-only; return the receipt that holds.

        Args:
            shard: its name: letters, digits, '.', '_' and '-'.
            receipt: JSON, with the shard's files as entries under `files`. An earlier receipt whose blobs are missing
                is replaced.
        """
        path = self._receipt_path(shard)
        receipt_files(receipt)
        data = record_bytes(receipt)
        if self._objects.create(path, data):
            return receipt
        winner = self._valid_receipt(path)
        if winner is not None:
            return winner
        self._objects.put(path, data)
        return receipt

    def receipt(self, shard: str) -> dict[str, Any] | None:
        """Return the receipt of one shard, None when there is none or its blobs are not all there."""
        path = self._receipt_path(shard)
        return None if self._objects.size(path) is None else self._valid_receipt(path)

    def receipts(self, shards: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield name and receipt of the shards that are finished; those whose blobs are not all there are left out.

        Few receipts are in memory at a time: one of `download` counts the hosts of its rows, about 100 kB where each
        row has its own, and those of 24,000 shards do not fit together. The work is being taken up, and becomes young
        as by `read_plan`.

        Args:
            shards: which, in this order; default every one, sorted by name.
        """
        self.read_plan()
        listed = self._objects.list(self._receipts_prefix)
        paths = {path.removeprefix(self._receipts_prefix).removesuffix(".json"): path for path in sorted(listed)}
        wanted = [shard for shard in (paths if shards is None else shards) if shard in paths]
        for start in range(0, len(wanted), _RECEIPTS_AT_A_TIME):
            some = wanted[start : start + _RECEIPTS_AT_A_TIME]
            found = self._objects.map(lambda shard: self._valid_receipt(paths[shard]), some)
            yield from ((shard, receipt) for shard, receipt in zip(some, found, strict=True) if receipt is not None)

    def drop_receipts(self) -> None:
        """Forget which shards are done."""
        self._objects.delete_prefix(self._receipts_prefix)

    # Marks

    @contextmanager
    def mark(self, shard: str) -> Iterator[int]:
        """Mark a shard as being worked on for the length of the block.

        Yields:
            How many processes died while they worked on it. One that still works on it elsewhere counts too.
        """
        prefix = self._marks_prefix(shard)
        earlier = len(self._objects.list(prefix))
        name = uuid.uuid4().hex
        self._objects.put(f"{prefix}{name}.json", canonical_json({"mark": name}))
        try:
            yield earlier
        finally:
            self._objects.delete(f"{prefix}{name}.json")

    def forget_marks(self, shard: str) -> None:
        """Remove the marks of a shard that is done."""
        self._objects.delete_prefix(self._marks_prefix(shard))

    # Checkpoints

    def save_checkpoint(self, step: int, folder: str | Path, *, keep: int = 1) -> None:
        """Store the files of `folder` as the checkpoint of `step`; older ones beyond the newest `keep` are removed."""
        checkpoints.save(self._objects, self.action_key, step, Path(folder), keep)

    def load_checkpoint(self, folder: str | Path) -> int | None:
        """Copy the newest undamaged checkpoint into `folder`; return its step, None when there is none.

        The checkpoint becomes young for the garbage collection.
        """
        return checkpoints.load(self._objects, self.action_key, Path(folder))

    def drop_checkpoints(self) -> None:
        """Remove all checkpoints."""
        checkpoints.drop(self._objects, self.action_key)

    # Within

    @property
    def _plan_path(self) -> str:
        return f"plans/{self.action_key}.json"

    @property
    def _receipts_prefix(self) -> str:
        return f"receipts/{self.action_key}/"

    def _receipt_path(self, shard: str) -> str:
        return f"{self._receipts_prefix}{checked_name(shard, 'shard')}.json"

    def _marks_prefix(self, shard: str) -> str:
        return f"marks/{self.action_key}/{checked_name(shard, 'shard')}/"

    def _valid_receipt(self, path: str) -> dict[str, Any] | None:
        try:
            receipt = read_record(self._objects, path)
            missing = self._blobs.missing(receipt_files(receipt))
        except (ValueError, ObjectMissing, DamagedObject) as error:
            logger.warning("ignored the receipt %s: %s", path, error)
            return None
        if missing:
            logger.warning("ignored the receipt %s: blob of %s is missing", path, missing[0].path)
            return None
        return receipt
