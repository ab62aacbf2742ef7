"""Files outside the store: found by file, folder and pattern, local and on S3, and known by their content."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from storage.input_files import InputFiles, decompressed, is_clutter, read_input
from tests.helpers.given_files import zstandard

CONTENTS = {"a-0.tar": b"first", "a-1.tar": b"second", "deep/b.txt": b"third"}


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.processes)])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a folder that holds CONTENTS."""
    monkeypatch.setenv("MUSEVL_CACHE", str(tmp_path / "cache"))
    uri = str(tmp_path / "given") if request.param == "local" else request.getfixturevalue("s3_uri") + "/given"
    write(uri, CONTENTS)
    return uri


def write(uri: str, contents: dict[str, bytes]) -> None:
    file_system, root = fsspec.core.url_to_fs(uri)
    for name, data in contents.items():
        file_system.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        file_system.pipe_file(f"{root}/{name}", data)


def test_files_are_named_from_the_folder_and_read_in_any_order(folder: str) -> None:
    files = InputFiles(folder, "path")
    assert files.names() == ["a-0.tar", "a-1.tar", "deep/b.txt"]
    assert "deep/b.txt" in files and "c" not in files
    assert [files.read(name) for name in CONTENTS] == list(CONTENTS.values())
    assert list(files.read_all(["deep/b.txt", "a-0.tar"])) == [b"third", b"first"]
    assert list(files.read_all(["a-1.tar"])) == [b"second"]
    with files.open("a-1.tar") as file:
        file.seek(3)
        assert file.read(2) == b"on"


def test_pattern_and_single_file_name_the_same_files(folder: str) -> None:
    assert InputFiles(f"{folder}/a-*.tar", "path").names() == ["a-0.tar", "a-1.tar"]
    single = InputFiles(f"{folder}/a-1.tar", "path")
    assert single.names() == ["a-1.tar"]
    assert single.read("a-1.tar") == b"second"


def test_digest_is_of_names_and_contents(folder: str) -> None:
    before = InputFiles(folder, "path").digest()
    copy = folder.removesuffix("given") + "copy"
    write(copy, CONTENTS)
    assert InputFiles(copy, "path").digest() == before
    write(copy, {"a-0.tar": b"FIRST"})
    assert InputFiles(copy, "path").digest() != before
    names = ["a-1.tar", "absent"]
    assert InputFiles(folder, "path").digest(names) == InputFiles(copy, "path").digest(names)
    assert InputFiles(folder, "path").digest(names) != InputFiles(folder, "path").digest(names[:1])


def test_nothing_there_says_what_was_expected(folder: str) -> None:
    with pytest.raises(
        ValueError, match=r"download\.files\.path=.*matches no file; give a file, a folder or a pattern"
    ):
        InputFiles(f"{folder}/absent-*.tar", "download.files.path").names()
    with pytest.raises(ValueError, match="cannot read list=.*; give a CSV file"):
        read_input(f"{folder}/absent.csv", "list", "a CSV file")


def test_unknown_protocol_is_named() -> None:
    with pytest.raises(ValueError, match="path='nosuch://x' cannot be opened"):
        InputFiles("nosuch://x", "path")


def test_cache_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "a").write_bytes(b"x")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "input-digests.sqlite").write_bytes(b"not a data base" * 100)
    monkeypatch.setenv("MUSEVL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"input-digests\.sqlite: .*remove it, or set MUSEVL_CACHE"):
        InputFiles(str(tmp_path / "given"), "path").digest()


def test_names_that_look_like_patterns_are_read_as_they_are(tmp_path: Path) -> None:
    write(str(tmp_path), {"cat [1].txt": b"one", "cat 1.txt": b"other", "what?.txt": b"two"})
    assert list(InputFiles(str(tmp_path), "path").read_all(["what?.txt", "cat [1].txt"])) == [b"two", b"one"]


@pytest.mark.parametrize("name", ["photos [2023]", "what?", "star*", "a#b", "with space", "[a]", "a::b", "50%20"])
def test_a_path_that_exists_is_never_taken_for_a_pattern(tmp_path: Path, name: str) -> None:
    check_that_name_is_no_pattern(str(tmp_path), name)


@pytest.mark.parametrize("name", ["photos [2023]", "what?"])
def test_a_path_that_exists_in_s3_is_never_taken_for_a_pattern(s3_uri: str, name: str) -> None:
    check_that_name_is_no_pattern(s3_uri, name)


def check_that_name_is_no_pattern(folder: str, name: str) -> None:
    other = name.translate(str.maketrans("?*[", "xxx"))  # what the pattern would match
    write(folder, {f"{name}/1.tar": b"one", f"{name}/deep/2.tar": b"two", f"{other} /1.tar": b"other"})
    here = f"{folder}/{name}"
    assert InputFiles(here, "path").names() == ["1.tar", "deep/2.tar"]
    assert InputFiles(f"{here}/*.tar", "path").names() == ["1.tar"], "a pattern within it is one all the same"
    assert read_input(f"{here}/1.tar", "list", "a list") == b"one"


def test_where_nothing_has_the_name_it_is_a_pattern_of_folders_and_files(folder: str) -> None:
    write(folder, {"part-1/x.tar": b"1", "part-2/x.tar": b"2", "part-2/deep/y.tar": b"3"})
    assert InputFiles(f"{folder}/part-[12]/*.tar", "path").names() == ["part-1/x.tar", "part-2/x.tar"]
    assert InputFiles(f"{folder}/part-?/x.tar", "path").names() == ["part-1/x.tar", "part-2/x.tar"]
    assert InputFiles(f"{folder}/**/y.tar", "path").names() == ["part-2/deep/y.tar"]
    with pytest.raises(ValueError, match=r"matches no file.*write \* in place of \{0\.\.9\}"):
        InputFiles(f"{folder}/part-{{1..2}}/x.tar", "path").names()


def test_one_file_is_asked_for_and_several_or_none_are_named(folder: str) -> None:
    assert read_input(f"{folder}/a-1.*", "list", "a list") == b"second"
    with pytest.raises(ValueError, match=r"cannot read list=.*: it is 2 files; give a list"):
        read_input(f"{folder}/a-*.tar", "list", "a list")
    with pytest.raises(ValueError, match=r"cannot read list=.*: there is no such file; give a list"):
        read_input(f"{folder}/none.csv", "list", "a list")


@pytest.mark.parametrize("name", ["._a.jpg", "x/._a.jpg", "__MACOSX/a.jpg", ".DS_Store", "x/Thumbs.db", ".git/a.jpg"])
def test_what_systems_leave_beside_files_is_no_file_of_the_user(name: str) -> None:
    assert is_clutter(name) and not is_clutter("x/a.jpg")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstandard])
def test_compression_is_known_by_the_first_bytes(compress: Callable[[bytes], bytes]) -> None:
    assert decompressed(io.BytesIO(compress(b"text" * 99))).read() == b"text" * 99
    assert decompressed(io.BytesIO(b"text")).read() == b"text"
    with pytest.raises(ValueError, match="is a ZIP; unpack it"):
        decompressed(io.BytesIO(b"PK\x03\x04"))


def test_no_more_is_read_than_asked_for(folder: str) -> None:
    assert InputFiles(folder, "path").read("a-1.tar", 3) == b"sec"


def test_a_link_counts_as_what_it_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSEVL_CACHE", str(tmp_path / "cache"))
    write(str(tmp_path), {"blobs/1": b"first", "plain/a.tar": b"first", "linked/readme": b"r", "plain/readme": b"r"})
    (tmp_path / "linked" / "a.tar").symlink_to(tmp_path / "blobs" / "1")
    linked = str(tmp_path / "linked")
    assert InputFiles(linked, "path").names() == ["a.tar", "readme"]
    assert InputFiles(f"{linked}/*.tar", "path").names() == ["a.tar"]
    before = InputFiles(linked, "path").digest()
    assert before == InputFiles(str(tmp_path / "plain"), "path").digest()
    write(str(tmp_path), {"blobs/1": b"FIRST"})
    assert InputFiles(linked, "path").digest() != before


@pytest.mark.parametrize(
    ("target", "reason"), [("blobs", "link .* to a folder, which is not followed"), ("gone", "gone|link")]
)
def test_a_link_that_cannot_be_followed_is_named(tmp_path: Path, target: str, reason: str) -> None:
    write(str(tmp_path), {"blobs/1": b"first", "given/a": b"a"})
    (tmp_path / "given" / "link").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=reason):
        InputFiles(str(tmp_path / "given"), "path").names()
