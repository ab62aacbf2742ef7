"""Text and image output about a code table: schema, rows, usage of the codebook, and decoded images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image

from flows.report.code_pictures import code_strips
from flows.text import one_line, text_table
from infra.terminal import on_one_line, printable
from models.metrics.measures import statistics_of_counts
from models.transforms import to_pil, to_pixels
from stages.artifacts import external_codes
from stages.artifacts.models import load_tokenizer
from stages.artifacts.shards import CODES, LEFT_OUT
from stages.metrics.catalogue import metric_of
from storage.code_table import CodeTable, CodeTableInfo, check_tokenizer, read_code_table
from storage.tables import read_table

if TYPE_CHECKING:
    from storage.manifest import Manifest
    from storage.store import Store

_FIRST_ROWS = 5
_LONGEST_CELL = 48
_LONGEST_BAR = 40
_COLUMNS = 6
_BATCH = 16


def inspect_code_table(store: Store, artifact: str, folder: Path, *, num_images: int = 36) -> str:
    """Describe a code table and write contact sheets of its first rows, decoded.

    Args:
        store: holds the table and its tokenizer.
        artifact: digest of the table, or the beginning of it.
        folder: folder of the PNG file, created if needed.
        num_images: number of rows to decode; 0 for none.

    Returns:
        Text for the terminal.

    Raises:
        ValueError: the artifact is not a code table.
    """
    manifest = store.load(artifact)
    if manifest.kind != "code_table":
        raise ValueError(
            f"artifact {manifest.digest[:12]} of stage {manifest.stage} is of kind {manifest.kind!r}, not a code table "
            "or download; `musevl artifacts ls` lists those that are"
        )
    found = _look(store, manifest, max(num_images, _FIRST_ROWS))
    parts = [
        f"code table {manifest.digest}",
        text_table(["column", "type"], [[field.name, str(field.type)] for field in found.schema]),
        _facts(found, manifest),
        _first_rows(found.first),
        _usage(found),
        _histogram(found),
    ]
    left_out = left_out_rows(store, manifest)
    if left_out:
        counts = Counter(row["status"] for row in left_out)
        parts.append(text_table(["images without codes", "number"], [[k, str(n)] for k, n in counts.most_common()]))
        parts.append(text_table(["key", "status", "error"], [list(row.values()) for row in left_out[:_FIRST_ROWS]]))
    if store.load(manifest.inputs["train_tokenizer"]).kind == external_codes.KIND:
        parts.append("no pictures: the codes are of another project's tokenizer, and nothing here decodes them")
    elif num_images and found.num_rows:
        sheet = _contact_sheet(store, found.first, manifest, folder, num_images)
        parts.append(f"pictures of the first rows: {sheet}")
    return "\n\n".join(parts)


def inspect_codes(store: Store, artifact: str, folder: Path, codes: list[int]) -> str:
    """Describe what some codes of a code table stand for, and write a picture of the image patches that have them.

    Raises:
        ValueError: a code occurs in none of the images that were examined.
    """
    manifest = store.load(artifact)
    strips = code_strips(store, manifest, store.load(manifest.inputs["download"]), codes)
    gap = 6
    width, height = strips[0].strip.size
    sheet = Image.new("RGB", (width, len(strips) * (height + gap)), "white")
    for row, strip in enumerate(strips):
        sheet.paste(strip.strip, (0, row * (height + gap)))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{manifest.digest[:12]}-codes.png"
    sheet.save(path)
    rows = [
        [strip.book, str(strip.code), str(strip.num_images), strip.word, f"{strip.share:.0%}", f"{strip.base:.1%}"]
        for strip in strips
    ]
    header = ["book", "code", "images", "word it says most about", "in its images", "in all images"]
    return f"{text_table(header, rows)}\npatches that carry these codes, in this order: {path}"


def left_out_rows(store: Store, manifest: Manifest) -> list[dict[str, str]]:
    """Return the images that a code table has left out, with key, status and error."""
    return [row for entry in manifest.files_under(LEFT_OUT) for row in read_table(store.fetch(entry)).to_pylist()]


@dataclass
class _Found:
    """The facts about a code table, collected file by file because it may be larger than memory."""

    schema: pa.Schema
    info: CodeTableInfo
    counts: npt.NDArray[np.int64]
    """Number of occurrences of each code, `[N, D, size of the largest codebook]`."""
    first: CodeTable
    """The first rows of the table."""
    num_rows: int


def _look(store: Store, manifest: Manifest, num_first: int) -> _Found:
    found: _Found | None = None
    for entry in manifest.files_under(CODES):
        path = store.fetch(entry)
        table = read_code_table([path])
        if found is None:
            books, depth, *_ = table.info.code_shape
            counts = np.zeros((books, depth, max(table.info.codebook_sizes)), np.int64)
            found = _Found(read_table(path).schema, table.info, counts, _rows(table, num_first), 0)
        elif len(found.first.keys) < num_first:
            found.first = _joined(found.first, _rows(table, num_first - len(found.first.keys)))
        found.num_rows += len(table.keys)
        for book, level in np.ndindex(found.counts.shape[:2]):
            codes = table.codes[:, book, level].ravel().astype(np.int64)
            found.counts[book, level] += np.bincount(codes, minlength=found.counts.shape[2])
    assert found is not None, "a code table has a file of codes"
    return found


def _rows(table: CodeTable, number: int) -> CodeTable:
    columns = {name: values[:number] for name, values in table.columns.items()}
    return CodeTable(table.info, table.keys[:number], columns, table.codes[:number])


def _joined(one: CodeTable, other: CodeTable) -> CodeTable:
    columns = {name: values + other.columns[name] for name, values in one.columns.items()}
    return CodeTable(one.info, one.keys + other.keys, columns, np.concatenate([one.codes, other.codes]))


def _facts(found: _Found, manifest: Manifest) -> str:
    info = found.info
    books, depth, height, width = info.code_shape
    return "\n".join(
        [
            f"rows:      {found.num_rows} in {len(manifest.files_under('codes'))} files, {manifest.size / 1e6:.1f} MB",
            f"codes:     {books} book(s) x depth {depth} x {height} x {width} positions, stored as {info.dtype}",
            one_line(f"tokenizer: {info.tokenizer_digest}"),
            one_line(f"transform: {info.transform}"),
        ]
    )


def _first_rows(table: CodeTable) -> str:
    names = list(table.columns)
    rows = [
        [_cell(key), *(_cell(table.columns[name][index]) for name in names), _cell(table.codes[index].ravel()[:8])]
        for index, key in enumerate(table.keys[:_FIRST_ROWS])
    ]
    return text_table(["key", *names, "first codes"], rows)


def _cell(value: object) -> str:
    text = printable(on_one_line(value)) if value is not None else "-"
    return text if len(text) <= _LONGEST_CELL else text[: _LONGEST_CELL - 3] + "..."


def _books(found: _Found) -> Iterator[tuple[str, int, npt.NDArray[np.int64]]]:
    """Yield the name, the depth, and the number of occurrences of each code."""
    for book, (name, size) in enumerate(zip(found.info.codebook_names, found.info.codebook_sizes, strict=True)):
        for level in range(found.info.code_shape[1]):
            yield name, level, found.counts[book, level, :size]


def _usage(found: _Found) -> str:
    rows = []
    for name, level, counts in _books(found):
        size, used = len(counts), int(np.count_nonzero(counts))
        _, perplexity = statistics_of_counts(torch.from_numpy(counts).double())
        top = 100 * counts.max() / max(1, counts.sum())
        cells = [
            name,
            str(level),
            str(size),
            f"{used} ({100 * used / size:.1f} %)",
            metric_of("codebook_perplexity").text(perplexity),
        ]
        rows.append([*cells, f"{top:.1f} %"])
    return text_table(["book", "depth", "size", "codes used", "perplexity", "commonest code"], rows)


def _histogram(found: _Found) -> str:
    """Format a histogram of the codes' numbers of occurrences: 0, 1, 2 to 3, 4 to 7 and so on, one bar per line."""
    rows = []
    for name, level, counts in _books(found):
        powers = np.bincount(np.frexp(counts.astype(np.float64))[1])  # 0 for 0, 1 for 1, 2 for 2 and 3, ...
        for power, number in enumerate(powers.tolist()):
            if power and not number:
                continue
            low, high = 2**power // 2, 2**power - 1
            times = str(low) if low >= high else f"{low} to {high}"
            bar = "#" * math.ceil(_LONGEST_BAR * number / powers.max())
            rows.append([name, str(level), times, str(number), bar])
    return text_table(["book", "depth", "occurs", "codes", ""], rows)


def _contact_sheet(store: Store, table: CodeTable, manifest: Manifest, folder: Path, num_images: int) -> Path:
    check_tokenizer(table.info, manifest.inputs["train_tokenizer"])
    tokenizer = load_tokenizer(store, table.info.tokenizer_digest)
    codes = torch.from_numpy(table.codes[:num_images].astype(np.int64))  # [B, N, D, h, w]
    with torch.inference_mode():
        pictures = [picture for batch in codes.split(_BATCH) for picture in to_pil(to_pixels(tokenizer.decode(batch)))]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{manifest.digest[:12]}.png"
    contact_sheet(pictures).save(path)
    return path


def contact_sheet(pictures: list[Image.Image]) -> Image.Image:
    """Arrange equal-sized images in rows on white, in reading order."""
    width, height = pictures[0].size
    gap = max(2, width // 32)
    columns = min(_COLUMNS, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(picture, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
