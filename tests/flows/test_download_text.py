"""A download in the terminal: what became of its rows, and which hosts lost most."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.download_text import inspect_download
from stages.download.counts import Totals, receipt_of
from storage.manifest import Manifest
from storage.store import Store
from storage.tables import image_metadata_table, write_table
from tests.flows.conftest import InProcess
from tests.helpers.misbehaving_server import misbehaving_server
from tests.helpers.tiny import CAPTIONS_ONLY

ROWS = [
    ("http://good.example/1", "ok", None),
    ("http://good.example/2", "ok", None),
    ("http://rotten.example/1", "http_error", "HTTP Error 404: Not Found"),
    ("http://rotten.example/2", "http_error", "HTTP Error 404: Not Found"),
    ("http://rotten.example/3", "timeout", "no whole answer in 10 s"),
    ("http://rotten.example/4", "ok", None),
    ("http://mixed.example/1", "undecodable", "OSError: image file is truncated (12 bytes not processed)"),
    ("http://mixed.example/2", "undecodable", "OSError: image file is truncated (7 bytes not processed)"),
    ("http://mixed.example/3", "filtered", "shortest side below 64 pixels"),
    ("local.png", "missing", "there is no such file"),
]


def metadata() -> list[dict[str, str | None]]:
    return [
        {"key": f"{index:09d}", "url": url, "caption": "x", "status": status, "error": error, "shard": "00000"}
        for index, (url, status, error) in enumerate(ROWS)
    ]


def test_counts_are_by_status_by_reason_without_details_and_by_host(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    write_table(image_metadata_table(metadata()), tmp_path / "rows.parquet")
    entry = store.put_file(tmp_path / "rows.parquet", "metadata/00000.parquet")
    metrics = Totals([receipt_of([entry], metadata())]).metrics() | {"splits": {"train": 2, "val": 1}}
    manifest = Manifest("image_shards", 1, "download", {}, {}, (entry,), metrics, {})
    lines = [line.split("  ") for line in inspect_download(store, manifest).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert ["ok", "3", "30.0%", "the image is in the shard"] in cells
    assert ["train", "2"] in cells and ["val", "1", "used by no stage"] in cells
    cut = cells.index(["undecodable: OSError: image file is truncated", "2", "000000006: http://mixed.example/1"])
    assert cells[cut + 1] == ["000000007: http://mixed.example/2"]
    assert ["shortest side below 64 pixels", "1", "000000008: http://mixed.example/3"] in cells
    assert ["missing: there is no such file", "1", "000000009: local.png"] in cells
    hosts = [row for row in cells if row and row[0].endswith(".example")]
    assert hosts == [
        ["rotten.example", "4", "3", "75%", "http_error: HTTP Error 404: Not Found"],
        ["mixed.example", "3", "2", "67%", "undecodable: OSError: image file is truncated"],
    ]
    assert metrics["hosts"] == {
        "rotten.example": {"rows": 4, "failed": 3},
        "mixed.example": {"rows": 3, "failed": 2},
    }


@pytest.mark.processes
@pytest.mark.slow
def test_retry_failed_fetches_what_failed_and_inspect_shows_what_is_left(tmp_path: Path, command: InProcess) -> None:
    with misbehaving_server() as server:
        urls = [server.url(path) for path in ("/red.png", "/mended.png", "/status/404")]
        (tmp_path / "list.csv").write_text("url,caption\n" + "".join(f"{url},x\n" for url in urls), encoding="utf-8")
        settings = [
            f"download.url_list={tmp_path / 'list.csv'}",
            *CAPTIONS_ONLY,
            "download.retries=0",
            "download.max_failed_fraction=0.4",
            f"download.http={{private_hosts: ['{server.address}']}}",
        ]
        arguments = ["stage", "download", "--recipe", "tiny", "--executor", "local", "--store", str(tmp_path / "store")]
        arguments += [part for setting in settings for part in ("--set", setting)]
        first = command(*arguments)
        assert first.code == 2
        assert "2 of 3 images failed" in first.stderr
        second = command(*arguments, "--retry-failed")
        assert second.code == 0, second.stderr
        assert "download.attempt=1: keep it" in second.stderr
        assert server.asked == {"/red.png": 1, "/mended.png": 2, "/status/404": 2}
    digest = second.stdout.split()[2]
    shown = command("inspect", digest, "--store", str(tmp_path / "store")).stdout
    assert "3 rows, 2 images" in shown
    assert "http_error: HTTP Error 404: Not Found" in shown
