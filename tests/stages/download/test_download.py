"""URL lists good and bad, through img2dataset, against a server that misbehaves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.executors import LocalExecutor
from stages.download.sources.source import PLACE, STATUSES
from stages.download.sources.url_list import HttpConfig
from stages.download.stage import STAGE, DownloadConfig, next_attempt, read_rows
from stages.protocol import Outcome, StageContext
from storage.digests import sha256_bytes
from storage.image_shards import read_image_shard
from storage.store import Store
from tests.helpers.misbehaving_server import BODIES, bomb_png, misbehaving_server, png


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    bomb_png()  # made before the time of its download counts
    with misbehaving_server() as server:
        yield f"http://{server.address}"


ROOT = Path(__file__).parents[3]


def config_of(base_url: str, url_list: str, **changes: object) -> DownloadConfig:
    """With the test's own server as the one private host that may be connected to."""
    http = HttpConfig(private_hosts=(base_url.removeprefix("http://"),), max_redirects=3, max_retry_after_s=5)
    return DownloadConfig(url_list=url_list, **({"http": http, "retries": 0, "timeout_s": 60} | changes))


def run_download(config: DownloadConfig, folder: Path) -> tuple[Outcome, Store]:
    store = Store(str(folder / "store"))
    scratch = folder / f"scratch-{config.attempt}"
    scratch.mkdir()
    context = StageContext(config, 0, {}, store, STAGE.action_key(config, 0, {}), LocalExecutor(), scratch)
    return STAGE.run(context), store


def write_list(path: Path, base_url: str, names: list[str]) -> str:
    path.write_text("url,caption\n" + "".join(f"{base_url}/{name},a {name}\n" for name in names), encoding="utf-8")
    return str(path)


def rows_of(outcome: Outcome, store: Store) -> list[dict]:
    entries = [entry for entry in outcome.files if entry.path.startswith("metadata/")]
    return [row for entry in entries for row in pq.read_table(store.fetch(entry)).to_pylist()]


def images_of(outcome: Outcome, store: Store) -> list[bytes]:
    entries = [entry for entry in outcome.files if entry.path.startswith("images/")]
    return [sample.image for entry in entries for sample in read_image_shard(store.fetch(entry))]


FATES = {
    "red.png": "ok",
    "status/404": "http_error",
    "status/403": "http_error",
    "status/410": "http_error",
    "busy-for-long.png": "http_error",
    "slow.png": "timeout",
    "truncated.png": "connection_error",
    "reset.png": "connection_error",
    "loop": "too_many_redirects",
    "to/http://10.0.0.1/x.png": "refused",
    "opted-out.png": "opted_out",
    "endless.png": "too_large",
    "page.png": "not_an_image",
    "noise.png": "not_an_image",
    "empty.png": "not_an_image",
    "bomb.png": "too_many_pixels",
    "cut.png": "undecodable",
    "wrong-type.png": "ok",
    "animated.gif": "ok",
    "animated.webp": "ok",
    "cmyk.jpg": "ok",
    "16-bit.png": "ok",
    "rotated.jpg": "ok",
    "moved": "ok",
    "opted-out-of-others.png": "ok",
    "blue.png": "ok",
}


@pytest.fixture(scope="module")
def bad_web(tmp_path_factory: pytest.TempPathFactory, base_url: str) -> tuple[Outcome, Store]:
    """One download of everything that a server can do."""
    folder = tmp_path_factory.mktemp("web")
    path = write_list(folder / "list.csv", base_url, list(FATES))
    config = config_of(base_url, path, max_failed_fraction=1, max_bytes=2_000_000, timeout_s=8)
    return run_download(config, folder)


@pytest.mark.processes
def test_every_url_becomes_a_row_with_the_right_status(bad_web: tuple[Outcome, Store]) -> None:
    rows = rows_of(*bad_web)
    assert [row["caption"] for row in rows] == [f"a {name}" for name in FATES]
    assert {row["caption"].removeprefix("a "): row["status"] for row in rows} == FATES
    assert all((row["error"] is None) == (row["status"] == "ok") for row in rows)
    assert set(FATES.values()) <= set(STATUSES)


@pytest.mark.processes
def test_good_images_beside_bad_ones_arrive_as_they_were_sent(bad_web: tuple[Outcome, Store]) -> None:
    outcome, store = bad_web
    names = [f"/{name}" for name, fate in FATES.items() if fate == "ok"]
    others = {"/moved": "/red.png", "/opted-out-of-others.png": ""}
    sent = [png("cyan") if others.get(name) == "" else BODIES[others.get(name, name)]() for name in names]
    assert images_of(outcome, store) == sent
    facts = {row["caption"]: row for row in rows_of(outcome, store)}
    assert (facts["a rotated.jpg"]["width"], facts["a rotated.jpg"]["height"]) == (40, 30)
    assert facts["a red.png"]["sha256"] == sha256_bytes(png("red"))


MEASURED = """
import resource, sys
from pathlib import Path
from tests.stages.download.test_download import config_of, run_download

base_url, path, folder = sys.argv[1:]
def most(who):
    return resource.getrusage(who).ru_maxrss * 1024
before = most(resource.RUSAGE_SELF)
run_download(config_of(base_url, path, max_failed_fraction=1, max_bytes=2_000_000), Path(folder))
print(most(resource.RUSAGE_SELF) - before, most(resource.RUSAGE_CHILDREN))
"""


@pytest.mark.processes
def test_endless_bodies_and_huge_images_take_bounded_memory(tmp_path: Path, base_url: str) -> None:
    path = write_list(tmp_path / "list.csv", base_url, ["bomb.png", "red.png", *["endless.png"] * 50, "blue.png"])
    command = [sys.executable, "-c", MEASURED, base_url, path, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    stage_grew_by, fetch_process_took = (int(number) for number in ended.stdout.split())
    # the image of 30,000 x 30,000 pixels alone would take 900 MB; a child counts what its parent had when it started
    assert stage_grew_by < 300e6
    assert fetch_process_took < 800e6


@pytest.mark.processes
def test_metrics_count_failures_by_reason_and_host(bad_web: tuple[Outcome, Store]) -> None:
    metrics = bad_web[0].metrics
    statuses = Counter(FATES.values())
    assert metrics["status"] == dict(sorted(statuses.items()))
    failed = len(FATES) - statuses["ok"]
    assert (metrics["num_rows"], metrics["num_ok"], metrics["num_failed"]) == (len(FATES), statuses["ok"], failed)
    assert sum(metrics["errors"].values()) == failed
    assert metrics["errors"]["http_error: HTTP Error 404: Not Found"] == 1
    assert metrics["hosts"] == {"127.0.0.1": {"rows": len(FATES), "failed": failed}}


@pytest.mark.processes
def test_run_with_too_many_failures_stops_with_the_reasons(tmp_path: Path, base_url: str) -> None:
    path = write_list(tmp_path / "list.csv", base_url, ["red.png", "gone.png", "lost.png"])
    with pytest.raises(ValueError, match=r"2 of 3 images failed.*404.*--retry-failed.*download\.attempt=1"):
        run_download(config_of(base_url, path), tmp_path)


@pytest.mark.processes
def test_retry_fetches_what_failed_and_nothing_else(tmp_path: Path) -> None:
    with misbehaving_server() as server:
        base_url = f"http://{server.address}"
        names = ["red.png", "mended.png", "status/404", "blue.png"]
        path = write_list(tmp_path / "list.csv", base_url, names)
        config = config_of(base_url, path, rows_per_shard=3)
        with pytest.raises(ValueError, match="2 of 4 images failed"):
            run_download(config, tmp_path)
        store = Store(str(tmp_path / "store"))
        assert next_attempt(config, 0, store) == 1
        # raising the limit or the timeout makes no other attempt of it
        again = config.model_copy(update={"attempt": 1, "max_failed_fraction": 0.5, "timeout_s": 90})
        outcome, _ = run_download(again, tmp_path)
        assert server.asked == {"/red.png": 1, "/blue.png": 1, "/mended.png": 2, "/status/404": 2}
    assert [row["status"] for row in rows_of(outcome, store)] == ["ok", "ok", "http_error", "ok"]
    assert images_of(outcome, store) == [png("red"), png("white"), png("blue")]


@pytest.mark.processes
def test_last_attempt_without_failures_is_not_repeated(tmp_path: Path, base_url: str) -> None:
    config = config_of(base_url, write_list(tmp_path / "list.csv", base_url, ["red.png"]))
    store = Store(str(tmp_path / "store"))
    assert next_attempt(config, 0, store) == 0
    run_download(config, tmp_path)
    assert next_attempt(config, 0, store) == 0


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
        assert read_rows(config).drop_columns(PLACE).to_pylist() == rows, suffix


def test_part_of_the_rows_is_held_out_by_their_address_alone(tmp_path: Path) -> None:
    def splits(numbers: range) -> dict[str, str]:
        path = tmp_path / "list.csv"
        path.write_text("url,caption\n" + "".join(f"http://a/{number},{number}\n" for number in numbers))
        rows = read_rows(DownloadConfig(url_list=str(path), held_out_fraction=0.2)).to_pylist()
        return {row["url"]: row["split"] for row in rows}

    few, many = splits(range(1000)), splits(range(5000, -1, -1))
    assert list(few.values()).count("test") == pytest.approx(200, abs=40)
    assert all(many[url] == split for url, split in few.items())


def test_what_is_held_out_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="both say what is held out"):
        DownloadConfig(held_out_fraction=0.1, extra_columns=("split",))
    path = tmp_path / "list.csv"
    path.write_text("url,caption\nhttp://a/1,one\nhttp://a/2,two\n")
    with pytest.raises(ValueError, match=r"held_out_fraction=1e-09 leaves all 2 rows in 'train'"):
        read_rows(DownloadConfig(url_list=str(path), held_out_fraction=1e-9))


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
    with pytest.raises(ValueError, match=r"download\.url_list=.* matches no file; give a file, a folder or a pattern"):
        read_rows(DownloadConfig(url_list=str(tmp_path / "absent.csv")))


def test_path_of_the_list_does_not_count_but_its_content_does(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one.csv", "same.csv", "other.csv"))
    one.write_text("url,caption\nhttp://a,b\n", encoding="utf-8")
    same.write_text("url,caption\nhttp://a,b\n", encoding="utf-8")
    other.write_text("url,caption\nhttp://a,c\n", encoding="utf-8")
    keys = [STAGE.action_key(DownloadConfig(url_list=str(path)), 0, {}) for path in (one, same, other)]
    assert keys[0] == keys[1] != keys[2]
