"""URL lists good and bad, through img2dataset, against a server that misbehaves."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.executors import LocalExecutor
from stages.download import STAGE, DownloadConfig, read_rows
from stages.stage import Outcome, StageContext
from storage.image_shards import read_image_shard
from storage.store import Store


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = {
            "/red.png": png("red"),
            "/blue.png": png("blue"),
            "/cut.png": png("green")[:60],
            "/page.png": b"<html>no longer here</html>",
        }.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def run_download(config: DownloadConfig, folder: Path) -> tuple[Outcome, Store]:
    store = Store(str(folder / "store"))
    scratch = folder / "scratch"
    scratch.mkdir()
    context = StageContext(config, 0, {}, store, STAGE.action_key(config, 0, {}), LocalExecutor(), scratch)
    return STAGE.run(context), store


def write_list(path: Path, base_url: str, names: list[str]) -> str:
    path.write_text("url,caption\n" + "".join(f"{base_url}/{name},a {name}\n" for name in names), encoding="utf-8")
    return str(path)


def test_every_url_becomes_a_row_and_good_images_arrive(tmp_path: Path, base_url: str) -> None:
    names = ["red.png", "gone.png", "cut.png", "page.png", "blue.png"]
    path = write_list(tmp_path / "list.csv", base_url, names)
    outcome, store = run_download(DownloadConfig(url_list=path, max_failed_fraction=0.9, retries=0), tmp_path)
    files = {entry.path: entry for entry in outcome.files}
    rows = pq.read_table(store.fetch(files["metadata/00000.parquet"])).to_pylist()
    assert [row["caption"] for row in rows] == [f"a {name}" for name in names]
    assert [row["status"] == "ok" for row in rows] == [True, False, False, False, True]
    assert all(row["error"] for row in rows if row["status"] != "ok")
    samples = list(read_image_shard(store.fetch(files["images/00000.tar"])))
    assert [(sample.image, sample.extension) for sample in samples] == [(png("red"), "png"), (png("blue"), "png")]
    assert outcome.metrics["num_rows"] == 5 and outcome.metrics["num_ok"] == 2


def test_run_with_too_many_failures_stops_with_the_reasons(tmp_path: Path, base_url: str) -> None:
    path = write_list(tmp_path / "list.csv", base_url, ["red.png", "gone.png", "lost.png"])
    with pytest.raises(ValueError, match=r"2 of 3 URLs failed.*404.*download\.attempt=1"):
        run_download(DownloadConfig(url_list=path, retries=0), tmp_path)


def test_lists_of_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{"url": "http://a/1", "caption": "one, two", "n": "1"}, {"url": "http://a/2", "caption": "None", "n": "2"}]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "list.parquet")
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "list.csv").write_text('url,caption,n\nhttp://a/1,"one, two",1\nhttp://a/2,None,2\n', encoding="utf-8")
    tabbed = "url\tcaption\tn\nhttp://a/1\tone, two\t1\nhttp://a/2\tNone\t2\n"
    (tmp_path / "list.tsv").write_text(tabbed, encoding="utf-8")
    for suffix in ("parquet", "jsonl", "csv", "tsv"):
        config = DownloadConfig(url_list=str(tmp_path / f"list.{suffix}"), extra_columns=("n",))
        assert read_rows(config).to_pylist() == rows, suffix


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("url,text\nhttp://a,b\n", {}, r"no column 'caption'; it has url, text"),
        ("url,caption\n", {}, "has no rows"),
        ("url,caption\nhttp://a,b\n", {"keep": {"caption": ("c",)}}, r"has no rows after download\.keep"),
        ("url,caption\nhttp://a,b,c,d\n", {}, "not readable as csv"),
    ],
)
def test_bad_list_is_named_with_what_was_expected(tmp_path: Path, content: str, changes: dict, message: str) -> None:
    path = tmp_path / "list.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as raised:
        read_rows(DownloadConfig(url_list=str(path), **changes))
    assert str(path) in str(raised.value)


def test_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read download\.url_list="):
        read_rows(DownloadConfig(url_list=str(tmp_path / "absent.csv")))


def test_path_of_the_list_does_not_count_but_its_content_does(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one.csv", "same.csv", "other.csv"))
    one.write_text("url,caption\nhttp://a,b\n", encoding="utf-8")
    same.write_text("url,caption\nhttp://a,b\n", encoding="utf-8")
    other.write_text("url,caption\nhttp://a,c\n", encoding="utf-8")
    keys = [STAGE.action_key(DownloadConfig(url_list=str(path)), 0, {}) for path in (one, same, other)]
    assert keys[0] == keys[1] != keys[2]
