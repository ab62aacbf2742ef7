from collections.abc import Callable
from itertools import permutations

import pytest

from storage.digests import sha256_bytes
from storage.errors import DamagedObject, FileNotInManifest
from storage.manifest import FileEntry, Manifest

SHA = sha256_bytes(b"x")


def entry(path: str, size: int = 1) -> FileEntry:
    return FileEntry(path=path, size=size, sha256=SHA)


def test_manifest_survives_the_round_trip_with_its_digest(manifest_of: Callable[..., Manifest]) -> None:
    manifest = manifest_of(entry("b"), entry("a/c"), metrics={"psnr": 21.5}, inputs={"download": SHA})
    again = Manifest.from_bytes(manifest.to_bytes())
    assert again == manifest
    assert again.digest == manifest.digest == sha256_bytes(manifest.to_bytes())


def test_digest_does_not_depend_on_the_order_of_files(manifest_of: Callable[..., Manifest]) -> None:
    files = [entry("b"), entry("a/c"), entry("a-b")]
    assert len({manifest_of(*order).digest for order in permutations(files)}) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "other"},
        {"schema_version": 2},
        {"stage": "other"},
        {"config": {"seed": 1}},
        {"inputs": {"a": SHA}},
        {"metrics": {"a": 1}},
        {"metadata": {"a": 1}},
        {"files": (entry("a", size=2),)},
    ],
)
def test_every_field_enters_the_digest(changes: dict[str, object], manifest_of: Callable[..., Manifest]) -> None:
    assert manifest_of(entry("a"), **changes).digest != manifest_of(entry("a")).digest


@pytest.mark.parametrize("path", ["", "/a", "a/../b", "..", "./a", "a//b", "a/", "a\\b", "a\nb", "a\0b"])
def test_paths_that_leave_the_folder_or_are_not_plain_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        entry(path)


def test_two_files_of_one_name_are_refused(manifest_of: Callable[..., Manifest]) -> None:
    with pytest.raises(ValueError, match="'a' appears twice"):
        manifest_of(entry("a"), entry("a", size=2))


def test_a_file_that_is_also_a_folder_is_refused(manifest_of: Callable[..., Manifest]) -> None:
    with pytest.raises(ValueError, match="both a file and the folder"):
        manifest_of(entry("a"), entry("a-b"), entry("a/b"))


def test_metrics_that_are_not_finite_are_refused_when_the_manifest_is_made(
    manifest_of: Callable[..., Manifest],
) -> None:
    with pytest.raises(ValueError, match=r"\$\.metrics\.loss is nan"):
        manifest_of(metrics={"loss": float("nan")})


@pytest.mark.parametrize(("size", "sha256"), [(-1, SHA), (True, SHA), (1, SHA.upper()), (1, SHA[:-1]), (1, "")])
def test_sizes_and_digests_that_cannot_be_are_refused(size: int, sha256: str) -> None:
    with pytest.raises(ValueError, match="file 'a'"):
        FileEntry(path="a", size=size, sha256=sha256)


def test_a_missing_file_is_named_with_what_there_is(manifest_of: Callable[..., Manifest]) -> None:
    manifest = manifest_of(entry("a/b"), entry("c"))
    assert manifest.file("a/b") == entry("a/b")
    with pytest.raises(FileNotInManifest) as caught:
        manifest.file("b")
    assert isinstance(caught.value, KeyError)
    assert str(caught.value) == "artifact sample of make_sample has no file 'b'; it holds a/b, c"


def test_files_under_takes_whole_folder_names(manifest_of: Callable[..., Manifest]) -> None:
    manifest = manifest_of(entry("model/a"), entry("model/sub/b"), entry("model2/c"), entry("model.txt"))
    assert [e.path for e in manifest.files_under("model")] == ["model/a", "model/sub/b"]
    assert manifest.files_under("model") == manifest.files_under("model/")
    assert [e.path for e in manifest.files_under("model.txt")] == ["model.txt"]
    assert manifest.files_under("") == list(manifest.files)


def test_bytes_that_are_no_canonical_manifest_are_refused(manifest_of: Callable[..., Manifest]) -> None:
    good = manifest_of(entry("a")).to_bytes()
    for bad in (b"", b"{}", b"[]", good[:-1], good + b"\n", good.replace(b'"kind"', b' "kind"'), b"\xff"):
        with pytest.raises(DamagedObject, match="not an artifact's manifest"):
            Manifest.from_bytes(bad)
