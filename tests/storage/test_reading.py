"""A store that cannot be written, on a folder and on S3: all that reads works, all that writes says so in one line."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from storage.blobs import blob_key
from storage.errors import StoreError
from storage.manifest import Manifest
from storage.store import Access, Store
from tests.helpers.fault_proxy import WRITES, FaultProxy
from tests.helpers.read_only import mount_read_only, readable_only

SKIPPED = 77


class Reader:
    """A store with an artifact, a run and work in progress, and somebody who may only read it."""

    def __init__(self, uri: str, proxy: FaultProxy | None) -> None:
        self.writable, self._proxy = Store(uri), proxy
        self.entry = self.writable.put_bytes(b"data", "folder/a")
        self.manifest = Manifest("thing", 1, "stage", {}, {}, (self.entry,), {}, {})
        self.writable.commit("key", self.manifest)
        self.writable.pin(self.manifest.digest, "why")
        self.writable.record_run({"stage": "stage"})
        self.writable.work("going").create_plan({"shards": ["0"]})
        self.writable.work("going").write_receipt("0", {"files": []})

    @contextmanager
    def reading(self) -> Iterator[None]:
        if self._proxy is None:
            with readable_only(Path(self.writable.uri)):
                yield
        else:
            self._proxy.refused = WRITES
            yield
            self._proxy.refused = frozenset()

    def open(self, access: Access) -> Store:
        options: dict[str, Any] = {} if self._proxy is None else {"endpoint_url": self._proxy.url}
        return Store(self.writable.uri, access=access, **options)


@pytest.fixture
def reader(store_uri: str, request: pytest.FixtureRequest) -> Reader:
    return Reader(store_uri, request.getfixturevalue("proxy") if store_uri.startswith("s3://") else None)


def read_everything(store: Store, reader: Reader, folder: Path) -> None:
    manifest = reader.manifest
    assert [info.digest for info in store.artifacts()] == [manifest.digest]
    assert store.lookup("key") == store.load(manifest.digest[:8]) == manifest
    assert store.pins() == {manifest.digest: "why"}
    assert [run["stage"] for run in store.runs()] == ["stage"]
    assert store.fetch(reader.entry).read_bytes() == store.read_bytes(reader.entry) == b"data"
    store.materialise(manifest, folder)
    assert (folder / "folder" / "a").read_bytes() == b"data"
    assert store.work("going").receipt("0") == {"files": []}
    assert store.verify() == []
    assert store.collect_garbage(timedelta(days=1), delete=False).garbage == []


def test_reading_takes_no_right_to_write(reader: Reader, tmp_path: Path) -> None:
    before = reader.writable.objects.list("")
    with reader.reading():
        read_everything(reader.open("read"), reader, tmp_path / "exported")
        read_everything(pickle.loads(pickle.dumps(reader.open("read"))), reader, tmp_path / "again")
    assert reader.writable.objects.list("") == before


@pytest.mark.parametrize("access", ["create", "write"])
@pytest.mark.parametrize("probed", [False, True])
def test_opening_it_to_write_says_in_one_line_that_it_cannot_be_written(
    access: Access, probed: bool, reader: Reader
) -> None:
    if probed:  # somebody who may write has been here through the same endpoint
        reader.open("write")
    with reader.reading(), pytest.raises(StoreError) as caught:
        reader.open(access)
    message = str(caught.value)
    assert message.startswith("cannot write to the store ") and reader.writable.uri in message
    assert "ermission" in message or "Access" in message or "403" in message
    assert "; choose a folder that you can write to" in message or "; use credentials that may write" in message
    assert "\n" not in message


def test_writing_to_it_all_the_same_is_refused_in_one_line_too(reader: Reader, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"other")
    with reader.reading():
        store = reader.open("read")
        uses: list[Callable[[], object]] = [
            lambda: store.put_file(tmp_path / "file", "a"),
            lambda: store.put_bytes(b"new", "a"),
            lambda: store.commit("new", reader.manifest),
            lambda: store.record_run({}),
            lambda: store.unpin(reader.manifest.digest),
            lambda: store.pin(reader.manifest.digest),
            lambda: store.work("new").write_receipt("0", {"files": []}),
        ]
        for use in uses:
            with pytest.raises(StoreError, match=r"cannot \w+ '.*' in the store .*; check .*permissions") as caught:
                use()
            assert "\n" not in str(caught.value)


def test_damage_in_it_is_reported_and_stays_where_it_is(reader: Reader) -> None:
    key = blob_key(reader.entry.sha256)
    reader.writable.objects.put(key, b"dada")
    reader.writable.objects.put("runs/bad.json", b"{")
    before = reader.writable.objects.list("")
    with reader.reading():
        problems = reader.open("read").verify()
    assert [problem.path for problem in problems] == ["folder/a", "runs/bad.json"]
    for problem in problems:
        assert problem.reason.startswith("damaged: ")
        assert "it stays there, for it could not be set aside: cannot move " in problem.reason
    assert reader.writable.objects.list("") == before
    assert all("moved to quarantine/" in problem.reason for problem in reader.writable.verify())


def _on_a_read_only_mount(reader: Reader, folder: Path) -> None:
    if not mount_read_only(Path(reader.writable.uri)):
        raise SystemExit(SKIPPED)
    read_everything(reader.open("read"), reader, folder)
    with pytest.raises(StoreError, match="cannot write to the store folder .*: Read-only file system; choose a folder"):
        reader.open("write")


@pytest.mark.processes
def test_a_store_on_a_read_only_mount_is_read(tmp_path: Path) -> None:
    reader = Reader(str(tmp_path / "store"), None)
    process = multiprocessing.get_context("fork").Process(
        target=_on_a_read_only_mount, args=(reader, tmp_path / "exported")
    )
    process.start()
    process.join()
    if process.exitcode == SKIPPED:
        pytest.skip("mounting is not allowed here")
    assert process.exitcode == 0


@pytest.mark.parametrize("access", ["read", "write"])
def test_a_store_that_is_not_there_is_named_and_not_made(access: Access, store_uri: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no store in .*; name another with --store or MUSEVL_STORE, or ma"):
        Store(store_uri, access=access)
    assert not (tmp_path / "store").exists()
    Store(store_uri)
    assert Store(store_uri, access=access).artifacts() == []


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="there is no store in .*/file: Not a directory"):
        Store(str(tmp_path / "file"), access="read")


def test_a_worker_gets_the_store_that_was_opened_and_makes_none(tmp_path: Path) -> None:
    """A folder that only the driver's machine has must not become an empty store on another one."""
    pickled = pickle.dumps(Store(str(tmp_path / "store")))
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="there is no store in"):
        pickle.loads(pickled)
    assert not (tmp_path / "store").exists()
