"""Records: what is damaged in one is seen, and the record is taken for absent, with a message."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.digests import canonical_json
from storage.manifest import Manifest
from storage.objects.object_store import ObjectStore
from storage.records import parse_record, record_bytes
from storage.store import Store

MakeManifest = Callable[..., Manifest]
Damage = Callable[[Store, str, bytes], None]

RECORD: dict[str, Any] = {
    "files": [{"path": "images/0.tar", "sha256": "ab" * 32, "size": 10}],
    "rows": 12,
    "share": 0.5,
    "text": 'ä "quoted"\\',
}


@pytest.mark.parametrize("record", [{}, {"rows": 1}, RECORD, {"zz": {"checksum": "inner"}}])
def test_a_record_comes_back_and_other_readers_see_json(record: dict[str, Any]) -> None:
    data = record_bytes(record)
    assert parse_record(data) == record
    assert json.loads(data) == record | {"checksum": json.loads(data)["checksum"]}
    assert data == record_bytes(dict(reversed(record.items()))), "equal records have equal bytes"


def refused(data: bytes) -> bool:
    try:
        parse_record(data)
    except ValueError:
        return True
    return False


def test_every_flipped_bit_of_a_record_is_seen() -> None:
    for record in ({}, RECORD):
        data = record_bytes(record)
        for position in range(len(data)):
            for bit in range(8):
                flipped = bytearray(data)
                flipped[position] ^= 1 << bit
                assert refused(bytes(flipped)), bytes(flipped)


def test_every_cut_of_a_record_is_seen() -> None:
    data = record_bytes(RECORD)
    for length in range(len(data)):
        assert refused(data[:length])


def test_a_record_without_a_checksum_is_that_of_an_older_version_and_is_read() -> None:
    assert parse_record(canonical_json(RECORD)) == RECORD


def test_a_field_of_the_checksums_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'checksum'.*another name"):
        record_bytes({"checksum": "mine"})


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"3", b"", b"\xff", b"9" * 10_000])
def test_bytes_that_are_no_record_are_a_clear_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"nested|instead of|Expecting|decode|digits"):
        parse_record(data)


def flip(store: Store, key: str, old: bytes, new: bytes) -> None:
    """Change bytes of a record behind the store's back."""
    data = store.objects.read(key)
    assert data.count(old) >= 1, data
    store.objects.put(key, data.replace(old, new, 1))


def test_a_flipped_digit_in_a_receipt_makes_its_shard_anew(
    local_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    receipt = {"files": [local_store.put_bytes(b"shard", "a").to_json()], "rows": 12}
    local_store.work("key").write_receipt("0", receipt)
    flip(local_store, "receipts/key/0.json", b'"rows":12', b'"rows":92')
    assert dict(local_store.work("key").receipts()) == {} and local_store.work("key").receipt("0") is None
    assert "ignored the receipt receipts/key/0.json" in caplog.text
    assert "its checksum is not that of its contents" in caplog.text
    (problem,) = local_store.verify()
    assert (
        problem.path == "receipts/key/0.json" and "the next run of its stage makes this shard again" in problem.reason
    )
    assert local_store.work("key").write_receipt("0", receipt) == receipt
    assert dict(local_store.work("key").receipts()) == {"0": receipt} and local_store.verify() == []


def test_a_flipped_digit_in_a_plan_plans_anew(local_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    plan = {"shards": [{"start": 0, "count": 10}]}
    local_store.work("key").create_plan(plan)
    flip(local_store, "plans/key.json", b'"count":10', b'"count":18')
    assert local_store.work("key").read_plan() is None
    assert "ignored the plan plans/key.json: its checksum is not that of its contents" in caplog.text
    assert local_store.work("key").create_plan(plan) == plan == local_store.work("key").read_plan()


def test_a_flipped_digit_in_an_action_is_a_miss_and_is_replaced(
    local_store: Store, manifest_of: MakeManifest, caplog: pytest.LogCaptureFixture
) -> None:
    right, other = (manifest_of(local_store.put_bytes(data, "a")) for data in (b"right", b"other"))
    local_store.commit("key", right)
    local_store.commit("else", other)
    flip(local_store, "actions/key.json", right.digest.encode(), other.digest.encode())
    assert local_store.lookup("key") is None, "and not the artifact of another action"
    assert "ignored the action record actions/key.json" in caplog.text
    assert local_store.commit("key", right).created
    assert local_store.lookup("key") == right


def test_a_flipped_digit_in_the_record_of_a_checkpoint_takes_the_one_before(
    local_store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        folder = tmp_path / str(step)
        folder.mkdir()
        (folder / "state").write_bytes(f"state {step}".encode())
        local_store.work("key").save_checkpoint(step, folder, keep=2)
    flip(local_store, "checkpoints/key/000000000002/complete.json", b'"path":"state"', b'"path":"stats"')
    assert local_store.work("key").load_checkpoint(tmp_path / "loaded") == 1
    assert (tmp_path / "loaded" / "state").read_bytes() == b"state 1"
    assert "skipped the damaged checkpoint of step 2" in caplog.text and "checksum" in caplog.text
    local_store.work("key").save_checkpoint(2, tmp_path / "2", keep=2)
    assert local_store.work("key").load_checkpoint(tmp_path / "again") == 2


@pytest.mark.parametrize("folder", ["../../../../outside", "..", "", 3, None])
def test_the_record_of_a_checkpoint_from_elsewhere_names_nothing_outside_of_it(
    folder: object, local_store: Store, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "state").write_bytes(b"data")
    entry = local_store.put_bytes(b"data", "state")
    record = {"step": 1, "folder": folder, "files": [entry.to_json()]}
    local_store.objects.put("checkpoints/key/000000000001/complete.json", record_bytes(record))
    assert local_store.work("key").load_checkpoint(tmp_path / "loaded") is None
    local_store.work("key").save_checkpoint(1, tmp_path / "outside")
    assert (tmp_path / "outside" / "state").read_bytes() == b"data"
    assert local_store.work("key").load_checkpoint(tmp_path / "loaded") == 1


def test_one_damaged_record_of_a_run_is_skipped_and_named(local_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    ids = [local_store.record_run({"stage": "evaluate", "number": number}) for number in range(4)]
    flip(local_store, f"runs/{ids[3]}.json", b'"number":3', b'"number":7')
    local_store.objects.put(f"runs/{ids[2]}.json", b"{")
    local_store.objects.put("runs/notes.txt", b"mine")
    local_store.objects.put("runs/of-an-older-version.json", canonical_json({"stage": ["evaluate"]}))
    local_store.objects.put("runs/of-another.json", canonical_json({"stage": "sft"}))
    with caplog.at_level(logging.WARNING):
        runs = local_store.runs()
    assert [run.get("number", run["stage"]) for run in runs] == ["sft", 1, 0]
    for key in (f"runs/{ids[3]}.json", f"runs/{ids[2]}.json", "runs/notes.txt", "runs/of-an-older-version.json"):
        assert f"skipped {key}, the damaged record of a run: " in caplog.text
    assert len(caplog.records) == 4 and all("\n" not in record.getMessage() for record in caplog.records)
    problems = local_store.verify()
    assert len(problems) == 4 and all("nothing needs the record of a run" in problem.reason for problem in problems)
    assert local_store.verify() == [] and len(local_store.runs()) == 3


def test_a_store_of_a_version_without_checksums_goes_on(
    local_store: Store, manifest_of: MakeManifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = local_store.put_bytes(b"data", "a")
    manifest, receipt = manifest_of(entry), {"files": [entry.to_json()], "rows": 1}
    local_store.commit("key", manifest)
    local_store.work("going").create_plan({"shards": ["0"]})
    local_store.work("going").write_receipt("0", receipt)
    local_store.record_run({"stage": "x"})
    local_store.work("going").save_checkpoint(1, _folder_with_a_file(tmp_path))
    local_store.pin(manifest.digest, "why")
    for key in local_store.objects.list(""):
        if key.endswith(".json") and not key.startswith("probes/"):
            local_store.objects.put(key, canonical_json(parse_record(local_store.objects.read(key))))
    assert local_store.lookup("key") == manifest
    assert local_store.work("going").read_plan() == {"shards": ["0"]} and dict(
        local_store.work("going").receipts()
    ) == {"0": receipt}
    assert local_store.runs()[0]["stage"] == "x" and local_store.pins() == {manifest.digest: "why"}
    assert local_store.work("going").load_checkpoint(tmp_path / "loaded") == 1
    assert caplog.text == ""
    assert local_store.verify() == []
    assert "4 records are of a version without checksums" in caplog.text


def _folder_with_a_file(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "state").write_bytes(b"state")
    return folder


def test_a_file_among_the_pins_that_names_no_artifact_pins_nothing_and_stops_nothing(
    local_store: Store, manifest_of: MakeManifest
) -> None:
    from datetime import timedelta

    manifest = manifest_of(local_store.put_bytes(b"data", "a"))
    local_store.commit("key", manifest)
    local_store.pin(manifest.digest, "why")
    objects: ObjectStore = local_store.objects
    objects.put("pins/.DS_Store", b"\0\0")
    assert local_store.pins() == {manifest.digest: "why"}
    assert local_store.collect_garbage(timedelta(0), delete=True).unreadable == []
    (problem,) = local_store.verify()
    assert problem.path == "pins/.DS_Store" and "pins nothing; remove it" in problem.reason
