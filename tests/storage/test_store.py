import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.blobs import blob_key
from storage.digests import sha256_bytes
from storage.errors import AmbiguousDigest, DamagedObject, ObjectMissing, StoreError, UnknownArtifact
from storage.manifest import FileEntry, Manifest
from storage.objects.object_store import ObjectStore
from storage.store import Commit, Store

MakeManifest = Callable[..., Manifest]
Damage = Callable[[Store, str, bytes], None]


def test_files_and_bytes_come_back_as_they_were(store: Store, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(data)
    from_file = store.put_file(tmp_path / "file", "a/b.bin")
    from_bytes = store.put_bytes(data, "c.bin")
    empty = store.put_bytes(b"", "empty")
    assert from_file == FileEntry(path="a/b.bin", size=len(data), sha256=sha256_bytes(data))
    assert from_bytes.sha256 == from_file.sha256
    assert store.read_bytes(from_file) == store.fetch(from_bytes).read_bytes() == data
    assert store.read_bytes(empty) == store.fetch(empty).read_bytes() == b""
    assert len(store.objects.list("cas/")) == 2


def test_fetched_files_are_read_only(store: Store) -> None:
    mode = store.fetch(store.put_bytes(b"data", "a")).stat().st_mode
    assert stat.S_IMODE(mode) & 0o222 == 0


def test_a_local_fetch_is_the_blob_itself(local_store: Store) -> None:
    entry = local_store.put_bytes(b"data", "a")
    assert local_store.fetch(entry) == Path(local_store.uri) / blob_key(entry.sha256)


def test_an_s3_fetch_downloads_once(s3_uri: str, tmp_path: Path, damage: Damage) -> None:
    store = Store(s3_uri, cache_dir=tmp_path / "own-cache")
    entry = store.put_bytes(b"data", "a")
    first = store.fetch(entry)
    damage(store, blob_key(entry.sha256), b"")
    assert store.fetch(entry) == first
    assert first.is_relative_to(tmp_path / "own-cache")


def test_bytes_that_changed_in_the_store_are_never_handed_out(store: Store, tmp_path: Path, damage: Damage) -> None:
    for wrong in (b"dat", b"dada"):
        entry = store.put_bytes(b"data", "a")
        damage(store, blob_key(entry.sha256), wrong)
        reader = Store(store.uri, cache_dir=tmp_path / str(len(wrong)))
        with pytest.raises(DamagedObject, match="'a'"):
            reader.fetch(entry)
        with pytest.raises(DamagedObject, match="'a'"):
            reader.read_bytes(entry)
        damage(store, blob_key(entry.sha256), b"")
    with pytest.raises(ObjectMissing):
        reader.fetch(entry)


def test_materialise_lays_out_the_files_of_a_folder_under_their_names(
    store: Store, manifest_of: MakeManifest, tmp_path: Path
) -> None:
    manifest = manifest_of(*(store.put_bytes(name.encode(), name) for name in ("model/a", "model/b/c", "d")))
    store.materialise(manifest, tmp_path / "all")
    store.materialise(manifest, tmp_path / "part", prefix="model")
    layout = {p.relative_to(tmp_path).as_posix(): p.read_text() for p in tmp_path.rglob("*/**/*") if p.is_file()}
    expected = ["all/model/a", "all/model/b/c", "all/d", "part/model/a", "part/model/b/c"]
    found = {name: text for name, text in layout.items() if name.startswith(("all/", "part/"))}
    assert found == {name: name.partition("/")[2] for name in expected}


def test_changing_a_materialised_copy_leaves_the_store_alone(
    local_store: Store, manifest_of: MakeManifest, tmp_path: Path
) -> None:
    manifest = manifest_of(local_store.put_bytes(b"data", "a"))
    local_store.materialise(manifest, tmp_path / "copy")
    (tmp_path / "copy" / "a").chmod(0o644)
    (tmp_path / "copy" / "a").write_bytes(b"other")
    assert local_store.read_bytes(manifest.file("a")) == b"data"


def test_a_commit_is_found_by_action_and_by_digest(store: Store, manifest_of: MakeManifest) -> None:
    manifest = manifest_of(store.put_bytes(b"data", "a"))
    assert store.lookup("key") is None
    assert store.commit("key", manifest) == Commit(manifest.digest, created=True, adopted=False)
    assert store.commit("key", manifest) == Commit(manifest.digest, created=False, adopted=False)
    assert store.lookup("key") == store.load(manifest.digest) == store.load(manifest.digest[:6]) == manifest
    (info,) = store.artifacts()
    assert (info.digest, info.kind, info.stage, info.action_key) == (manifest.digest, "sample", "make_sample", "key")
    assert (info.size, info.num_files) == (4, 1)


def test_the_loser_with_another_digest_adopts_the_winner_and_says_so(store: Store, manifest_of: MakeManifest) -> None:
    winner = manifest_of(store.put_bytes(b"winner", "a"))
    loser = manifest_of(store.put_bytes(b"loser", "a"))
    store.commit("key", winner)
    assert store.commit("key", loser) == Commit(winner.digest, created=False, adopted=True)
    assert store.lookup("key") == winner
    (run,) = store.runs()
    assert run["event"] == "nondeterminism"
    assert (run["action_key"], run["adopted"], run["discarded"]) == ("key", winner.digest, loser.digest)


@pytest.mark.parametrize("lost", ["file", "manifest"])
def test_an_action_whose_blobs_are_gone_is_a_miss_and_is_replaced(
    lost: str, store: Store, manifest_of: MakeManifest, damage: Damage
) -> None:
    old = manifest_of(store.put_bytes(b"old", "a"))
    new = manifest_of(store.put_bytes(b"new", "a"))
    store.commit("key", old)
    damage(store, blob_key(old.file("a").sha256 if lost == "file" else old.digest), b"")
    assert store.lookup("key") is None
    assert store.commit("key", new) == Commit(new.digest, created=True, adopted=False)
    assert store.lookup("key") == new


def test_a_blob_of_the_wrong_size_makes_a_miss_and_storing_it_again_a_hit(
    store: Store, manifest_of: MakeManifest, damage: Damage, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"data")
    manifest = manifest_of(store.put_file(tmp_path / "file", "a"))
    store.commit("key", manifest)
    damage(store, blob_key(manifest.file("a").sha256), b"dat")
    assert store.lookup("key") is None
    store.put_file(tmp_path / "file", "a")
    assert store.commit("key", manifest) == Commit(manifest.digest, created=False, adopted=False)
    assert store.lookup("key") == manifest


@pytest.mark.parametrize("how", ["file", "bytes"])
def test_a_damaged_blob_of_the_right_size_is_replaced_when_the_right_bytes_are_stored(
    how: str, store: Store, damage: Damage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"data")

    def put() -> FileEntry:
        return store.put_file(tmp_path / "file", "a") if how == "file" else store.put_bytes(b"data", "a")

    entry = put()
    damage(store, blob_key(entry.sha256), b"dada")
    assert put() == entry
    assert store.read_bytes(entry) == store.fetch(entry).read_bytes() == b"data"
    assert f"a ({blob_key(entry.sha256)}) in the store was damaged: its bytes have the sha256" in caplog.text
    assert "it is stored again" in caplog.text
    caplog.clear()
    assert put() == entry and caplog.text == ""


@pytest.mark.parametrize("record", [b"{", b"[]", b'{"manifest": 3}', b'{"manifest": "abc"}'])
def test_an_unreadable_action_record_is_a_miss_and_is_replaced(
    record: bytes, store: Store, manifest_of: MakeManifest, damage: Damage
) -> None:
    manifest = manifest_of(store.put_bytes(b"data", "a"))
    damage(store, "actions/key.json", record)
    assert store.lookup("key") is None
    assert store.artifacts() == []
    assert store.commit("key", manifest).created
    assert store.lookup("key") == manifest


def test_a_manifest_of_files_that_are_not_stored_cannot_be_committed(store: Store, manifest_of: MakeManifest) -> None:
    stored = store.put_bytes(b"data", "a")
    absent = FileEntry(path="b", size=1, sha256=sha256_bytes(b"x"))
    with pytest.raises(StoreError, match=r"1 of its 2 files are not stored \(b\)"):
        store.commit("key", manifest_of(stored, absent))
    assert store.lookup("key") is None
    assert store.objects.list("actions/") == []


def test_digest_prefixes_must_be_long_enough_known_and_unambiguous(
    local_store: Store, manifest_of: MakeManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_of()
    local_store.commit("key", manifest)
    for unknown in (manifest.digest[:5], "zzzzzz", "0" * 64, "0" * 8, "../../x"):
        with pytest.raises(UnknownArtifact):
            local_store.load(unknown)
    twins = ["abcdef" + "0" * 58, "abcdef" + "1" * 58]
    for name, digest in zip("xy", twins, strict=True):
        local_store.objects.create(f"actions/{name}.json", json.dumps({"manifest": digest}).encode())
    with pytest.raises(AmbiguousDigest, match=f"2 artifacts.*{twins[0]}, {twins[1]}"):
        local_store.load("abcdef")


def test_a_blob_that_is_no_manifest_cannot_be_loaded(local_store: Store) -> None:
    entry = local_store.put_bytes(b"data", "a")
    with pytest.raises(DamagedObject, match="not an artifact's manifest"):
        local_store.load(entry.sha256)


def test_the_first_plan_holds(store: Store) -> None:
    plan = {"shards": [[0, 10], [10, 20]]}
    assert store.work("key").create_plan(plan) == plan
    assert store.work("key").create_plan({"shards": [[0, 20]]}) == plan
    assert store.work("other").create_plan({"shards": []}) == {"shards": []}


def test_the_first_receipt_of_a_shard_holds(store: Store) -> None:
    first = {"files": [store.put_bytes(b"1", "a").to_json()], "rows": 10}
    second = {"files": [store.put_bytes(b"2", "a").to_json()], "rows": 11}
    assert store.work("key").write_receipt("00000", first) == first
    assert store.work("key").write_receipt("00000", second) == first
    assert store.work("key").write_receipt("00001", second) == second
    assert store.work("key2").write_receipt("00002", second) == second
    assert dict(store.work("key").receipts()) == {"00000": first, "00001": second}
    assert dict(store.work("nothing").receipts()) == {}


def test_a_receipt_whose_blob_is_missing_is_dropped_and_replaced(store: Store, damage: Damage) -> None:
    entries = [store.put_bytes(str(i).encode() * 5, "a") for i in range(3)]
    for shard, entry in enumerate(entries):
        store.work("key").write_receipt(str(shard), {"files": [entry.to_json()]})
    damage(store, blob_key(entries[0].sha256), b"")
    damage(store, blob_key(entries[1].sha256), b"1111")
    assert list(dict(store.work("key").receipts())) == ["2"]
    again = {"files": [store.put_bytes(b"again", "a").to_json()]}
    assert store.work("key").write_receipt("0", again) == again
    assert dict(store.work("key").receipts())["0"] == again


def test_receipts_without_file_entries_are_refused(local_store: Store) -> None:
    for receipt in ({}, {"files": "a"}, {"files": [{"path": "a"}]}):
        with pytest.raises(ValueError, match="files|file entry"):
            local_store.work("key").write_receipt("0", receipt)
    assert local_store.objects.list("") == []


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "é"])
def test_action_keys_and_shards_are_plain_names(name: str, local_store: Store, manifest_of: MakeManifest) -> None:
    uses: list[Callable[[], Any]] = [
        lambda: local_store.commit(name, manifest_of()),
        lambda: local_store.lookup(name),
        lambda: local_store.work(name).create_plan({}),
        lambda: local_store.work("key").write_receipt(name, {"files": []}),
        lambda: local_store.work(name).drop_checkpoints(),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="no plain name"):
            use()


def test_runs_are_listed_newest_first_with_their_ids(store: Store) -> None:
    ids = [store.record_run({"number": number}) for number in range(4)]
    assert ids == sorted(ids)
    assert store.runs() == [{"number": n, "id": ids[n]} for n in (3, 2, 1, 0)]
    assert [run["number"] for run in store.runs(limit=2)] == [3, 2]


def test_a_pickled_store_opens_the_same_store(store: Store) -> None:
    entry = store.put_bytes(b"data", "a")
    again = pickle.loads(pickle.dumps(store))
    assert again.uri == store.uri
    assert again.read_bytes(entry) == b"data"


def test_a_pickled_store_holds_no_credentials(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-keep-this")
    store = Store(s3_uri)
    assert b"do-not-keep-this" not in pickle.dumps(store)
    store.record_run({})
    assert not [key for key in store.objects.list("") if b"do-not-keep-this" in store.objects.read(key)]


def test_the_back_end_is_probed_when_the_store_is_first_opened_only(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = []
    probe = ObjectStore.probe_conditional_create

    def counted(self: ObjectStore) -> None:
        probes.append(self.uri)
        probe(self)

    monkeypatch.setattr(ObjectStore, "probe_conditional_create", counted)
    Store(s3_uri)
    Store(s3_uri)
    assert len(probes) == 1


def test_scratch_dirs_are_private_and_removed(
    local_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUSEVL_SCRATCH", str(tmp_path / "scratch"))
    with pytest.raises(RuntimeError, match="boom"), local_store.scratch_dir() as one, local_store.scratch_dir() as two:
        assert one != two
        assert one.parent == two.parent == tmp_path / "scratch"
        (one / "file").write_bytes(b"1")
        raise RuntimeError("boom")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "store", Path("/proc/store")):
        with pytest.raises(StoreError) as caught:
            Store(str(folder))
        message = str(caught.value)
        assert message.startswith(f"cannot write to the store folder {folder}: ")
        assert "choose a folder that you can write to" in message
        assert "\n" not in message


def test_a_bucket_that_is_not_there_is_named_on_one_line(s3_uri: str) -> None:
    with pytest.raises(StoreError) as caught:
        Store("s3://no-such-bucket-here/x")
    message = str(caught.value)
    assert message.startswith("cannot open the store s3://no-such-bucket-here/x at http://127.0.0.1")
    assert "create the bucket or correct its name" in message
    assert "\n" not in message


def test_an_endpoint_that_does_not_answer_is_named_on_one_line(s3_uri: str) -> None:
    with pytest.raises(StoreError) as caught:
        Store(s3_uri, endpoint_url="http://127.0.0.1:9")
    message = str(caught.value)
    assert "at http://127.0.0.1:9: " in message
    assert "check AWS_ENDPOINT_URL and the network" in message
    assert "\n" not in message


def test_attempts_that_ended_leave_no_mark_and_those_that_died_do(store: Store) -> None:
    with store.work("key").mark("0") as deaths:
        assert deaths == 0
    with pytest.raises(ValueError, match="failed"), store.work("key").mark("0"):
        raise ValueError("failed")
    assert store.objects.list("marks/") == []
    died = store.work("key").mark("0")  # held: a block that is collected ends
    died.__enter__()
    with store.work("key").mark("0") as deaths:
        assert deaths == 1
    with store.work("key").mark("00") as deaths:
        assert deaths == 0
    store.work("key").forget_marks("0")
    assert store.objects.list("marks/") == []


def test_one_receipt_is_found_by_its_name_unless_its_blobs_are_gone(store: Store) -> None:
    entry = store.put_bytes(b"data", "a")
    receipt = {"files": [entry.to_json()], "rows": 1}
    assert store.work("key").receipt("0") is None
    store.work("key").write_receipt("0", receipt)
    assert store.work("key").receipt("0") == receipt
    store.objects.delete(blob_key(entry.sha256))
    assert store.work("key").receipt("0") is None
