import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from storage.digests import sha256_file
from storage.image_shards import ImageSample, read_image_shard, write_image_shard


def image_bytes(color: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


SAMPLES = [
    ImageSample(
        key="b/0001", image=image_bytes((255, 0, 0)), extension="webp", text="rot: ü✓", json={"z": 1, "a": [2]}
    ),
    ImageSample(key="a-0000", image=image_bytes((0, 255, 0)), extension="webp", text="", json={}),
    ImageSample(key="x" * 200, image=b"", extension="png", text="long name", json={"ü": None}),
]


def test_a_shard_comes_back_sample_by_sample_in_its_order(tmp_path: Path) -> None:
    assert write_image_shard(tmp_path / "s.tar", SAMPLES) == 3
    assert list(read_image_shard(tmp_path / "s.tar")) == SAMPLES


def test_an_empty_shard_is_a_shard(tmp_path: Path) -> None:
    assert write_image_shard(tmp_path / "s.tar", []) == 0
    assert list(read_image_shard(tmp_path / "s.tar")) == []


def test_equal_samples_give_equal_bytes_whenever_and_wherever(tmp_path: Path) -> None:
    write_image_shard(tmp_path / "one" / "s.tar", SAMPLES)
    reordered = [replace(SAMPLES[0], json={"a": [2], "z": 1}), *SAMPLES[1:]]
    write_image_shard(tmp_path / "two" / "other.tar", iter(reordered))
    assert sha256_file(tmp_path / "one" / "s.tar") == sha256_file(tmp_path / "two" / "other.tar")
    with tarfile.open(tmp_path / "one" / "s.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members[:3]] == ["b/0001.webp", "b/0001.txt", "b/0001.json"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_the_webdataset_package_reads_a_shard(tmp_path: Path) -> None:
    write_image_shard(tmp_path / "s.tar", SAMPLES)
    dataset = webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False, empty_check=False)
    read = list(dataset)
    assert [sample["__key__"] for sample in read] == [sample.key for sample in SAMPLES]
    assert [sample["txt"].decode() for sample in read] == [sample.text for sample in SAMPLES]
    decoded = next(iter(dataset.decode("pil").to_tuple("webp", "txt", "json")))
    assert decoded[0].getpixel((3, 3)) == (255, 0, 0)
    assert decoded[1:] == (SAMPLES[0].text, SAMPLES[0].json)


def test_a_shard_of_the_webdataset_package_is_read(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        for sample in SAMPLES[:2]:
            fields = {sample.extension: sample.image, "txt": sample.text, "json": sample.json}
            writer.write({"__key__": sample.key} | fields)
    assert list(read_image_shard(tmp_path / "s.tar")) == SAMPLES[:2]


def test_a_writer_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def failing() -> Iterator[ImageSample]:
        yield SAMPLES[0]
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_image_shard(tmp_path / "s.tar", failing())
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    write_image_shard(path, SAMPLES)
    data = path.read_bytes()
    content = len(data.rstrip(b"\0"))
    for length in (0, 100, 512, 600, 1024, content - 1, content + 10):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="not a complete tar file"):
            list(read_image_shard(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a.b"}, "dot or white space"),
        ({"key": "a b"}, "dot or white space"),
        ({"key": "../a"}, "relative"),
        ({"extension": ".webp"}, "write it like 'webp'"),
        ({"extension": "WEBP"}, "write it like 'webp'"),
        ({"extension": "json"}, "kept for"),
        ({"json": {"a": float("nan")}}, "nan"),
    ],
)
def test_samples_that_would_be_misread_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_image_shard(tmp_path / "s.tar", [replace(SAMPLES[0], **change)])  # type: ignore[arg-type]


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="occurs twice"):
        write_image_shard(tmp_path / "s.tar", [SAMPLES[0], SAMPLES[1], SAMPLES[0]])


def test_a_sample_without_one_image_is_refused(tmp_path: Path) -> None:
    for extensions in (["txt"], ["png", "webp", "txt"]):
        with tarfile.open(tmp_path / "s.tar", "w") as tar:
            for extension in extensions:
                tar.addfile(tarfile.TarInfo(f"a.{extension}"), io.BytesIO())
        with pytest.raises(ValueError, match="exactly one image"):
            list(read_image_shard(tmp_path / "s.tar"))
