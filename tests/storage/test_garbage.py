"""What a garbage collection may take, and what it must leave; on a folder and on S3."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.blobs import blob_key
from storage.errors import StoreError, UnknownArtifact
from storage.manifest import Manifest
from storage.objects.info import ObjectInfo
from storage.objects.object_store import ObjectStore
from storage.store import Store

NOW, WEEK = timedelta(0), timedelta(days=7)


def commit(store: Store, name: str, inputs: dict[str, str] | None = None) -> Manifest:
    """An artifact with one file of its own."""
    file = store.put_bytes(f"bytes of {name}".encode(), f"{name}.bin")
    manifest = Manifest("thing", 1, name, {}, inputs or {}, (file,), {}, {})
    store.commit(f"key-{name}", manifest)
    return manifest


def keys(store: Store, grace: timedelta, *, delete: bool = False) -> set[str]:
    return {item.key for item in store.collect_garbage(grace, delete=delete).garbage}


def test_artifacts_and_what_they_were_made_from_stay(store_uri: str) -> None:
    store = Store(store_uri)
    first = commit(store, "first")
    second = commit(store, "second", {"first": first.digest})
    assert keys(store, NOW, delete=True) == set()
    store.forget(first.digest)
    assert keys(store, NOW, delete=True) == set(), "the second was made from the first"
    assert store.load(first.digest) == first
    assert store.lookup("key-first") is None, "a run makes it again"
    store.forget(second.digest)
    expected = {blob_key(sha) for made in (first, second) for sha in (made.digest, made.files[0].sha256)}
    assert keys(store, NOW) == expected
    assert keys(store, NOW, delete=True) == expected, "the dry run took nothing"
    assert keys(store, NOW) == set()
    with pytest.raises(UnknownArtifact):
        store.load(first.digest)


def test_a_pin_keeps_an_artifact_without_an_action(store_uri: str) -> None:
    store = Store(store_uri)
    first = commit(store, "first")
    second = commit(store, "second", {"first": first.digest})
    assert store.pin(second.digest[:8], "the paper's") == second.digest
    with pytest.raises(StoreError, match="is pinned"):
        store.forget(second.digest)
    store.forget(first.digest)
    for key in store.objects.list("actions/"):
        store.objects.delete(key)
    assert store.pins() == {second.digest: "the paper's"}
    assert keys(store, NOW, delete=True) == set()
    assert store.read_bytes(store.load(first.digest).files[0]) == b"bytes of first"
    store.unpin(second.digest[:8])
    assert len(keys(store, NOW)) == 4
    with pytest.raises(UnknownArtifact, match="0 pinned artifacts"):
        store.unpin(second.digest[:8])


def test_young_things_stay(store_uri: str) -> None:
    store = Store(store_uri)
    orphan = store.put_bytes(b"stored before its receipt", "part")
    assert keys(store, WEEK, delete=True) == set()
    assert keys(store, NOW) == {blob_key(orphan.sha256)}


def test_work_in_progress_keeps_its_shards(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    store.work("going").create_plan({"shards": ["a"]})
    kept = store.put_bytes(b"a shard", "a")
    store.work("going").write_receipt("a", {"files": [kept.to_json()]})
    _age(tmp_path / "store" / blob_key(kept.sha256))
    assert keys(store, timedelta(hours=1)) == set(), "an old blob that young work needs"

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "state").write_bytes(b"state")
    store.work("going").save_checkpoint(3, folder)
    for path in (tmp_path / "store").rglob("*"):
        if path.is_file() and "going" in str(path):
            _age(path)
    given_up = keys(store, timedelta(hours=1))
    assert {key.split("/")[0] for key in given_up} == {"plans", "receipts", "checkpoints", "cas"}
    store.collect_garbage(timedelta(hours=1), delete=True)
    assert (
        dict(store.work("going").receipts()) == {}
        and store.work("going").load_checkpoint(tmp_path / "restored") is None
    )


def test_checkpoints_of_finished_stages_go_and_their_receipts_stay(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    manifest = commit(store, "first")
    store.work("key-first").write_receipt("a", {"files": [manifest.files[0].to_json()]})
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "state").write_bytes(b"state")
    store.work("key-first").save_checkpoint(3, folder)
    found = keys(store, NOW, delete=True)
    assert found and all(key.startswith("checkpoints/") for key in found)
    assert list(dict(store.work("key-first").receipts())) == ["a"]


def test_unfinished_and_quarantined_files_go_when_they_are_old(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    manifest = commit(store, "first")
    blob = tmp_path / "store" / blob_key(manifest.files[0].sha256)
    blob.chmod(0o644)
    blob.write_bytes(b"bytes of fIrst")
    store.verify()
    (tmp_path / "store/tmp").mkdir(exist_ok=True)
    (tmp_path / "store/tmp/.half").write_bytes(b"half")
    (tmp_path / "store/tmp/half").write_bytes(b"half")
    assert keys(store, WEEK) == set()
    found = keys(store, NOW, delete=True)
    assert {key.split("/")[0] for key in found} == {"quarantine", "tmp"}
    assert not list((tmp_path / "store/quarantine").glob("*")) and not list((tmp_path / "store/tmp").glob("*"))
    assert commit(store, "second"), "the store still takes files"


def _age(path: Path) -> None:
    """Make a file a day old."""
    old = path.stat().st_mtime - 86_400
    os.utime(path, (old, old))


@pytest.mark.parametrize("finished", [False, True])
def test_rows_that_a_plan_names_stay_while_its_shards_may_be_made_again(tmp_path: Path, finished: bool) -> None:
    store = Store(str(tmp_path / "store"))
    rows = store.put_bytes(b"what is to be fetched", "rows.parquet")
    name = "key-first" if finished else "going"
    store.work(name).create_plan({"rows": rows.to_json(), "shards": ["a"]})
    if finished:
        commit(store, "first")
        _age(tmp_path / "store" / "plans" / f"{name}.json")
    _age(tmp_path / "store" / blob_key(rows.sha256))
    assert keys(store, timedelta(hours=1), delete=True) == set()
    assert store.read_bytes(rows) == b"what is to be fetched"


def test_a_damaged_manifest_costs_no_blob_and_its_stage_finds_its_shards_again(store_uri: str) -> None:
    store = Store(store_uri)
    shards = finished_work(store)
    (info,) = store.artifacts()
    store.pin(info.digest)
    data = store.objects.read(blob_key(info.digest))
    store.objects.put(blob_key(info.digest), data.replace(b'"shards"', b'"shbrds"', 1))
    kept = set(store.objects.list("cas/"))
    for _ in range(2):  # damaged, and then set aside by verify
        found = store.collect_garbage(NOW, delete=True)
        (line,) = found.unreadable
        assert (
            f"manifest {info.digest[:12]} is " in line and "run its stage again, or give up action key-shards" in line
        )
        assert not [item for item in found.garbage if not item.key.startswith("quarantine/")]
        store.verify()
    assert {key for key in kept if key != blob_key(info.digest)} <= set(store.objects.list("cas/"))
    assert list(dict(store.work("key-shards").receipts())) == list(shards)
    finished_work(store)  # which is what the stage does: the same artifact
    assert store.lookup("key-shards") is not None
    assert store.collect_garbage(NOW, delete=False).unreadable == []


def test_an_unreadable_action_record_costs_neither_work_nor_blobs(tmp_path: Path, store_uri: str) -> None:
    store = Store(store_uri)
    shards = finished_work(store)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state").write_bytes(b"state")
    store.work("key-shards").save_checkpoint(1, tmp_path / "checkpoint")
    store.objects.put("actions/key-shards.json", b'{"manifest":"0')
    for _ in range(2):
        found = store.collect_garbage(NOW, delete=True)
        assert found.garbage == []
        assert found.unreadable == [
            "actions/key-shards.json is no action record: run its stage again, or `musevl artifacts forget key-shards`"
        ]
        assert [problem.path for problem in store.verify()] == ["actions/key-shards.json"]
    assert list(dict(store.work("key-shards").receipts())) == list(shards)
    assert store.forget("key-shards") == "key-shards"
    expected = "a manifest, two shards, rows, two receipts, a plan, two objects of a checkpoint"
    assert len(keys(store, NOW, delete=True)) == 9, expected
    assert store.objects.list("cas/") == []


def test_an_input_that_was_forgotten_and_lost_its_manifest_keeps_its_files(store_uri: str) -> None:
    store = Store(store_uri)
    first = commit(store, "first")
    second = commit(store, "second", {"first": first.digest})
    store.forget(first.digest)
    store.objects.delete(blob_key(first.digest))
    found = store.collect_garbage(NOW, delete=True)
    assert found.garbage == []
    assert found.unreadable == [
        f"manifest {first.digest[:12]} is missing: run its stage again, or give up second {second.digest[:12]}, made "
        f"from it: `musevl artifacts forget {second.digest[:12]}`"
    ]
    store.forget(second.digest)
    assert len(keys(store, NOW, delete=True)) == 3


def test_an_unreadable_plan_keeps_all_blobs_until_it_is_set_aside_or_planned_again(store_uri: str) -> None:
    store = Store(store_uri)
    plan = {"rows": store.put_bytes(b"what is to be fetched", "rows.parquet").to_json(), "shards": ["a"]}
    commit(store, "first")
    for mend in (store.verify, lambda: store.work("key-first").create_plan(plan)):
        store.work("key-first").create_plan(plan)
        store.objects.put("plans/key-first.json", b'{"rows":{"path":"rows.parquet"},"shards":["a"]}')
        found = store.collect_garbage(NOW, delete=True)
        assert found.garbage == [] or {item.reason for item in found.garbage} == {"set aside as damaged"}
        (line,) = found.unreadable
        assert (
            line.startswith("plans/key-first.json is no plan (") and "`musevl artifacts verify` sets it aside" in line
        )
        mend()
        assert store.collect_garbage(NOW, delete=False).unreadable == []
    assert store.work("key-first").read_plan() == plan


@pytest.mark.parametrize("folder", ["actions", "pins", "plans", "receipts", "cas"])
def test_a_folder_that_cannot_be_listed_ends_it_before_anything_is_deleted(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "store"))
    finished_work(store)
    store.pin(store.artifacts()[0].digest)
    before = store.objects.list("")
    scandir = os.scandir

    def failing(path: os.PathLike[str]) -> object:
        if Path(path) == tmp_path / "store" / folder:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", failing)
        with pytest.raises(StoreError, match=f"cannot list '{folder}/' in the store .*Input/output error.*; check"):
            store.collect_garbage(NOW, delete=True)
    assert store.objects.list("") == before


def test_a_run_that_takes_up_old_work_makes_it_young(tmp_path: Path, store_uri: str) -> None:
    store = Store(store_uri)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state").write_bytes(b"state")

    def begin() -> float:
        for key in ("planned", "read", "listed"):
            store.work(key).create_plan({"shards": ["a"]})
            store.work(key).write_receipt("a", {"files": [store.put_bytes(key.encode(), "a").to_json()]})
        store.work("trained").save_checkpoint(1, tmp_path / "checkpoint")
        return _later()

    ups: list[Callable[[], object]] = [
        lambda: store.work("planned").create_plan({"shards": ["a"]}),
        lambda: store.work("read").read_plan(),
        lambda: dict(store.work("listed").receipts()),
        lambda: store.work("trained").load_checkpoint(tmp_path / "restored"),
    ]
    cutoff = begin()
    assert len(_garbage_before(store, cutoff)) == 3 * 3 + 2
    for up in ups:
        up()
    assert _garbage_before(store, cutoff) == set()


def test_bytes_and_files_that_are_stored_again_are_young_again(tmp_path: Path, store_uri: str) -> None:
    store = Store(store_uri)
    (tmp_path / "file").write_bytes(b"a file")
    stored = [store.put_bytes(b"some bytes", "a"), store.put_file(tmp_path / "file", "b")]
    cutoff = _later()
    assert _garbage_before(store, cutoff) == {blob_key(entry.sha256) for entry in stored}
    assert stored == [store.put_bytes(b"some bytes", "a"), store.put_file(tmp_path / "file", "b")]
    assert _garbage_before(store, cutoff) == set()
    assert [store.read_bytes(entry) for entry in stored] == [b"some bytes", b"a file"]


@pytest.mark.parametrize("renewed", ["plan", "blob"])
def test_what_is_taken_up_while_garbage_is_being_removed_stays(
    renewed: str, store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that begins after the first look: before records are deleted, or just before a blob is."""
    store = Store(store_uri)
    store.work("old").create_plan({"shards": ["a"]})
    entry = store.put_bytes(b"a shard", "a")
    store.work("old").write_receipt("a", {"files": [entry.to_json()]})
    cutoff = _later()
    found = {"plan": "cas/", "blob": "nothing"}[renewed]
    details, modified = ObjectStore.details, ObjectStore.modified

    def details_then_run(self: ObjectStore, prefix: str) -> list[ObjectInfo]:
        listed = details(self, prefix)
        if prefix == found:
            monkeypatch.setattr(ObjectStore, "details", details)
            assert list(dict(store.work("old").receipts())) == ["a"]
        return listed

    def run_then_modified(self: ObjectStore, key: str) -> float | None:
        if renewed == "blob":
            store.put_bytes(b"a shard", "a")
        return modified(self, key)

    monkeypatch.setattr(ObjectStore, "details", details_then_run)
    monkeypatch.setattr(ObjectStore, "modified", run_then_modified)
    store.collect_garbage(datetime.now(UTC) - datetime.fromtimestamp(cutoff, UTC), delete=True)
    assert store.read_bytes(entry) == b"a shard"
    assert list(dict(store.work("old").receipts())) == (["a"] if renewed == "plan" else [])


def finished_work(store: Store) -> list[str]:
    """A mapped stage: a plan with a file of its own, a receipt a shard, and the artifact of both."""
    rows = store.put_bytes(b"rows", "rows.parquet")
    plan = store.work("key-shards").create_plan({"rows": rows.to_json(), "shards": ["a", "b"]})
    entries = [store.put_bytes(f"shard {name}".encode(), name) for name in plan["shards"]]
    for entry in entries:
        store.work("key-shards").write_receipt(entry.path, {"files": [entry.to_json()]})
    store.commit("key-shards", Manifest("thing", 1, "shards", {}, {}, tuple(entries), {}, {}))
    return [entry.path for entry in entries]


def _later() -> float:
    """A time after all that was written, and before all that will be: a bucket counts in whole seconds."""
    time.sleep(1.1)
    now = time.time()
    time.sleep(1.1)
    return now


def _garbage_before(store: Store, cutoff: float) -> set[str]:
    return keys(store, datetime.now(UTC) - datetime.fromtimestamp(cutoff, UTC))
