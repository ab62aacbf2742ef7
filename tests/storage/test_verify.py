from collections.abc import Callable
from pathlib import Path

import pytest

from storage.blobs import blob_key
from storage.manifest import Manifest
from storage.store import Store

MakeManifest = Callable[..., Manifest]
Damage = Callable[[Store, str, bytes], None]

DATA = {"a": b"first file", "b/c": b"second file"}


@pytest.fixture
def manifest(store: Store, manifest_of: MakeManifest) -> Manifest:
    manifest = manifest_of(*(store.put_bytes(data, path) for path, data in DATA.items()))
    store.commit("key", manifest)
    store.commit("other", manifest_of(store.put_bytes(b"third", "d"), stage="other"))
    return manifest


def test_a_sound_store_has_no_problems(store: Store, manifest: Manifest) -> None:
    assert store.verify() == []
    assert store.verify(manifest.digest[:8]) == []


@pytest.mark.parametrize(
    ("bad", "reason"), [(b"First file", "damaged: its bytes"), (b"first fil", "damaged: 9 bytes"), (b"", "missing")]
)
def test_verify_finds_a_changed_byte_a_cut_and_a_loss_and_storing_again_repairs(
    bad: bytes, reason: str, store: Store, manifest: Manifest, damage: Damage
) -> None:
    damage(store, blob_key(manifest.file("a").sha256), bad)
    (problem,) = store.verify()
    assert (problem.digest, problem.path) == (manifest.digest, "a")
    assert problem.reason.startswith(reason)
    assert store.lookup("key") is None
    quarantined = store.objects.list("quarantine/")
    assert [store.objects.read(key) for key in quarantined] == ([bad] if bad else [])
    assert all(key in problem.reason for key in quarantined)
    for path, data in DATA.items():
        store.put_bytes(data, path)
    store.commit("key", manifest)
    assert store.verify() == []
    assert store.lookup("key") == manifest


def test_only_the_artifact_that_was_asked_for_is_read(store: Store, manifest: Manifest, damage: Damage) -> None:
    damage(store, blob_key(manifest.file("a").sha256), b"First file")
    (other,) = [info.digest for info in store.artifacts() if info.stage == "other"]
    assert store.verify(other) == []
    assert [problem.path for problem in store.verify(manifest.digest)] == ["a"]


def test_a_damaged_manifest_is_set_aside_and_rebuilt(store: Store, manifest: Manifest, damage: Damage) -> None:
    data = manifest.to_bytes()
    damage(store, blob_key(manifest.digest), data.replace(b'"seed":0', b'"seed":1'))
    assert store.lookup("key") is None
    (problem,) = store.verify()
    assert (problem.digest, problem.path) == (manifest.digest, "manifest")
    store.commit("key", manifest)
    assert store.lookup("key") == manifest
    assert store.verify() == []


def test_a_manifest_damaged_in_place_is_repaired_by_the_next_commit(
    store: Store, manifest: Manifest, damage: Damage
) -> None:
    damage(store, blob_key(manifest.digest), b"x" * len(manifest.to_bytes()))
    store.commit("key", manifest)
    assert store.lookup("key") == manifest


def test_an_unreadable_action_is_reported_until_its_stage_writes_it_again(
    store: Store, manifest: Manifest, damage: Damage
) -> None:
    damage(store, "actions/key.json", b"{")
    for _ in range(2):
        (problem,) = store.verify()
        assert problem.path == "actions/key.json" and "the next run writes it again" in problem.reason
    store.commit("key", manifest)
    assert store.verify() == []


def test_a_blob_that_two_artifacts_share_is_a_problem_of_both(
    local_store: Store, manifest_of: MakeManifest, damage: Damage
) -> None:
    entry = local_store.put_bytes(b"shared", "a")
    digests = set()
    for stage in ("one", "two"):
        digests.add(local_store.commit(stage, manifest_of(entry, stage=stage)).digest)
    damage(local_store, blob_key(entry.sha256), b"SHARED")
    assert {problem.digest for problem in local_store.verify()} == digests


def test_files_of_plans_and_of_work_in_progress_are_read_too(store: Store, damage: Damage) -> None:
    rows, shard = store.put_bytes(b"rows", "rows.parquet"), store.put_bytes(b"a shard", "images/a.tar")
    plan = store.work("going").create_plan({"rows": rows.to_json(), "shards": ["a"]})
    store.work("going").write_receipt("a", {"files": [shard.to_json()]})
    assert store.verify() == []
    damage(store, blob_key(rows.sha256), b"rowz")
    damage(store, blob_key(shard.sha256), b"A shard")
    problems = store.verify()
    assert [(problem.digest, problem.path) for problem in problems] == [
        ("", "plans/going.json rows.parquet"),
        ("", "receipts/going/a.json images/a.tar"),
    ]
    assert all("damaged" in problem.reason and "moved to quarantine/" in problem.reason for problem in problems)
    assert dict(store.work("going").receipts()) == {}, "the shard is made again"
    assert store.work("going").read_plan() == plan
    store.put_bytes(b"rows", "rows.parquet")
    store.work("going").write_receipt("a", {"files": [store.put_bytes(b"a shard", "images/a.tar").to_json()]})
    assert store.verify() == []


def test_an_unreadable_plan_is_set_aside_and_an_unreadable_receipt_is_made_again(store: Store, damage: Damage) -> None:
    store.work("going").create_plan({"shards": ["a"]})
    damage(store, "plans/going.json", b'{"shards":["a"')
    damage(store, "receipts/going/a.json", b"[]")
    plan, receipt = store.verify()
    assert plan.path == "plans/going.json" and "the next run of its stage plans again" in plan.reason
    assert receipt.path == "receipts/going/a.json" and "makes this shard again" in receipt.reason
    assert store.work("going").read_plan() is None
    store.work("going").create_plan({"shards": ["a"]})
    store.work("going").write_receipt("a", {"files": []})
    assert store.verify() == []


def test_a_shard_that_a_finished_stage_has_no_more_use_for_may_be_gone_but_not_damaged(
    store: Store, manifest: Manifest, damage: Damage
) -> None:
    unused = store.put_bytes(b"before duplicates were dropped", "a")
    store.work("key").write_receipt("0", {"files": [unused.to_json()]})
    damage(store, blob_key(unused.sha256), b"before duplicates were dr0pped")
    assert [problem.path for problem in store.verify()] == ["receipts/key/0.json a"]
    assert store.verify() == []


def test_what_a_pin_keeps_is_read_though_its_actions_are_forgotten(
    store: Store, manifest_of: MakeManifest, damage: Damage
) -> None:
    first = manifest_of(store.put_bytes(b"first", "a"), stage="first")
    second = manifest_of(store.put_bytes(b"second", "b"), stage="second", inputs={"first": first.digest})
    for made in (first, second):
        store.commit(made.stage, made)
    store.pin(second.digest)
    for made in (first, second):
        store.objects.delete(f"actions/{made.stage}.json")
    for made, bad in ((first, b"First"), (second, b"Second")):
        damage(store, blob_key(made.files[0].sha256), bad)
    assert {(problem.digest, problem.path) for problem in store.verify()} == {(first.digest, "a"), (second.digest, "b")}


def test_a_pin_whose_note_is_damaged_still_pins(store: Store, manifest: Manifest, damage: Damage) -> None:
    store.pin(manifest.digest, "why")
    damage(store, f"pins/{manifest.digest}.json", b"{")
    assert store.pins() == {manifest.digest: "(its note is damaged)"}


def test_checking_and_copying_say_each_file_with_its_size(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    checked: list[str] = []
    store.verify(manifest.digest, lambda entry: checked.append(entry.path))
    assert sorted(checked) == ["a", "b/c", "manifest"]
    copied: list[tuple[str, int]] = []
    store.materialise(manifest, tmp_path / "out", on_file=lambda entry: copied.append((entry.path, entry.size)))
    assert copied == [("a", 10), ("b/c", 11)]
