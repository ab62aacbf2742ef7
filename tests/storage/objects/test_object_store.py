import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.errors import ObjectMissing, StoreError
from storage.objects import s3 as objects_s3
from storage.objects import s3_retries
from storage.objects.object_store import ObjectStore


@pytest.fixture
def objects(store_uri: str) -> ObjectStore:
    return ObjectStore(store_uri)


def test_the_first_create_wins_and_later_ones_change_nothing(objects: ObjectStore) -> None:
    assert objects.create("a/b.json", b"first") is True
    assert objects.create("a/b.json", b"second") is False
    assert objects.create("a/b.json", b"first") is False
    assert objects.read("a/b.json") == b"first"


def test_create_wants_bytes(objects: ObjectStore) -> None:
    with pytest.raises(ValueError, match="at least one"):
        objects.create("a", b"")


def test_put_replaces(objects: ObjectStore) -> None:
    objects.put("a", b"first")
    objects.put("a", b"second one")
    assert objects.read("a") == b"second one"
    assert objects.size("a") == len(b"second one")


def test_put_file_replaces_whatever_is_there(objects: ObjectStore, tmp_path: Path) -> None:
    objects.put("same size", b"12345")
    objects.put("other", b"123")
    (tmp_path / "file").write_bytes(b"abcde")
    for key in ("same size", "other", "new"):
        objects.put_file(key, tmp_path / "file")
        assert objects.read(key) == b"abcde"


def test_list_gives_sorted_keys_by_prefix_and_nothing_else(objects: ObjectStore) -> None:
    keys = ["a/x.json", "a/y/z", "ab", "b/x", "b[1]*?"]
    for key in reversed(keys):
        objects.put(key, b"1")
    assert objects.list("") == sorted(keys)
    assert objects.list("a/") == ["a/x.json", "a/y/z"]
    assert objects.list("a") == ["a/x.json", "a/y/z", "ab"]
    assert objects.list("a/y/z") == ["a/y/z"]
    assert objects.list("nothing/") == []


def test_delete_removes_only_what_is_named(objects: ObjectStore) -> None:
    for key in ("a/b/c", "a/b/d", "a/bb", "e"):
        objects.put(key, b"1")
    objects.delete("e")
    objects.delete("e")
    objects.delete_prefix("a/b/")
    assert objects.list("") == ["a/bb"]
    with pytest.raises(ValueError, match="whole store"):
        objects.delete_prefix("")


def test_move_leaves_nothing_behind(objects: ObjectStore) -> None:
    objects.put("a/b", b"data")
    objects.move("a/b", "c/d")
    assert objects.list("") == ["c/d"]
    assert objects.read("c/d") == b"data"


def test_missing_objects_are_named(objects: ObjectStore) -> None:
    objects.put("folder/file", b"1")
    assert objects.size("nothing") is None
    assert objects.size("folder") is None
    for use in (objects.read, lambda key: objects.move(key, "x"), lambda key: objects.get_file(key, "/dev/null")):
        with pytest.raises(ObjectMissing, match="'nothing'.*not in the store"):
            use("nothing")


@pytest.mark.parametrize("key", ["", "/a", "../a", "a/../../b", "a//b", "tmp/a"])
def test_keys_outside_the_store_are_refused(objects: ObjectStore, key: str, tmp_path: Path) -> None:
    uses: list[Callable[[str], object]] = [
        lambda key: objects.create(key, b"1"),
        lambda key: objects.put(key, b"1"),
        lambda key: objects.put_file(key, tmp_path / "file"),
        lambda key: objects.get_file(key, tmp_path / "file"),
        lambda key: objects.move("a", key),
        lambda key: objects.move(key, "a"),
        lambda key: objects.open(key).__enter__(),
        objects.read, objects.size, objects.touch, objects.modified, objects.delete, objects.local_path,
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(ValueError, match="plain|relative|unfinished"):
            use(key)
    for listing in (objects.list, objects.details, objects.delete_prefix):
        with pytest.raises(ValueError, match="plain|relative"):
            listing("../a/")


def test_conditional_create_is_probed_and_the_probe_leaves_nothing(objects: ObjectStore) -> None:
    objects.check_access()
    objects.probe_conditional_create()
    assert objects.list("") == []


def test_a_back_end_that_ignores_if_none_match_is_refused(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = ObjectStore(s3_uri)

    def overwriting_create(self: objects_s3.S3Backend, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True

    monkeypatch.setattr(objects_s3.S3Backend, "create", overwriting_create)
    with pytest.raises(StoreError, match="overwrites in spite of If-None-Match"):
        objects.probe_conditional_create()


class _ScriptedFilesystem:
    """Stands for s3fs: each conditional put meets the next error of a script, None for success."""

    def __init__(self, script: list[OSError | None]) -> None:
        self.script = script

    def pipe_file(self, path: str, data: bytes, mode: str, Metadata: dict[str, str]) -> None:
        assert mode == "create"
        if (error := self.script.pop(0)) is not None:
            raise error

    def call_s3(self, method: str, Bucket: str, Key: str) -> dict[str, Any]:
        """Who made the object: somebody else."""
        assert method == "head_object"
        return {"Metadata": {}}


def _s3_error(code: str, status: int) -> OSError:
    cause = Exception(code)
    cause.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}  # type: ignore[attr-defined]
    error = OSError(errno.EIO, code)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("script", "created"),
    [
        (lambda: [_s3_error("ConditionalRequestConflict", 409), None], True),
        (lambda: [_s3_error("ConditionalRequestConflict", 409), _s3_error("PreconditionFailed", 412)], False),
        (lambda: [_s3_error("OperationAborted", 409), FileExistsError()], False),
    ],
)
def test_a_conflict_is_asked_again_and_a_failed_precondition_means_that_it_exists(
    script: Callable[[], list[Any]], created: bool, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem = _ScriptedFilesystem(script())
    monkeypatch.setattr(objects_s3.S3Backend, "_fs", filesystem)
    monkeypatch.setattr(s3_retries, "FIRST_BACKOFF_S", 0.0)
    assert ObjectStore(s3_uri).create("key", b"data") is created
    assert filesystem.script == []


def test_endless_conflicts_and_other_errors_are_reported(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_retries, "FIRST_BACKOFF_S", 0.0)
    for error in (_s3_error("ConditionalRequestConflict", 409), _s3_error("AccessDenied", 403)):
        filesystem = _ScriptedFilesystem([error] * 100)
        monkeypatch.setattr(objects_s3.S3Backend, "_fs", filesystem)
        with pytest.raises(StoreError, match="cannot create 'key' in the store s3://"):
            ObjectStore(s3_uri).create("key", b"data")


@pytest.mark.parametrize("uri", ["", "gs://bucket/x", "memory://x", "s3://", "s3://bucket/../x"])
def test_uris_of_no_known_kind_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="store URI|path"):
        ObjectStore(uri)


def test_a_local_folder_has_one_uri_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uris = {ObjectStore(uri).uri for uri in ("store", "./store", str(tmp_path / "store"), f"file://{tmp_path}/store")}
    assert uris == {str(tmp_path / "store")}
