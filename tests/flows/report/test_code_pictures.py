"""What a code stands for: the patches really carry it, and the word really is the most telling one."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from flows.inspection import inspect_codes
from flows.report.code_pictures import MIN_IMAGES, PATCHES, _places, _telling, code_strips
from models.transforms import TransformConfig, load_image
from stages.artifacts.images import ImageSource
from stages.artifacts.rows import ORIGINAL
from storage.code_table import read_code_table
from tests.helpers.tiny import TinyRun


def test_patches_are_cut_from_where_the_code_stands(tiny_run: TinyRun) -> None:
    store = tiny_run.store
    table, download = tiny_run.results["tokenize"].manifest, tiny_run.results["download"].manifest
    rows = read_code_table([store.fetch(entry) for entry in table.files_under("codes")])
    originals = [at for at, view in enumerate(rows.columns["view"]) if view == ORIGINAL]
    grid = rows.codes[originals][:, 0, 0]
    code = int(Counter(grid.ravel().tolist()).most_common(3)[2][0])
    (strip,) = code_strips(store, table, download, [code])
    carrying = [row for row in range(len(grid)) if (grid[row] == code).any()]
    assert strip.num_images == len(carrying)

    transform = TransformConfig(**rows.info.transform)
    source = ImageSource(store, download, transform)
    row = carrying[0]
    y, x = np.argwhere(grid[row] == code)[0]
    image = load_image(source.raw(source.keys.index(rows.keys[originals[row]])), transform)
    cell = transform.image_size // grid.shape[1]
    expected = image.crop((x * cell, y * cell, (x + 1) * cell, (y + 1) * cell)).resize((24, 24), Image.NEAREST)
    shown = strip.strip.crop((24, 24, 48, 48))
    inside = (2, 2, 22, 22)  # the frame is drawn on the cell's rim
    assert np.array_equal(np.asarray(shown.crop(inside)), np.asarray(expected.crop(inside)))
    assert Image.open(io.BytesIO(strip.png)).size == (PATCHES * 76, 72)


def test_chosen_codes_are_common_and_start_with_the_most_telling(tiny_run: TinyRun) -> None:
    table, download = (tiny_run.results[name].manifest for name in ("tokenize", "download"))
    strips = code_strips(tiny_run.store, table, download)
    assert len({strip.code for strip in strips}) == len(strips) <= 12
    assert all(strip.num_images >= MIN_IMAGES for strip in strips)
    says = [strip.share * np.log(strip.share / strip.base) if strip.word else 0.0 for strip in strips[:8]]
    assert says == sorted(says, reverse=True)


def test_the_most_telling_word_is_rare_elsewhere() -> None:
    captions = [{"a", "red", "fox"}, {"a", "fox"}, {"a", "red", "hat"}, {"a", "hat"}]
    base = Counter(word for words in captions for word in words)
    places = _places(np.array([[[7]], [[7]], [[3]], [[3]]]))
    word, share, part, says = _telling(places[7], captions, base)
    assert (word, share, part) == ("fox", 1.0, 0.5)
    assert says == pytest.approx(np.log(2))


def test_a_code_in_no_image_is_refused(tiny_run: TinyRun) -> None:
    table, download = (tiny_run.results[name].manifest for name in ("tokenize", "download"))
    with pytest.raises(ValueError, match="code 64 of book .* is in none of the first .* codes lie in 0..63"):
        code_strips(tiny_run.store, table, download, [64])


def test_inspect_writes_the_picture(tiny_run: TinyRun, tmp_path) -> None:
    table = tiny_run.results["tokenize"].manifest
    known = code_strips(tiny_run.store, table, tiny_run.results["download"].manifest)[:2]
    text = inspect_codes(tiny_run.store, table.digest, tmp_path, [strip.code for strip in known])
    assert all(str(strip.code) in text for strip in known)
    with Image.open(tmp_path / f"{table.digest[:12]}-codes.png") as picture:
        assert picture.size == (PATCHES * 76, 2 * 78)
