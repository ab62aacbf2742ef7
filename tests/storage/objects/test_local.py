"""A folder in which somebody has put what does not belong there: symbolic links, pipes, other people's files."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from storage.blobs import blob_key
from storage.errors import DamagedObject, StoreError
from storage.manifest import FileEntry, Manifest
from storage.objects.object_store import ObjectStore
from storage.store import Store

NOW = timedelta(seconds=-60)
"""A grace period that keeps nothing."""
FOLDERS = ("actions", "attempts", "cas", "checkpoints", "pins", "plans", "quarantine", "receipts", "runs", "tmp")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that is not the store's, with old files under names that the store would use."""
    folder = tmp_path / "outside"
    for name in ("key.json", "key/a.json", "key/000000000001/complete.json", "sha256/ab/" + "ab" * 32):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")
        os.utime(path, (0, 0))
    return folder


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("linked", FOLDERS)
def test_nothing_behind_a_symbolic_link_is_read_changed_or_deleted(
    linked: str, tmp_path: Path, outside: Path, manifest_of: Callable[..., Manifest]
) -> None:
    store = Store(str(tmp_path / "store"))
    root = Path(store.uri)
    if (root / linked).exists():
        (root / linked).rename(tmp_path / "set-aside")
    (root / linked).symlink_to(outside)
    before = state(outside)
    file = tmp_path / "file"
    file.write_bytes(b"data")
    uses: list[Callable[[], object]] = [
        lambda: store.collect_garbage(NOW, delete=True),
        lambda: store.commit("key", manifest_of(store.put_file(file, "a"))),
        lambda: store.work("key").write_receipt("a", {"files": []}),
        lambda: store.work("key").create_plan({"shards": []}),
        lambda: store.record_run({"stage": "x"}),
        lambda: store.work("key").mark("a").__enter__(),
        lambda: store.work("key").save_checkpoint(1, outside),
        lambda: store.work("key").load_checkpoint(tmp_path / "loaded"),
        lambda: store.work("key").drop_checkpoints(),
        lambda: store.work("key").drop_receipts(),
        lambda: store.objects.delete_prefix(f"{linked}/"),
        lambda: store.objects.move(f"{linked}/key.json", "quarantine/key"),
        lambda: store.objects.touch(f"{linked}/key.json"),
        lambda: store.artifacts(),
        lambda: store.runs(),
        lambda: store.verify(),
    ]  # fmt: skip
    said = []
    for use in uses:
        try:
            use()
        except (StoreError, ValueError) as error:
            said.append(str(error))
        assert state(outside) == before
    expected = f"{linked} in the store {root} is a symbolic link, which a store never follows; remove it"
    keys_of_unfinished_files = [line for line in said if linked == "tmp" and "which is for unfinished files" in line]
    refused = [line for line in said if line not in keys_of_unfinished_files]
    assert refused and all(expected in line and "\n" not in line for line in refused)
    assert (root / linked).is_symlink()


def test_a_link_deep_in_a_store_ends_a_listing_that_decides_what_is_garbage(tmp_path: Path, outside: Path) -> None:
    store = Store(str(tmp_path / "store"))
    entry = store.put_bytes(b"data", "a")
    folder = Path(store.uri) / "cas" / "sha256" / entry.sha256[:2]
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    with pytest.raises(StoreError, match=f"cas/sha256/{entry.sha256[:2]} in the store .* is a symbolic link"):
        store.collect_garbage(NOW, delete=True)
    assert [path.name for path in (tmp_path / "moved").iterdir()] == [entry.sha256]


def test_links_in_the_place_of_files_are_damage_and_go_without_what_they_point_to(
    tmp_path: Path, manifest_of: Callable[..., Manifest]
) -> None:
    store = Store(str(tmp_path / "store"))
    root, secret = Path(store.uri), tmp_path / "secret.json"
    manifest = manifest_of(store.put_bytes(b"data", "a"))
    store.commit("key", manifest)
    blob, record = root / blob_key(manifest.files[0].sha256), root / "actions" / "key.json"
    # The bytes are right, for now: whoever made the link may change them at any time
    for path in (blob, record):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    for name in ("runs/run.json", "quarantine/bad", "tmp/half"):
        secret.write_text("{}")
        os.utime(secret, (0, 0))
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(secret)
    with pytest.raises(DamagedObject, match=r"actions/key\.json in the store .* is a symbolic link"):
        store.objects.read("actions/key.json")
    assert store.lookup("key") is None and store.runs() == [] and not store.holds(manifest.files[0])
    found = store.collect_garbage(NOW, delete=True)
    assert "actions/key.json is no action record" in found.unreadable[0]
    assert {item.key for item in found.garbage} == {"quarantine/bad", "tmp/half"}
    store.put_bytes(b"data", "a")
    store.commit("key", manifest)
    assert store.lookup("key") == manifest
    assert not blob.is_symlink() and not record.is_symlink()
    assert secret.read_text() == "{}" and secret.stat().st_mtime == 0
    assert (tmp_path / blob.name).read_bytes() == b"data"


def test_the_folder_of_a_store_may_itself_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    store = Store(str(tmp_path / "store"))
    assert store.read_bytes(store.put_bytes(b"data", "a")) == b"data"
    assert store.collect_garbage(NOW, delete=True).garbage


def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_damage_and_blocks_nobody(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    store.record_run({"stage": "x"})
    (tmp_path / "store" / "actions").mkdir()
    os.mkfifo(tmp_path / "store" / "actions" / "key.json")
    os.mkfifo(tmp_path / "store" / "runs" / "run.json")
    (tmp_path / "store" / "tmp" / "folder").mkdir()
    assert store.artifacts() == [] and store.lookup("key") is None and len(store.runs()) == 1
    assert not [item for item in store.collect_garbage(NOW, delete=True).garbage if item.key.startswith("tmp/folder")]
    with pytest.raises(DamagedObject, match="is no regular file"):
        store.objects.read("actions/key.json")


@pytest.mark.parametrize("name", [b"Icon\r", b"a\nb", b"\xff", b"back\\slash", b"\x1b[2J"])
def test_files_whose_names_no_object_can_have_are_left_alone_and_stop_nothing(
    name: bytes, local_store: Store, manifest_of: Callable[..., Manifest]
) -> None:
    manifest = manifest_of(local_store.put_bytes(b"data", "a"))
    local_store.commit("key", manifest)
    local_store.record_run({"stage": "x"})
    root = os.fsencode(local_store.uri)
    for folder in FOLDERS:
        os.makedirs(os.path.join(root, folder.encode()), exist_ok=True)
        path = os.path.join(root, folder.encode(), name)
        with open(path, "wb"):
            os.utime(path, (0, 0))
    assert [info.digest for info in local_store.artifacts()] == [manifest.digest]
    assert len(local_store.runs()) == 1 and local_store.pins() == {} and local_store.verify() == []
    assert local_store.collect_garbage(timedelta(days=1), delete=True).unreadable == []
    assert all(os.path.exists(os.path.join(root, folder.encode(), name)) for folder in FOLDERS)


@pytest.mark.parametrize("linked", ["model", "model/inner"])
def test_an_export_writes_through_no_link_below_its_folder(
    linked: str, local_store: Store, manifest_of: Callable[..., Manifest], tmp_path: Path, outside: Path
) -> None:
    manifest = manifest_of(local_store.put_bytes(b"data", "model/inner/key.json"))
    target = tmp_path / "export"
    (target / linked).parent.mkdir(parents=True)
    (target / linked).symlink_to(outside)
    before = state(outside)
    with pytest.raises(StoreError, match=f"{target / linked} is a symbolic link, which nothing in the folder"):
        local_store.materialise(manifest, target)
    assert state(outside) == before


def test_an_export_replaces_a_link_at_a_files_own_name(
    local_store: Store, manifest_of: Callable[..., Manifest], tmp_path: Path, outside: Path
) -> None:
    before = state(outside)
    target = tmp_path / "export"
    target.mkdir()
    (target / "a").symlink_to(outside / "key.json")
    local_store.materialise(manifest_of(local_store.put_bytes(b"data", "a")), target)
    assert (target / "a").read_bytes() == b"data" and state(outside) == before


@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/etc/x", "a\\..\\x", "a//b", ".", "a\nb", "a\u202eb", "a\x1b[2J"]
)
def test_names_in_a_manifest_from_elsewhere_stay_within_a_folder(path: str, local_store: Store, tmp_path: Path) -> None:
    """A foreign store may hold any bytes under their right digest."""
    import json

    from storage.digests import canonical_json, digest_of
    from storage.records import record_bytes

    entry = local_store.put_bytes(b"data", "a")
    good = Manifest("thing", 1, "stage", {}, {}, (entry,), {}, {})
    value = json.loads(good.to_bytes())
    value["files"][0]["path"] = path
    local_store.put_bytes(canonical_json(value), "manifest")
    local_store.objects.put("actions/key.json", record_bytes({"manifest": digest_of(value), "schema": 1}))
    with pytest.raises(DamagedObject, match="not an artifact's manifest"):
        local_store.load(digest_of(value))
    assert local_store.lookup("key") is None and local_store.artifacts() == []
    assert local_store.collect_garbage(NOW, delete=True).unreadable
    with pytest.raises(ValueError, match="relative"):
        FileEntry(path, 4, entry.sha256)


def test_inputs_in_a_manifest_from_elsewhere_are_digests() -> None:
    with pytest.raises(ValueError, match=r"input 'download' is '\.\./x'; give the digest of its artifact"):
        Manifest("thing", 1, "stage", {}, {"download": "../x"}, (), {}, {})


def test_keys_are_never_resolved_against_the_folder_above(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    objects = ObjectStore(str(tmp_path / "store"))
    objects.put("a/b", b"1")
    for use in (objects.read, objects.size, objects.delete, objects.list):
        with pytest.raises(ValueError, match="not a plain relative POSIX path"):
            use("a/../../secret/x")
