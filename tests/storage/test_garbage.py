"""What a garbage collection may take, and what it must leave; on a folder and on S3."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest

from storage.blobs import blob_key
from storage.errors import StoreError, UnknownArtifact
from storage.manifest import Manifest
from storage.store import Store

NOW, WEEK = timedelta(0), timedelta(days=7)


def commit(store: Store, name: str, inputs: dict[str, str] | None = None) -> Manifest:
    """An artifact with one file of its own."""
    file = store.put_bytes(f"bytes of {name}".encode(), f"{name}.bin")
    manifest = Manifest("thing", 1, name, {}, inputs or {}, (file,), {}, {})
    store.commit(f"key-{name}", manifest)
    return manifest


def keys(store: Store, grace: timedelta, *, delete: bool = False) -> set[str]:
    return {item.key for item in store.collect_garbage(grace, delete=delete)}


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
    store.create_plan("going", {"shards": ["a"]})
    kept = store.put_bytes(b"a shard", "a")
    store.write_receipt("going", "a", {"files": [kept.to_json()]})
    _age(tmp_path / "store" / blob_key(kept.sha256))
    assert keys(store, timedelta(hours=1)) == set(), "an old blob that young work needs"

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "state").write_bytes(b"state")
    store.save_checkpoint("going", 3, folder)
    for path in (tmp_path / "store").rglob("*"):
        if path.is_file() and "going" in str(path):
            _age(path)
    given_up = keys(store, timedelta(hours=1))
    assert {key.split("/")[0] for key in given_up} == {"plans", "receipts", "checkpoints", "cas"}
    store.collect_garbage(timedelta(hours=1), delete=True)
    assert store.receipts("going") == {} and store.load_checkpoint("going", tmp_path / "restored") is None


def test_checkpoints_of_finished_stages_go_and_their_receipts_stay(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    manifest = commit(store, "first")
    store.write_receipt("key-first", "a", {"files": [manifest.files[0].to_json()]})
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "state").write_bytes(b"state")
    store.save_checkpoint("key-first", 3, folder)
    found = keys(store, NOW, delete=True)
    assert found and all(key.startswith("checkpoints/") for key in found)
    assert list(store.receipts("key-first")) == ["a"]


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


def test_a_file_that_is_stored_again_is_young_again(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    (tmp_path / "file").write_bytes(b"bytes")
    entry = store.put_file(tmp_path / "file", "file")
    _age(tmp_path / "store" / blob_key(entry.sha256))
    assert keys(store, timedelta(hours=1)) == {blob_key(entry.sha256)}
    store.put_file(tmp_path / "file", "file")
    assert keys(store, timedelta(hours=1)) == set()


def _age(path: Path) -> None:
    """Make a file a day old."""
    old = path.stat().st_mtime - 86_400
    os.utime(path, (old, old))


@pytest.mark.parametrize("finished", [False, True])
def test_rows_that_a_plan_names_stay_while_its_shards_may_be_made_again(tmp_path: Path, finished: bool) -> None:
    store = Store(str(tmp_path / "store"))
    rows = store.put_bytes(b"what is to be fetched", "rows.parquet")
    name = "key-first" if finished else "going"
    store.create_plan(name, {"rows": rows.to_json(), "shards": ["a"]})
    if finished:
        commit(store, "first")
        _age(tmp_path / "store" / "plans" / f"{name}.json")
    _age(tmp_path / "store" / blob_key(rows.sha256))
    assert keys(store, timedelta(hours=1), delete=True) == set()
    assert store.read_bytes(rows) == b"what is to be fetched"
