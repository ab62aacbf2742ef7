from collections.abc import Callable

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


def test_an_unreadable_action_is_set_aside(store: Store, manifest: Manifest, damage: Damage) -> None:
    damage(store, "actions/key.json", b"{")
    (problem,) = store.verify()
    assert problem.path == "actions/key.json"
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
