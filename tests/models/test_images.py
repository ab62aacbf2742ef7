"""Other people's images: what a browser shows is what comes out, and what is not read is named."""

import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from models.images import Limits, UnusableImage, decode_image

Encoder = Callable[..., bytes]
GREEN, GREY = (20, 180, 40), (128, 128, 128)


def pixel(data: bytes, background: tuple[int, int, int] = (255, 255, 255)) -> tuple[int, int, int]:
    found = decode_image(data, background=background).rgb.getpixel((3, 3))
    assert isinstance(found, tuple)
    return found


def problem(data: bytes, limits: Limits | None = None) -> tuple[str, str]:
    with pytest.raises(UnusableImage) as caught:
        decode_image(data, limits)
    assert str(caught.value) == caught.value.reason
    return caught.value.kind, caught.value.reason


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with(data: bytes, *chunks: bytes) -> bytes:
    """A PNG with further chunks behind its header, which takes 33 bytes."""
    return data[:33] + b"".join(chunks) + data[33:]


def raw_png(depth: int, colour: int, pixel: bytes, *chunks: bytes) -> bytes:
    """16 x 16 equal pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, depth, colour, 0, 0, 0))
    rows = zlib.compress((b"\0" + pixel * 16) * 16)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture
def green(encoded: Encoder) -> bytes:
    return encoded(Image.new("RGB", (64, 64), GREEN), "PNG")


# PNG chunks


def _texts(size: int) -> dict[str, bytes]:
    text, packed = b"x" * size, zlib.compress(b"x" * size)
    return {
        "tEXt": chunk(b"tEXt", b"workflow\0" + text),
        "zTXt": chunk(b"zTXt", b"workflow\0\0" + packed),
        "iTXt": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed),
        "iCCP": chunk(b"iCCP", b"printer\0\0" + packed),
        "exif in zTXt": chunk(b"zTXt", b"Raw profile type exif\0\0" + packed),
    }


@pytest.mark.parametrize("kind", list(_texts(1)))
def test_chunks_that_decide_no_pixel_may_be_large(kind: str, green: bytes, encoded: Encoder) -> None:
    for size in (500_000, 1_500_000):
        assert pixel(png_with(green, _texts(size)[kind])) == GREEN
        assert pixel(green[:-12] + _texts(size)[kind] + green[-12:]) == GREEN, "behind the image's data too"
    assert pixel(png_with(green, *[_texts(1_000_000)[kind]] * 70)) == GREEN, "nor does their sum matter"


@pytest.mark.parametrize(
    "damaged",
    [
        chunk(b"tEXt", b"a\0b")[:-1] + b"!",
        chunk(b"pHYs", b"\0"),
        chunk(b"zTXt", b"workflow\0\0no zlib"),
        chunk(b"iCCP", b"profile\0\0no zlib"),
        chunk(b"iCCP", b""),
        chunk(b"iTXt", b"XML:com.adobe.xmp"),
        chunk(b"eXIf", b"no exif"),
        chunk(b"gAMA", b""),
    ],
    ids=["checksum", "pHYs", "zTXt", "iCCP", "empty iCCP", "iTXt", "eXIf", "gAMA"],
)
def test_damaged_chunks_that_decide_no_pixel_are_passed_over(damaged: bytes, green: bytes) -> None:
    assert pixel(png_with(green, damaged)) == GREEN


def test_text_that_unpacks_to_much_takes_little_memory(green: bytes) -> None:
    packed = zlib.compress(bytes(50_000_000), 1)
    starts = {b"zTXt": b"workflow\0\0", b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0", b"iCCP": b"printer\0\0"}
    data = png_with(green, *[chunk(kind, start + packed) for kind, start in starts.items()])
    tracemalloc.start()
    try:
        assert pixel(data) == GREEN
        assert tracemalloc.get_traced_memory()[1] < 35_000_000
    finally:
        tracemalloc.stop()


def test_orientation_in_the_xmp_of_a_png_counts(encoded: Encoder) -> None:
    image = Image.new("RGB", (64, 32), GREEN)
    image.paste((0, 0, 0), (0, 0, 8, 32))
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta tiff:Orientation="6"/>', zip=True)
    found = decode_image(encoded(image, "PNG", pnginfo=info))
    assert found.rgb.size == (32, 64) and (found.width, found.height) == (64, 32)
    assert found.rgb.getpixel((16, 2)) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_format_is_turned_upright_once(kind: str, encoded: Encoder) -> None:
    image = Image.new("RGB", (64, 32), GREEN)
    image.paste((0, 0, 0), (0, 0, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb = decode_image(encoded(image, kind, exif=exif)).rgb
    assert rgb.size == (32, 64)
    np.testing.assert_allclose(rgb.getpixel((16, 4)), (0, 0, 0), atol=12)
    np.testing.assert_allclose(rgb.getpixel((16, 60)), GREEN, atol=12)


def test_a_damaged_exif_block_is_passed_over(encoded: Encoder) -> None:
    for damaged in (b"Exif\0\0no header", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\0"):
        data = encoded(Image.new("RGB", (64, 64), GREEN), "JPEG", exif=damaged, quality=100)
        np.testing.assert_allclose(pixel(data), GREEN, atol=2)


# Depths


def _tiff(values: np.ndarray, encoded: Encoder, tags: dict[int, object] | None = None) -> bytes:
    return encoded(Image.fromarray(values), "TIFF", tiffinfo=tags or {})


def full(value: float, kind: object) -> np.ndarray:
    return np.full((16, 16), value, kind)


@pytest.mark.parametrize(
    ("values", "tags"),
    [
        (full(0x8080, np.uint16), {}),
        (full(0x8080, ">u2"), {}),
        (full(2048, np.uint16), {}),
        (full(512, np.uint16), {}),
        (full(8192, np.uint16), {}),
        (full(300, np.uint16), {281: 600}),
        (full(128, np.uint16), {}),
        (full(0x40404040, np.int32), {}),
        (full(128, np.int32), {}),
        (full(0x8080, np.int32), {}),
        (full(0x808080, np.int32), {}),
        (full(0.5, np.float32), {}),
        (full(128.0, np.float32), {}),
        (full(32_896.0, np.float32), {}),
    ],
    ids=lambda value: f"{value.dtype}-{value[0, 0]}" if isinstance(value, np.ndarray) else str(value),
)
def test_mid_grey_is_mid_grey_at_every_depth(values: np.ndarray, tags: dict[int, object], encoded: Encoder) -> None:
    declared = 300 / 1023 * 255 if tags else 128
    np.testing.assert_allclose(pixel(_tiff(values, encoded, tags)), [declared] * 3, atol=1)


@pytest.mark.parametrize(("bits", "kind"), [(8, np.uint16), (10, np.uint16), (12, np.uint16), (14, np.int32)])
def test_tones_stay_in_proportion(bits: int, kind: type, encoded: Encoder) -> None:
    ramp = np.linspace(0, 2**bits - 1, 256).reshape(16, 16).round().astype(kind)
    shown = np.asarray(decode_image(_tiff(ramp, encoded)).rgb)[..., 0]
    np.testing.assert_allclose(shown, ramp / (2**bits - 1) * 255, atol=0.51)


def test_floats_above_white_are_white_and_holes_black(encoded: Encoder) -> None:
    values = np.tile(np.linspace(0, 1, 16, dtype=np.float32), (16, 1))
    values[0, :3] = np.inf, 1.7, np.nan
    values[1, 0] = -np.inf
    shown = np.asarray(decode_image(_tiff(values, encoded)).rgb)[..., 0]
    assert shown[0, :3].tolist() == [255, 255, 0] and shown[1, 0] == 0
    np.testing.assert_allclose(shown[5], values[5] * 255, atol=0.51)


def test_signed_values_below_zero_are_black_and_the_largest_one_white(encoded: Encoder) -> None:
    values = np.array([[-500, 0], [2**30, 2**31 - 1]], np.int32)
    shown = np.asarray(decode_image(_tiff(values, encoded, {339: 2})).rgb)[..., 0]
    assert shown.tolist() == [[0, 0], [128, 255]]


def test_white_may_be_zero_at_sixteen_bits(encoded: Encoder) -> None:
    ramp = np.linspace(0, 65_535, 256).reshape(16, 16).astype(np.uint16)
    shown = np.asarray(decode_image(_tiff(ramp, encoded, {262: 0})).rgb)[..., 0]
    np.testing.assert_allclose(shown, 255 - ramp / 257, atol=0.51)


def _colour_tiff(order: str, *samples: int, compression: int = 1) -> bytes:
    """16 x 16 equal pixels of 16 bits a colour, as Pillow itself cannot write them."""
    row = struct.pack(f"{order}{len(samples)}H", *samples) * 16
    pixels = row * 16 if compression == 1 else zlib.compress(row * 16)
    tags = {256: 16, 257: 16, 258: 0, 259: compression, 262: 2, 273: 0, 277: len(samples), 278: 16, 279: len(pixels)}
    tags |= {338: 2} if len(samples) == 4 else {}
    depths = 8 + 2 + 12 * len(tags) + 4  # where the depth of each colour stands, since four do not fit into an entry
    tags |= {258: depths, 273: depths + 2 * len(samples)}
    table = struct.pack(f"{order}H", len(tags))
    for tag, value in tags.items():
        table += struct.pack(f"{order}HHI", tag, 3, len(samples) if tag == 258 else 1)
        table += struct.pack(f"{order}I", value) if tag == 258 else struct.pack(f"{order}HH", value, 0)
    start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
    return start + table + bytes(4) + struct.pack(f"{order}{len(samples)}H", *[16] * len(samples)) + pixels


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("order", ["<", ">"])
def test_twelve_bits_of_colour_in_sixteen_are_as_bright_as_they_were_meant(order: str, compression: int) -> None:
    twelve = pixel(_colour_tiff(order, 3000, 2048, 17, compression=compression))
    np.testing.assert_allclose(twelve, np.array([3000, 2048, 17]) / 4095 * 255, atol=0.51)
    sixteen = pixel(_colour_tiff(order, 3000 * 16, 2048 * 16, 17 * 16, compression=compression))
    np.testing.assert_allclose(sixteen, twelve, atol=1)
    half = pixel(_colour_tiff(order, 3000, 2048, 17, 0x8000, compression=compression), (0, 0, 0))
    np.testing.assert_allclose(half, np.array(twelve) / 2, atol=1)


@pytest.mark.parametrize("value", [40, 4_000, 40_000])
def test_dark_png_stays_dark(value: int) -> None:
    assert pixel(raw_png(16, 0, struct.pack(">H", value))) == (round(value / 257),) * 3


def test_pgm_counts_from_its_own_white() -> None:
    assert pixel(b"P5\n16 16\n1023\n" + full(512, ">u2").tobytes()) == GREY
    assert pixel(b"P5\n16 16\n65535\n" + full(0x8080, ">u2").tobytes()) == GREY


def test_lab_is_grey_where_it_says_so(encoded: Encoder) -> None:
    np.testing.assert_allclose(pixel(encoded(Image.new("LAB", (16, 16), (137, 128, 128)), "TIFF")), GREY, atol=2)


@pytest.mark.parametrize(
    ("depth", "colour", "value"),
    [(16, 0, b"\x80\x80"), (16, 2, b"\x80\x00\x12\x34\xff\x01"), (8, 0, b"\x80"), (8, 2, b"\x80\x12\xff")],
)
def test_the_one_transparent_value_is_transparent_and_no_other(depth: int, colour: int, value: bytes) -> None:
    width = depth // 8
    key = b"".join(value[at : at + width].rjust(2, b"\0") for at in range(0, len(value), width))
    other = bytes([key[0] ^ 0x40 if depth == 16 else key[0], key[1] ^ 0x40]) + key[2:]
    assert pixel(raw_png(depth, colour, value, chunk(b"tRNS", key)), (1, 2, 3)) == (1, 2, 3)
    assert pixel(raw_png(depth, colour, value, chunk(b"tRNS", other)), (1, 2, 3)) != (1, 2, 3)


# Colours

TO_XYZ = {
    "srgb": [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]],
    "adobe": [[0.6097559, 0.2052401, 0.1492240], [0.3111242, 0.6256560, 0.0632197], [0.0194811, 0.0608902, 0.7448387]],
    "p3": [[0.5151024, 0.2919653, 0.1571506], [0.2411820, 0.6922362, 0.0665819], [-0.0010506, 0.0418782, 0.7843777]],
}
"""Linear RGB to XYZ under D50."""


def _number(value: float) -> bytes:
    return struct.pack(">i", round(value * 65_536))


def _xyz(values: list[float]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(_number(value) for value in values)


def _profile(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", device: bytes = b"mntr") -> bytes:
    tags = {b"desc": b"desc\0\0\0\0\0\0\0\2x\0" + bytes(78), b"wtpt": _xyz([0.9642, 1, 0.8249])} | tags
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    header = struct.pack(">I", start + len(data)) + bytes(4) + b"\x02\x10\0\0" + device + space + pcs + bytes(12)
    header += b"acsp" + bytes(28) + _number(0.9642) + _number(1) + _number(0.8249) + bytes(48)
    return header + table + data


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + b"\0\0"


def rgb_profile(space: str, gamma: float = 2.19921875) -> bytes:
    columns = np.array(TO_XYZ[space]).T.tolist()
    tags = {f"{name}XYZ".encode(): _xyz(column) for name, column in zip("rgb", columns, strict=True)}
    return _profile(b"RGB ", tags | {f"{name}TRC".encode(): _gamma(gamma) for name in "rgb"})


def stored_in(space: str, rgb: tuple[int, int, int], gamma: float = 2.19921875) -> tuple[int, ...]:
    """An sRGB colour as another space spells it."""
    values = np.array(rgb) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    other = np.linalg.solve(np.array(TO_XYZ[space]), np.array(TO_XYZ["srgb"]) @ linear)
    return tuple((other.clip(0, 1) ** (1 / gamma) * 255).round().astype(int).tolist())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("space", ["adobe", "p3"])
def test_wide_gamuts_are_shown_as_srgb(space: str, kind: str, encoded: Encoder) -> None:
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
    for meant in ((220, 30, 30), (40, 180, 60), (240, 140, 20), (90, 90, 90), (255, 255, 255)):
        image = Image.new("RGB", (16, 16), stored_in(space, meant))
        data = encoded(image, kind, icc_profile=rgb_profile(space), **options.get(kind, {}))
        codec = 2 if kind in ("JPEG", "AVIF") else 0
        np.testing.assert_allclose(pixel(data), meant, atol=4 + codec)


def test_transparent_and_palette_images_have_profiles_too(encoded: Encoder) -> None:
    meant, profile = (40, 180, 60), rgb_profile("adobe")
    image = Image.new("RGBA", (16, 16), (*stored_in("adobe", meant), 255))
    image.paste((0, 0, 0, 0), (0, 8, 16, 16))
    for data in (encoded(image, "PNG", icc_profile=profile), encoded(image.quantize(4), "PNG", icc_profile=profile)):
        rgb = decode_image(data, background=(9, 8, 7)).rgb
        np.testing.assert_allclose(rgb.getpixel((3, 3)), meant, atol=4)
        assert rgb.getpixel((3, 12)) == (9, 8, 7), "the background is of sRGB already"


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_profiles_set_the_tone(mode: str, encoded: Encoder) -> None:
    linear = _profile(b"GRAY", {b"kTRC": _gamma(1.0)})
    image = Image.new(mode, (16, 16), 55 if mode == "L" else (55, 255))  # 0.2159 of the light: mid grey of sRGB
    np.testing.assert_allclose(pixel(encoded(image, "PNG", icc_profile=linear)), GREY, atol=4)


def test_cmyk_is_shown_as_its_profile_says(encoded: Encoder) -> None:
    corners = {(0, 0, 0, 0): (100, 0, 0), (1, 0, 0, 0): (75, -15, -15), (0, 0, 1, 0): (89, -5, 40)}
    nodes = [corners.get((c, m, y, k), (20, 0, 0)) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    grid = b"".join(bytes([round(lightness * 2.55), a + 128, b + 128]) for lightness, a, b in nodes)
    identity = b"".join(_number(float(row == column)) for row in range(3) for column in range(3))
    table = b"mft1\0\0\0\0\4\3\2\0" + identity + bytes(range(256)) * 4 + grid + bytes(range(256)) * 3
    profile = _profile(b"CMYK", {b"A2B0": table}, pcs=b"Lab ", device=b"prtr")
    to_srgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    shown_as = {(255, 0, 0, 0): (191, 113, 113), (0, 0, 255, 0): (227, 123, 168), (0, 0, 0, 0): (255, 128, 128)}
    for ink, lab in shown_as.items():
        shown = ImageCms.applyTransform(Image.new("LAB", (1, 1), lab), to_srgb)
        assert shown is not None
        for kind in ("TIFF", "JPEG"):
            data = encoded(Image.new("CMYK", (16, 16), ink), kind, icc_profile=profile)
            np.testing.assert_allclose(pixel(data), shown.getpixel((0, 0)), atol=8)  # black is fitted as well


@pytest.mark.parametrize(
    "profile",
    [
        b"junk",
        bytes(1_500_000),
        rgb_profile("adobe")[:200],
        _profile(b"RGB ", {}),
        _profile(b"CMYK", {}),
        _profile(b"GRAY", {b"kTRC": _gamma(1.0)}),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    ],
    ids=["junk", "zeros", "cut", "no tags", "of CMYK", "of grey", "sRGB"],
)
def test_profiles_that_are_broken_or_say_nothing_new_change_no_pixel(profile: bytes, encoded: Encoder) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for kind in ("PNG", "TIFF"):
        shown = decode_image(encoded(noise, kind, icc_profile=profile)).rgb
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(noise))


def test_large_profiles_count(encoded: Encoder) -> None:
    tags = {b"priv": b"data" + bytes(3_000_000)}
    columns = np.array(TO_XYZ["adobe"]).T.tolist()
    tags |= {f"{name}XYZ".encode(): _xyz(column) for name, column in zip("rgb", columns, strict=True)}
    tags |= {f"{name}TRC".encode(): _gamma(2.19921875) for name in "rgb"}
    image = Image.new("RGB", (16, 16), stored_in("adobe", (40, 180, 60)))
    np.testing.assert_allclose(pixel(encoded(image, "PNG", icc_profile=_profile(b"RGB ", tags))), (40, 180, 60), atol=4)


# Formats and limits


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\xff\x0a\xfa\x7f\x01", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS or PostScript"),
        (b"%PDF-1.7\n", "PDF"),
        (b"8BPS\0\1", "Photoshop"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isom", "MP4 or QuickTime"),
        (b"\x1f\x8b\x08\0", "gzip"),
    ],
)
def test_formats_that_are_not_read_are_named(data: bytes, name: str) -> None:
    assert problem(data + bytes(600)) == ("undecodable", f"unsupported format: {name}")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000"])
def test_an_image_of_a_format_that_is_read_is_never_none_of_them(kind: str, encoded: Encoder) -> None:
    data = encoded(Image.new("RGB", (64, 64), GREEN), kind)
    status, reason = problem(data[:20])
    assert status == "undecodable" and "none of" not in reason


def test_what_is_no_image_says_what_it_is() -> None:
    assert problem(b"") == ("not_an_image", "empty")
    assert problem(b"  <!DOCTYPE html><p>404") == ("not_an_image", "a web page or XML")
    assert problem(b"hello")[1].startswith("none of JPEG, PNG")


def test_no_program_is_run_for_what_strangers_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "ran"
    for name in ("gs", "djpeg", "dcraw"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {trace}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    assert problem(eps)[0] == "undecodable"
    assert not trace.exists()


def test_limits_hold_before_anything_is_decoded(green: bytes) -> None:
    huge = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    huge += chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    assert problem(huge) == ("too_many_pixels", "more than 178956970 pixels")
    assert problem(green, Limits(max_pixels=4095)) == ("too_many_pixels", "more than 4095 pixels")
    assert problem(green, Limits(max_bytes=99)) == ("too_large", "more than 99 bytes")
    assert decode_image(green, Limits(max_bytes=len(green), max_pixels=4096)).width == 64


def test_the_first_picture_of_several_is_shown_under_the_name_of_its_format(encoded: Encoder) -> None:
    image, behind = Image.new("RGB", (64, 64), GREEN), Image.new("RGB", (32, 32), (255, 0, 0))
    phone = decode_image(encoded(image, "MPO", save_all=True, append_images=[behind]))
    assert phone.extension == "jpg" and phone.rgb.size == (64, 64)
    np.testing.assert_allclose(phone.rgb.getpixel((3, 3)), GREEN, atol=4)
    for kind, extension in (("JPEG", "jpg"), ("JPEG2000", "jp2"), ("TIFF", "tiff"), ("PNG", "png"), ("WEBP", "webp")):
        assert decode_image(encoded(image, kind)).extension == extension
