"""Files outside the store: found by file, folder and pattern, local and on S3, and known by their content."""

from pathlib import Path

import fsspec
import pytest

from storage.input_files import InputFiles, read_input

CONTENTS = {"a-0.tar": b"first", "a-1.tar": b"second", "deep/b.txt": b"third"}


@pytest.fixture(params=["local", "s3"])
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
