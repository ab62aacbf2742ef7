"""The store behind a service that fails: an operation comes through, or says that the service is down."""

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import s3fs

from storage.errors import StoreError
from storage.manifest import FileEntry, Manifest
from storage.objects import s3_retries
from storage.objects.object_store import ObjectStore
from storage.store import Commit, Store
from tests.helpers.fault_proxy import FAULTS, Fault, FaultProxy

MakeManifest = Callable[..., Manifest]


@dataclass
class Sides:
    """One store, seen through the proxy and without it."""

    proxied: Store
    direct: Store
    proxy: FaultProxy
    folder: Path
    manifest_of: MakeManifest


@pytest.fixture
def sides(proxy: FaultProxy, s3_uri: str, impatient: None, tmp_path: Path, manifest_of: MakeManifest) -> Sides:
    direct = Store(s3_uri)
    return Sides(Store(s3_uri, endpoint_url=proxy.url), direct, proxy, tmp_path, manifest_of)


Act = Callable[[Store], object]
Check = Callable[[Store, Any], bool]


@dataclass(frozen=True)
class Case:
    """An operation on fresh names: what is done through the proxy, and whether the other side sees it done right."""

    act: Act
    check: Check


def put_file(sides: Sides, name: str) -> Case:
    path = sides.folder / name
    path.write_bytes(name.encode() * 1000)
    return Case(
        lambda store: store.put_file(path, "file"),
        lambda store, entry: store.read_bytes(entry) == path.read_bytes(),
    )


def put_bytes(sides: Sides, name: str) -> Case:
    data = name.encode()
    return Case(lambda store: store.put_bytes(data, "file"), lambda store, entry: store.read_bytes(entry) == data)


def put_again(sides: Sides, name: str) -> Case:
    """What is there becomes young, by a copy onto itself."""
    path = sides.folder / f"{name}-again"
    path.write_bytes(name.encode() * 1000)
    sides.direct.put_file(path, "file")
    return Case(
        lambda store: store.put_file(path, "file"),
        lambda store, entry: store.read_bytes(entry) == path.read_bytes(),
    )


def create(sides: Sides, name: str) -> Case:
    """The conditional put itself knows its own object, also when the answer to the first try was lost."""
    return Case(
        lambda store: [store.objects.create(f"x/{name}", b"ours"), store.objects.create(f"x/{name}", b"other")],
        lambda store, created: created == [True, False] and store.objects.read(f"x/{name}") == b"ours",
    )


def create_plan(sides: Sides, name: str) -> Case:
    def check(store: Store, plan: object) -> bool:
        return plan == {"shards": [name]} == store.work(name).create_plan({"shards": []})

    return Case(lambda store: store.work(name).create_plan({"shards": [name]}), check)


def read_plan(sides: Sides, name: str) -> Case:
    sides.direct.work(name).create_plan({"shards": [name]})
    return Case(lambda store: store.work(name).read_plan(), lambda store, plan: plan == {"shards": [name]})


def write_receipt(sides: Sides, name: str) -> Case:
    receipt = {"files": [sides.direct.put_bytes(name.encode(), "file").to_json()]}
    return Case(
        lambda store: store.work(name).write_receipt("0", receipt),
        lambda store, written: written == receipt and dict(store.work(name).receipts()) == {"0": receipt},
    )


def receipts(sides: Sides, name: str) -> Case:
    receipt = {"files": [sides.direct.put_bytes(name.encode(), "file").to_json()]}
    for shard in ("0", "1"):
        sides.direct.work(name).write_receipt(shard, receipt)
    return Case(
        lambda store: dict(store.work(name).receipts()), lambda store, found: found == {"0": receipt, "1": receipt}
    )


def commit(sides: Sides, name: str) -> Case:
    manifest = sides.manifest_of(sides.direct.put_bytes(name.encode(), "file"), stage=name)
    return Case(
        lambda store: store.commit(name, manifest),
        lambda store, done: (
            done == Commit(manifest.digest, created=True, adopted=False) and store.lookup(name) == manifest
        ),
    )


def lookup(sides: Sides, name: str) -> Case:
    manifest = sides.manifest_of(sides.direct.put_bytes(name.encode(), "file"), stage=name)
    sides.direct.commit(name, manifest)
    return Case(lambda store: store.lookup(name), lambda store, found: found == manifest)


def fetch(sides: Sides, name: str) -> Case:
    entry = sides.direct.put_bytes(name.encode() * 1000, "file")
    return Case(
        lambda store: store.fetch(entry).read_bytes(), lambda store, data: bool(data == store.read_bytes(entry))
    )


def verify(sides: Sides, name: str) -> Case:
    manifest = sides.manifest_of(sides.direct.put_bytes(name.encode(), "file"), stage=name)
    sides.direct.commit(name, manifest)
    return Case(lambda store: store.verify(manifest.digest), lambda store, problems: problems == [])


def _checkpoint(sides: Sides, name: str) -> Path:
    folder = sides.folder / name
    folder.mkdir()
    (folder / "model").write_bytes(name.encode() * 1000)
    return folder


def _loaded(store: Store, sides: Sides, name: str) -> tuple[int | None, bytes]:
    target = sides.folder / f"{name}-{uuid.uuid4().hex}"
    return store.work(name).load_checkpoint(target), (target / "model").read_bytes()


def save_checkpoint(sides: Sides, name: str) -> Case:
    folder = _checkpoint(sides, name)
    return Case(
        lambda store: store.work(name).save_checkpoint(7, folder),
        lambda store, _: _loaded(store, sides, name) == (7, (folder / "model").read_bytes()),
    )


def load_checkpoint(sides: Sides, name: str) -> Case:
    """An older step is there too: it must not be taken because the service stumbled over the newer one."""
    folder = _checkpoint(sides, name)
    for step in (6, 7):
        sides.direct.work(name).save_checkpoint(step, folder, keep=2)
    return Case(
        lambda store: _loaded(store, sides, name),
        lambda store, loaded: loaded == (7, (folder / "model").read_bytes()),
    )


CASES = [
    put_file,
    put_bytes,
    put_again,
    create,
    create_plan,
    read_plan,
    write_receipt,
    receipts,
    commit,
    lookup,
    fetch,
    verify,
    save_checkpoint,
    load_checkpoint,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_an_operation_comes_through_a_fault_at_any_of_its_requests(fault: Fault, sides: Sides) -> None:
    for case in CASES:
        name = f"{case.__name__}-{fault}"
        plain = case(sides, name)
        before = sides.proxy.count()
        assert plain.check(sides.direct, plain.act(sides.proxied))
        num_requests = sides.proxy.count() - before
        assert num_requests > 0
        for number in range(num_requests):
            spoilt = case(sides, f"{name}-{number}")
            sides.proxy.spoil([number], fault)
            result = spoilt.act(sides.proxied)
            assert not sides.proxy.faults, f"the fault happened to {name}"
            assert spoilt.check(sides.direct, result), f"{name}, request {number} of {num_requests}"


@pytest.mark.parametrize("fault", ["500", "timeout", "reset_request", "lost_response"])
def test_a_service_that_stays_down_is_a_clear_error_and_nothing_wrong_becomes_visible(
    fault: Fault, sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_retries, "ATTEMPTS", 2)
    for case in CASES:
        spoilt = case(sides, f"{case.__name__}-{fault}")
        sides.proxy.always = fault
        with pytest.raises(StoreError, match=r"cannot \w+( at)? '.*' in the store s3://.*; check") as caught:
            spoilt.act(sides.proxied)
        assert type(caught.value) is StoreError, "an outage is neither a loss nor a damage"
        sides.proxy.always = None
        check_nothing_is_wrong(sides.direct)
        if case not in (commit, create):  # which say, rightly, that the first call had made the object
            assert spoilt.check(sides.direct, spoilt.act(sides.proxied))


def check_nothing_is_wrong(store: Store) -> None:
    """Everything that can be seen is whole."""
    from storage.digests import sha256_bytes

    for key in store.objects.list("cas/"):
        assert sha256_bytes(store.objects.read(key)) == key.rpartition("/")[2]
    for folder in ("actions/", "plans/", "receipts/"):
        for key in store.objects.list(folder):
            json.loads(store.objects.read(key))
    for info in store.artifacts():
        assert store.lookup(info.action_key) is not None
    assert store.objects.list("quarantine/") == []


def test_several_faults_in_a_row_are_outlasted(sides: Sides) -> None:
    for fault in ("500", "503", "reset_request", "lost_response"):
        spoilt = put_file(sides, fault)
        sides.proxy.spoil(range(s3_retries.ATTEMPTS - 1), fault)
        assert spoilt.check(sides.direct, spoilt.act(sides.proxied))


def test_a_file_that_is_moved_in_parts_stays_whole_though_connections_break(
    proxy: FaultProxy, s3_uri: str, short_waits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda size, chunksize=None: 5 << 20)
    objects = ObjectStore(s3_uri, endpoint_url=proxy.url, default_block_size=5 << 20)
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 4096 * 12)  # 12 MiB, three parts
    faults: list[tuple[list[int], Fault]] = [([2, 4], "500"), ([3], "reset_request"), ([4], "lost_response")]
    for turn, (numbers, fault) in enumerate(faults):
        proxy.spoil(numbers, fault)
        objects.put_file(f"large{turn}", path)
        proxy.spoil([1, 3], "reset_response")
        objects.get_file(f"large{turn}", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == path.read_bytes()
        with objects.open(f"large{turn}") as stream:
            proxy.spoil([0, 1], "reset_response")
            assert stream.read() == path.read_bytes()


def test_garbage_collection_deletes_nothing_when_the_service_fails_while_it_looks(sides: Sides) -> None:
    from datetime import timedelta

    lookup(sides, "kept")
    before = sides.direct.objects.list("cas/")
    sides.proxy.always = "503"
    with pytest.raises(StoreError):
        sides.proxied.collect_garbage(timedelta(seconds=-60), delete=True)
    sides.proxy.always = None
    assert sides.direct.objects.list("cas/") == before


def test_the_probe_of_conditional_puts_survives_lost_answers(proxy: FaultProxy, s3_uri: str, impatient: None) -> None:
    objects = ObjectStore(s3_uri, endpoint_url=proxy.url)
    objects.probe_conditional_create()
    for number in range(4):
        proxy.spoil([number], "lost_response")
        objects.probe_conditional_create()
        assert objects.list("") == []


def test_a_service_that_ignores_if_none_match_is_refused_at_the_start(
    proxy: FaultProxy, s3_uri: str, impatient: None
) -> None:
    proxy.drop_conditions = True
    with pytest.raises(StoreError, match="overwrites in spite of If-None-Match, so two writers could lose results"):
        Store(s3_uri, endpoint_url=proxy.url)
    proxy.drop_conditions = False
    assert Store(s3_uri, endpoint_url=proxy.url).put_bytes(b"data", "a") == FileEntry(
        "a", 4, "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7"
    )


def test_a_repeated_create_is_told_from_another_writers(sides: Sides) -> None:
    """A lost answer to one's own put, and then the object of somebody else, are 412 both."""
    sides.proxy.spoil([0], "lost_response")
    assert sides.proxied.objects.create("own", b"same bytes") is True
    sides.direct.objects.create("foreign", b"same bytes")
    sides.proxy.spoil([0], "500")
    assert sides.proxied.objects.create("foreign", b"same bytes") is False
