"""Decoding of untrusted image files: the accepted formats, the limits, and the conversion to sRGB.

No other module decodes images. Whatever a file holds (16 bits, floats, CMYK, a wide gamut, transparency, an EXIF
rotation), the result is upright 8-bit sRGB, as a browser shows it.
"""

from __future__ import annotations

import io
import re
import sys
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, UnidentifiedImageError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""The formats that are decoded. Some of Pillow's others run programs on untrusted input (EPS runs Ghostscript)."""
MOST_PIXELS = 178_956_970
"""Largest image that Pillow decodes, in pixels."""
WHITE = (255, 255, 255)
_LONGEST_REASON = 200
_EXTENSIONS = {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2"}
"""File extensions of Pillow's formats; an MPO (a phone's picture followed by a second one) is a JPEG to viewers."""

Kind = Literal["too_large", "too_many_pixels", "not_an_image", "undecodable"]


class UnusableImage(OSError):
    """Raised for bytes that cannot be decoded as an image within the limits.

    Args:
        kind: the class of the problem, for counting.
        reason: what is wrong, in the same words for every image with the same cause.
    """

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Limits:
    """Limits on the size of an image file and of the decoded image."""

    max_bytes: int | None = None
    """Largest size of the file in bytes; None for no limit."""
    max_pixels: int = MOST_PIXELS
    """Largest width times height; it is read from the header before anything is decoded."""


class DecodedImage(NamedTuple):
    """A decoded image as it is displayed, and what its file says about it."""

    rgb: Image.Image
    """The image: upright, 8-bit sRGB, with transparency flattened onto the background."""
    width: int
    """Width as stored in the file, before the EXIF rotation is applied."""
    height: int
    """Height as stored in the file, before the EXIF rotation is applied."""
    extension: str
    """Usual file extension of the format: `jpg`, `png`, ..."""


def decode_image(data: bytes, limits: Limits | None = None, background: tuple[int, int, int] = WHITE) -> DecodedImage:
    """Decode an image completely; of a file with several pictures, decode the first.

    Args:
        data: an encoded image in one of `IMAGE_FORMATS`.
        limits: limits on its size; by default only Pillow's own limit on pixels applies.
        background: colour under transparent pixels, RGB 0..255.

    Raises:
        UnusableImage: the data is too large, no image, in an unsupported format, or damaged.
    """
    limits = limits or Limits()
    if limits.max_bytes is not None and len(data) > limits.max_bytes:
        raise UnusableImage("too_large", f"more than {limits.max_bytes} bytes")
    too_many = UnusableImage("too_many_pixels", f"more than {limits.max_pixels} pixels")
    try:
        with _opened(data) as opened:
            if opened.width * opened.height > limits.max_pixels:
                raise too_many
            width, height, extension = *opened.size, (opened.format or "").lower()
            rgb = _shown(opened, _eight_bit(opened, data), background)
            return DecodedImage(rgb, width, height, _EXTENSIONS.get(extension, extension))
    except UnusableImage:
        raise
    except Image.DecompressionBombError:
        raise too_many from None
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except Exception as error:  # on damaged bytes Pillow also raises SyntaxError, ValueError, RuntimeError, ...
        raise UnusableImage("undecodable", f"{type(error).__name__}: {error}"[:_LONGEST_REASON]) from error


def _shown(opened: Image.Image, image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Apply the ICC profile, transparency and EXIF rotation of the file `opened` to its 8-bit image."""
    colours, alpha = _parts(image)
    rgb = _srgb(colours, opened.info.get("icc_profile"))
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, (*background, 255)), rgb).convert("RGB")
    return _upright(opened, rgb)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""The transposition that turns an image upright, by EXIF orientation."""


def _upright(opened: Image.Image, rgb: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises many types on damaged EXIF, which viewers ignore; the pixels are decoded by now
        return rgb
    return rgb if turn is None else rgb.transpose(turn)


# Recognition of formats


def _opened(data: bytes) -> Image.Image:
    """Open an image, which reads its header only."""
    if not data.startswith(_PNG):
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    lean, profile = _lean_png(data)
    opened = Image.open(io.BytesIO(lean), formats=IMAGE_FORMATS)
    if profile is not None:
        opened.info["icc_profile"] = profile
    transparent = opened.info.get("transparency")
    if data[24:26] == b"\x10\x02" and transparent:  # 16 bits a channel, of which Pillow keeps the upper eight
        opened.info["transparency"] = tuple(value >> 8 for value in transparent)
    return opened


_STARTS: dict[str, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8\xff",), "PNG": (b"\x89PNG",), "GIF": (b"GIF8",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "JPEG2000": (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL "), "EPS or PostScript": (b"%!PS", b"\xc5\xd0\xd3\xc6"),
    "PDF": (b"%PDF",), "Photoshop": (b"8BPS",), "icon": (b"\0\0\1\0",), "OpenEXR": (b"\x76\x2f\x31\x01",),
    "JPEG XR": (b"II\xbc",), "DDS": (b"DDS ",), "Radiance HDR": (b"#?R",), "QOI": (b"qoif",), "GIMP": (b"gimp xcf",),
    "Fujifilm RAW": (b"FUJIFILMCCD-RAW",), "ZIP": (b"PK\3\4",), "gzip": (b"\x1f\x8b",), "FITS": (b"SIMPLE  =",),
    "Matroska or WebM video": (b"\x1aE\xdf\xa3",), "Flash": (b"FWS", b"CWS"),
}  # fmt: skip
"""The first bytes of the files of a format; most of these formats are unsupported and only named in messages."""
_AVIF, _HEIC = (b"avif", b"avis"), (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def _format_of(data: bytes) -> str:
    """Return the format of a file by its first bytes, or '' if they are unknown."""
    brand = data[8:12]
    if data[4:8] == b"ftyp":
        return "AVIF" if brand in _AVIF else "HEIC" if brand in _HEIC else "MP4 or QuickTime"
    if data[:4] == b"RIFF":
        return "WEBP" if brand == b"WEBP" else "AVI or WAV"
    return next((name for name, starts in _STARTS.items() if data.startswith(starts)), "")


def _unidentified(data: bytes) -> UnusableImage:
    """Return the error for bytes in which Pillow recognises none of `IMAGE_FORMATS`."""
    start = data[:512].lstrip().lower()
    if not data:
        return UnusableImage("not_an_image", "empty")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg", b"<head")):
        return UnusableImage("not_an_image", "a web page or XML")
    name = _format_of(data)
    if name in IMAGE_FORMATS:
        return UnusableImage("undecodable", f"{name} with a damaged header, or of a kind that is not read")
    if name:
        return UnusableImage("undecodable", f"unsupported format: {name}")
    return UnusableImage("not_an_image", f"none of {', '.join(IMAGE_FORMATS)}")


_PNG = b"\x89PNG\r\n\x1a\n"
_KEPT_CHUNKS = (b"tRNS", b"eXIf")
_KEPT_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type APP1")
"""Text chunks in which programs that do not write eXIf store the orientation."""
_MOST_PROFILE_BYTES = 16 << 20


def _lean_png(data: bytes) -> tuple[bytes, bytes | None]:
    """Return a PNG without the chunks that do not affect its pixels, and its ICC profile.

    Pillow refuses the whole image if such a chunk is damaged or unpacks to more than a megabyte (a workflow, XMP, a
    printer's profile), although browsers show it.
    """
    kept, profile, texts = [data[:8]], None, set[bytes]()
    at, view = len(_PNG), memoryview(data)
    while at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if not kind[:1].islower() or end > len(data):  # critical, or truncated: left for Pillow to judge
            kept.append(data[at:end])
        elif zlib.crc32(view[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big"):
            content = data[at + 8 : end - 4]
            keyword = content[:80].partition(b"\0")[0]
            if kind == b"iCCP":
                profile = _inflated(content[len(keyword) + 2 :], _MOST_PROFILE_BYTES)
            elif kind in _KEPT_CHUNKS or (keyword in _KEPT_TEXTS and keyword not in texts and _fits(kind, content)):
                texts.add(keyword)
                kept.append(data[at:end])
        at = end
    kept.append(data[at:])
    return b"".join(kept), profile


def _fits(kind: bytes, content: bytes) -> bool:
    """Return whether the text of a chunk is within Pillow's limit."""
    most = PngImagePlugin.MAX_TEXT_CHUNK
    if len(content) > most:
        return False
    rest = content.partition(b"\0")[2]
    if kind == b"iTXt":  # flag, method, language NUL, translated keyword NUL, text
        return rest[:1] != b"\1" or _inflated(rest[2:].split(b"\0", 2)[-1], most) is not None
    return kind == b"tEXt" or (kind == b"zTXt" and _inflated(rest[1:], most) is not None)


def _inflated(packed: bytes, most: int) -> bytes | None:
    """Decompress a zlib stream; return None if it is damaged or holds more than `most` bytes."""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(packed, most)
    except zlib.error:
        return None
    return found if stream.eof else None


# Conversion of deeper images to 8 bits


def _eight_bit(opened: Image.Image, data: bytes) -> Image.Image:
    """Load the image with 8 bits per channel; grey with one transparent value becomes grey with alpha."""
    if _is_deep_tiff(opened):
        return _eight_bit_colours(opened, data)
    opened.load()
    if not (opened.mode.startswith("I") or opened.mode == "F"):
        return opened
    tags = getattr(opened, "tag_v2", {})
    samples = np.asarray(opened)
    if opened.mode == "I" and tags.get(_BITS, (0,))[0] == 32 and not _is_signed(opened):
        samples = samples.view(np.uint32)
    whole = _float_range(samples, tags) if opened.mode == "F" else _whole_range(samples, opened)
    scaled = _scaled(samples, whole)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow takes into account at 8 bits only
        np.subtract(255, scaled, out=scaled)
    grey = Image.fromarray(scaled)
    transparent = opened.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(samples == transparent, 0, 255).astype(np.uint8)))
    return grey


def _scaled(samples: np.ndarray, whole: float) -> np.ndarray:
    """Scale samples of any type to uint8: `whole` and more become 255 (white), NaN becomes 0 (black)."""
    scaled = np.nan_to_num(samples.astype(np.float32), copy=False, nan=0, posinf=whole, neginf=0)
    scaled *= 255 / whole
    np.rint(np.clip(scaled, 0, 255, out=scaled), out=scaled)
    return scaled.astype(np.uint8)


_OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
_DEEP = re.compile(r"(RGB|RGBA|RGBX);16([LBN])")
"""Pillow's raw modes for colours of 16 bits per channel; the last letter is the byte order."""


def _is_deep_tiff(opened: Image.Image) -> bool:
    """Return whether this is a TIFF of 16 bits per colour channel; call it before the image is loaded."""
    tiles: list[Any] = getattr(opened, "tile", [])
    return opened.format == "TIFF" and bool(tiles) and all(_DEEP.fullmatch(_raw_mode(tile)) for tile in tiles)


def _raw_mode(tile: Any) -> str:
    return str(tile.args[0] if isinstance(tile.args, tuple) else tile.args)


def _bytes_swapped(tile: Any) -> Any:
    raw_mode = _DEEP.sub(lambda found: f"{found[1]};16{_OTHER_ORDER[found[2]]}", _raw_mode(tile))
    return tile._replace(args=(raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode)


def _eight_bit_colours(opened: Image.Image, data: bytes) -> Image.Image:
    """Load a TIFF of 16 bits per colour channel, of which Pillow keeps the upper eight bits.

    If no value reaches a quarter of white, the file is read again with its bytes swapped, which gives the lower eight.
    """
    opened.load()
    upper = np.asarray(opened)[..., :3]
    if upper.max(initial=0) >= 64:
        return opened
    with Image.open(io.BytesIO(data), formats=("TIFF",)) as again:
        again.tile = [_bytes_swapped(tile) for tile in again.tile]
        samples = (upper.astype(np.uint16) << 8) | np.asarray(again)[..., :3]
    colours = Image.fromarray(_scaled(samples, _whole_range(samples, opened)))
    if opened.mode == "RGBA":
        colours.putalpha(opened.getchannel("A"))
    return colours


_BITS, _PHOTOMETRIC, _MAX_SAMPLE, _SAMPLE_FORMAT, _S_MAX_SAMPLE = 258, 262, 281, 339, 341
_INTEGER_BITS = (8, 10, 12, 14, 16, 24)
_FLOAT_RANGES = (1, 255, 65_535)
_MOST_LOOKED_AT = 1_000_000


def _whole_range(samples: np.ndarray, opened: Image.Image) -> float:
    """Return the integer that stands for white: 65,535, or in a TIFF the maximum of as many bits as its values need.

    Cameras, scanners and microscopes write 10, 12 or 14 bits into TIFFs of 16 or 32 bits and seldom declare it, so the
    range is inferred from the largest value, or the largest that the file declares: 8, 10, 12, 14, 16, 24 or all bits.
    """
    if opened.format != "TIFF":
        return 65_535
    tags = opened.tag_v2  # type: ignore[attr-defined]
    stored = int(tags.get(_BITS, (16,))[0])
    if stored not in (16, 32):
        return float(2**stored - 1)
    largest = max(float(samples.max(initial=0)), _declared(tags))
    ways = [bits for bits in _INTEGER_BITS if bits < stored] + [stored - _is_signed(opened)]
    return float(next((2**bits - 1 for bits in ways if largest < 2**bits), 2 ** ways[-1] - 1))


def _float_range(samples: np.ndarray, tags: dict[int, object]) -> float:
    """Return the float that is white: the first of 1, 255 and 65,535 above 99% of the values, or their maximum."""
    some = samples.ravel()[:: max(1, samples.size // _MOST_LOOKED_AT)]
    some = some[np.isfinite(some)]
    largest = max(float(np.percentile(some, 99)) if some.size else 0.0, _declared(tags))
    return next((float(each) for each in _FLOAT_RANGES if largest <= each), largest)


def _declared(tags: dict[int, object]) -> float:
    """Return the largest sample value that a TIFF declares, or 0 if it declares none that can be read."""
    for tag in (_S_MAX_SAMPLE, _MAX_SAMPLE):
        value = tags.get(tag)
        try:
            found = float(value[0] if isinstance(value, tuple) else value)  # type: ignore[arg-type]
        except (TypeError, ValueError, IndexError):
            continue
        if np.isfinite(found):
            return found
    return 0.0


def _is_signed(opened: Image.Image) -> bool:
    found = getattr(opened, "tag_v2", {}).get(_SAMPLE_FORMAT, (1,))
    return bool(found == 2 or (isinstance(found, tuple) and found[:1] == (2,)))


# Conversion to sRGB


def _parts(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Split an image into its colours and its alpha channel, which is None if everything is opaque."""
    if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return image, None
    grey = image.mode in ("1", "L", "LA", "La")
    whole = image.convert("LA" if grey else "RGBA")
    return whole.convert("L" if grey else "RGB"), whole.getchannel("A")


class _Conversion(NamedTuple):
    mode: str
    """Pillow mode of the images that `transform` accepts."""
    transform: ImageCms.ImageCmsTransform


_DEVICES = ("mntr", "scnr", "prtr", "spac")
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_NOTHING_CHANGES = 2
"""In levels of 0..255: a profile that changes no colour by more is treated as sRGB, which most profiles are."""


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image of 8 bits per channel to sRGB; the result is always a new image."""
    if image.mode == "LAB":
        return _applied(_lab(), image)
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    conversion = _conversion(profile) if profile else None
    if conversion is not None and conversion.mode == "RGB" and image.mode == "L":
        image = image.convert("RGB")
    if conversion is None or conversion.mode != image.mode:
        return image.convert("RGB")
    return _applied(conversion.transform, image)


@lru_cache(maxsize=16)
def _conversion(profile: bytes) -> _Conversion | None:
    """Return the conversion from an ICC profile to sRGB, or None if it changes nothing or the profile is unusable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES.get(source.profile.xcolor_space.strip())
        if mode is None or source.profile.device_class not in _DEVICES:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return None
    if mode != "CMYK":
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        plain = Image.fromarray(colours if mode == "RGB" else levels[None])
        before, after = (np.asarray(each, np.int16) for each in (plain.convert("RGB"), _applied(transform, plain)))
        if np.abs(after - before).max() <= _NOTHING_CHANGES:
            return None
    return _Conversion(mode, transform)


@lru_cache(maxsize=1)
def _lab() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    found = ImageCms.applyTransform(image, transform)
    assert found is not None, "a new image is asked for"
    return found
