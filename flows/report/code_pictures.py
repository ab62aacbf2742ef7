"""What a code stands for: the image patches that carry it, as in MUSE-VL's figure of one code and one concept."""

from __future__ import annotations

import io
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from models.teachers.backbone import split_words
from models.transforms import TransformConfig, load_image
from stages.artifacts.rows import ORIGINAL
from stages.artifacts.shards import CODES, images_file, shard_of
from storage.code_table import CodeTable, read_code_table
from storage.image_shards import read_image_shard
from storage.manifest import Manifest
from storage.store import Store

MAX_IMAGES = 5000
"""Images that patches are taken from: the first shards, until there are so many."""
PATCHES = 12
"""Most patches of a code, each from another image."""
MIN_IMAGES = 6
"""Codes in fewer images are not chosen."""
_TELLING, _SPACED = 8, 4
_SIDE = 72
_FRAME = (10, 108, 116)

Places = dict[int, list[tuple[int, int, int]]]
"""For each code the places that carry it: row of the table, row and column of the grid."""


@dataclass(frozen=True)
class CodeStrip:
    """One code and patches that carry it."""

    book: str
    code: int
    num_images: int
    """Images that carry it."""
    word: str
    """The caption word that it says most about."""
    share: float
    """Part of the images that carry the code whose caption has the word."""
    base: float
    """Part of all images whose caption has the word."""
    strip: Image.Image
    """The patches side by side: the code's own cell in the middle of its eight neighbours."""

    @property
    def png(self) -> bytes:
        """The strip as PNG bytes."""
        buffer = io.BytesIO()
        self.strip.save(buffer, "PNG")
        return buffer.getvalue()


def code_strips(
    store: Store, table: Manifest, download: Manifest, codes: Sequence[int] | None = None
) -> list[CodeStrip]:
    """Cut out patches of some codes of each book, at the first depth.

    Args:
        store: holds both artifacts.
        table: of kind `code_table`.
        download: the images that it was made of.
        codes: which; None takes the eight that say most about a caption word, and four evenly spaced by how often they
            occur, so that the page does not show good ones alone.

    Raises:
        ValueError: a code is outside the codebook, or no image carries it.
    """
    loaded, encoded = _read(store, table, download)
    captions = [set(split_words(text or "")) for text in loaded.columns["text"]]
    base = Counter(word for words in captions for word in words)
    transform = TransformConfig(**loaded.info.transform)
    strips = []
    for book, (name, size) in enumerate(zip(loaded.info.codebook_names, loaded.info.codebook_sizes, strict=True)):
        places = _places(loaded.codes[:, book, 0])
        told = {code: _telling(found, captions, base) for code, found in places.items()}
        for code in _chosen(places, told) if codes is None else codes:
            if code not in places:
                raise ValueError(
                    f"code {code} of book {name!r} is in none of the first {len(captions)} images; "
                    f"codes lie in 0..{size - 1}, `musevl inspect` shows which are used"
                )
            word, share, part, _ = told[code]
            strip = _strip(places[code], encoded, transform, loaded.info.code_shape[2:])
            strips.append(CodeStrip(name, code, len({row for row, _, _ in places[code]}), word, share, part, strip))
    return strips


def _read(store: Store, table: Manifest, download: Manifest) -> tuple[CodeTable, list[bytes]]:
    """Read the rows of original images, not of views, from the first shards, and the images."""
    paths, count = [], 0
    encoded: dict[str, bytes] = {}
    for entry in table.files_under(CODES):
        paths.append(store.fetch(entry))
        samples = read_image_shard(store.fetch(download.file(images_file(shard_of(entry)))))
        encoded |= {sample.key: sample.image for sample in samples}
        count = len(encoded)
        if count >= MAX_IMAGES:
            break
    loaded = read_code_table(paths)
    kept = [at for at, view in enumerate(loaded.columns["view"]) if view == ORIGINAL][:MAX_IMAGES]
    columns = {name: [values[at] for at in kept] for name, values in loaded.columns.items()}
    rows = CodeTable(loaded.info, [loaded.keys[at] for at in kept], columns, loaded.codes[kept])
    return rows, [encoded[key] for key in rows.keys]


def _places(grid: npt.NDArray[np.unsignedinteger]) -> Places:
    """Return the places of each code in codes `[R, h, w]`."""
    places: Places = defaultdict(list)
    for place, code in np.ndenumerate(grid):
        places[int(code)].append((place[0], place[1], place[2]))
    return dict(places)


def _telling(
    places: list[tuple[int, int, int]], captions: list[set[str]], base: Counter[str]
) -> tuple[str, float, float, float]:
    """Return the most informative word of a code, its share in the code's images and in all, and the information.

    How much: the share times the logarithm of how much larger it is than among all images, nats.
    """
    rows = {row for row, _, _ in places}
    counts = Counter(word for row in rows for word in captions[row])
    best = ("", 0.0, 0.0, 0.0)
    for word, count in sorted(counts.items()):
        share, part = count / len(rows), base[word] / len(captions)
        says = share * math.log(share / part)
        if says > best[3]:
            best = (word, share, part, says)
    return best


def _chosen(places: Places, told: dict[int, tuple[str, float, float, float]]) -> list[int]:
    common = [code for code, found in places.items() if len({row for row, _, _ in found}) >= MIN_IMAGES]
    telling = sorted(common, key=lambda code: (-told[code][3], code))[:_TELLING]
    others = sorted(set(common) - set(telling), key=lambda code: (-len(places[code]), code))
    spaced = [others[index * len(others) // _SPACED] for index in range(min(_SPACED, len(others)))]
    return [*telling, *spaced]


def _strip(
    places: list[tuple[int, int, int]], encoded: list[bytes], transform: TransformConfig, grid: tuple[int, int]
) -> Image.Image:
    first = {row: (row, y, x) for row, y, x in reversed(places)}  # one patch an image
    rows = sorted(first)
    count = min(PATCHES, len(rows))
    picked = [first[rows[index * len(rows) // count]] for index in range(count)]
    strip = Image.new("RGB", (PATCHES * (_SIDE + 4), _SIDE), "white")
    for position, (row, y, x) in enumerate(picked):
        strip.paste(_patch(load_image(encoded[row], transform), grid, y, x), (position * (_SIDE + 4), 0))
    return strip


def _patch(image: Image.Image, grid: tuple[int, int], y: int, x: int) -> Image.Image:
    """Cut out a cell of the grid with its neighbours, framed; white outside the image."""
    height, width = image.height / grid[0], image.width / grid[1]
    box = [round((x - 1) * width), round((y - 1) * height), round((x + 2) * width), round((y + 2) * height)]
    patch = Image.new("RGB", (box[2] - box[0], box[3] - box[1]), "white")
    patch.paste(image, (-box[0], -box[1]))
    patch = patch.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    third = _SIDE // 3
    ImageDraw.Draw(patch).rectangle((third, third, 2 * third, 2 * third), outline=_FRAME)
    return patch
