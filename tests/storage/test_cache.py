"""The cache of an S3 store's blobs: what it may hold, and that nobody loses a file in it."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest

from storage import cache as cache_module
from storage.cache import Cache, cache_limit_bytes
from storage.digests import sha256_bytes
from storage.errors import StoreError
from storage.manifest import FileEntry
from storage.store import Store

StartPython = Callable[..., Popen[str]]


class Source:
    """Where blobs are downloaded from; counts how often."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.downloads: list[str] = []

    def new_process(self) -> Cache:
        """What a process has of the cache: with each of these it is as in one of its own."""
        return Cache(self.folder, self.limit_bytes)

    def fetch(self, cache: Cache, name: str, size: int = 100) -> Path:
        data = name.encode() * (size // len(name))

        def download(path: Path) -> None:
            self.downloads.append(name)
            path.write_bytes(data)
            assert cache.checked.right(path, entry)

        entry = FileEntry(path=name, size=len(data), sha256=sha256_bytes(data))
        path = cache.fetch(f"cas/{entry.sha256}", entry, download)
        assert path.read_bytes() == data
        return path

    def copies(self) -> int:
        return len(list((self.folder / "cas").iterdir()))

    def bytes_on_disk(self) -> int:
        files = {path.stat().st_ino: path.stat().st_size for path in self.folder.rglob("*") if path.is_file()}
        return sum(files.values())


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setattr(cache_module, "RELEASE_AFTER_S", -1)
    return Source(tmp_path / "cache", 1000)


def test_it_stays_within_its_limit_and_the_least_recently_used_go_first(source: Source) -> None:
    cache = source.new_process()
    for number in range(30):
        source.fetch(cache, f"{number:02}")
        source.fetch(cache, "often")
    assert source.downloads == ["00", "often", *(f"{number:02}" for number in range(1, 30))]
    assert source.bytes_on_disk() <= 1000
    source.fetch(cache, "29")
    assert len(source.downloads) == 31, "the latest is still there"
    source.fetch(cache, "10")
    assert len(source.downloads) == 32, "an early one is not"


def test_a_path_that_somebody_has_outlives_the_limit_in_this_process_and_in_others(source: Source) -> None:
    first, second = source.new_process(), source.new_process()
    paths = [source.fetch(first, f"{number:02}") for number in range(20)]
    assert all(path.exists() for path in paths), "twice the limit, all of it in use"
    for number in range(50, 80):
        source.fetch(second, f"{number:02}")
    assert all(path.exists() for path in paths)
    paths.clear()
    gc.collect()
    for number in range(50, 80):
        source.fetch(first, f"{number:02}")
    assert source.bytes_on_disk() <= 1000


def test_a_path_outlives_the_cache_that_it_came_from(source: Source) -> None:
    path = source.fetch(source.new_process(), "kept")
    gc.collect()
    other = source.new_process()
    for number in range(30):
        source.fetch(other, f"{number:02}")
    assert path.exists()


def test_a_path_that_became_text_stays_for_some_minutes(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "RELEASE_AFTER_S", 600)
    cache = source.new_process()
    text = str(source.fetch(cache, "text"))
    gc.collect()
    for number in range(30):
        source.fetch(cache, f"{number:02}")
    assert Path(text).exists()
    os.utime(text, (time.time() - 700, time.time() - 700))
    source.fetch(cache, "one more")
    assert not Path(text).exists()


def test_a_process_downloads_once_what_another_one_has(source: Source) -> None:
    held = source.fetch(source.new_process(), "shared")
    assert source.fetch(source.new_process(), "shared").samefile(held)
    assert source.downloads == ["shared"]


def test_a_copy_is_hashed_once_a_process_and_replaced_when_it_is_damaged(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.fetch(source.new_process(), "file")
    (copy,) = (source.folder / "cas").iterdir()
    stat = copy.stat()
    copy.chmod(0o644)
    copy.write_bytes(b"FILE" * 25)
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other = source.new_process()
    source.fetch(other, "file")
    assert source.downloads == ["file", "file"], "of the right size and age, with other bytes"
    hashed = []
    monkeypatch.setattr(
        "storage.files.sha256_file", lambda path: hashed.append(path) or sha256_bytes(path.read_bytes())
    )
    source.fetch(other, "file")
    assert hashed == []
    third = source.new_process()
    for _ in range(2):
        source.fetch(third, "file")
    assert len(hashed) == 1
    assert source.downloads == ["file", "file"]


def test_a_failed_download_leaves_nothing(source: Source) -> None:
    def failing(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("broken")

    cache = source.new_process()
    entry = FileEntry(path="a", size=8, sha256=sha256_bytes(b"complete"))
    with pytest.raises(OSError, match="broken"):
        cache.fetch(f"cas/{entry.sha256}", entry, failing)
    assert source.bytes_on_disk() == 0


def test_a_cache_that_is_emptied_under_a_process_is_filled_again(source: Source) -> None:
    import shutil

    cache = source.new_process()
    source.fetch(cache, "before")
    shutil.rmtree(source.folder)
    assert source.fetch(cache, "before").exists()
    assert source.downloads == ["before", "before"]


_HOLD = """
import os, sys, time
from pathlib import Path
from storage.cache import Cache
from storage.digests import sha256_bytes
from storage.errors import StoreError
from storage.manifest import FileEntry

def download(path):
    path.write_bytes(b"held")
    if sys.argv[2] == "half":
        print("ready", flush=True)
        time.sleep(600)

entry = FileEntry(path="held", size=4, sha256=sha256_bytes(b"held"))
path = Cache(Path(sys.argv[1]), 1000).fetch(f"cas/{entry.sha256}", entry, download)
print("ready", flush=True)
sys.stdin.readline()
assert path.read_bytes() == b"held"
print("read", flush=True)
"""


def test_a_file_in_use_by_another_process_stays_until_that_ends(source: Source, start_python: StartPython) -> None:
    child = start_python(_HOLD, str(source.folder), "whole")
    assert child.stdout is not None and child.stdin is not None
    assert child.stdout.readline() == "ready\n"
    cache = source.new_process()
    for number in range(30):
        source.fetch(cache, f"{number:02}")
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "read\n"
    child.wait()
    for number in range(30):
        source.fetch(cache, f"{number:02}")
    assert [path.name for path in (source.folder / "held").iterdir() if path.suffix == ".lock"] == [
        path.name + ".lock" for path in (source.folder / "held").iterdir() if path.is_dir()
    ]
    assert source.bytes_on_disk() <= 1000


def test_what_a_killed_process_had_half_downloaded_is_removed(source: Source, start_python: StartPython) -> None:
    child = start_python(_HOLD, str(source.folder), "half")
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    source.fetch(source.new_process(), "00")
    assert source.bytes_on_disk() == 104, "it may still be at it"
    child.kill()
    child.wait()
    source.fetch(source.new_process(), "01")
    assert len(list((source.folder / "held").iterdir())) <= 2
    assert source.copies() == 2 and source.bytes_on_disk() == 200


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSEVL_CACHE_GB", text)
    with pytest.raises(ValueError, match=f"MUSEVL_CACHE_GB is '{text}'; give a number of gigabytes"):
        cache_limit_bytes()


def test_a_store_reads_its_limit_from_the_environment(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "RELEASE_AFTER_S", -1)
    monkeypatch.setenv("MUSEVL_CACHE_GB", "0.000001")
    store = Store(s3_uri, cache_dir=tmp_path / "own")
    for number in range(10):
        entry = store.put_bytes(f"{number}".encode() * 400, "file")
        assert store.fetch(entry).read_bytes() == f"{number}".encode() * 400
    assert len([path for path in (tmp_path / "own" / "cas").rglob("*") if path.is_file()]) == 2


@pytest.mark.parametrize("linked", ["cas", "held"])
def test_nothing_behind_a_link_in_the_cache_is_removed_or_written(linked: str, source: Source, tmp_path: Path) -> None:
    """The names are such as the cache uses: a copy, and a folder with the lock of a process that is gone."""
    outside = tmp_path / "outside"
    (outside / ("ab" * 16)).mkdir(parents=True)
    for name in ("mine", "ab" * 16 + ".lock", "ab" * 16 + "/mine"):
        (outside / name).write_bytes(b"x" * 5000)
    before = sorted(outside.rglob("*"))
    source.folder.mkdir()
    (source.folder / linked).symlink_to(outside)
    with pytest.raises(StoreError, match=f"{source.folder / linked} is a symbolic link, which nothing in the cache is"):
        source.fetch(source.new_process(), "a", 2000)
    assert sorted(outside.rglob("*")) == before


def test_a_link_in_the_place_of_a_copy_is_replaced_by_a_download(source: Source, tmp_path: Path) -> None:
    """What it points to may have the right bytes now, and others once they were checked."""
    source.fetch(source.new_process(), "a")
    gc.collect()
    (copy,) = (source.folder / "cas").iterdir()
    copy.rename(tmp_path / "elsewhere")
    copy.symlink_to(tmp_path / "elsewhere")
    assert not source.fetch(source.new_process(), "a").is_symlink()
    assert source.downloads == ["a", "a"] and not copy.is_symlink()
    assert (tmp_path / "elsewhere").is_file()


def test_only_what_the_cache_made_is_taken_for_a_dead_process(source: Source) -> None:
    for name in ("yarn", "ab" * 16):
        (source.folder / "held" / name).mkdir(parents=True)
        (source.folder / "held" / name / "file").write_bytes(b"x")
        (source.folder / "held" / f"{name}.lock").touch()
    source.fetch(source.new_process(), "a", 900)
    assert (source.folder / "held" / "yarn" / "file").exists()
    assert not (source.folder / "held" / ("ab" * 16)).exists()
