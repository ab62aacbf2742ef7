"""The sample data is complete, honest about its licences, and what its list says it is."""

import csv
import hashlib
import http.client
import io
import zipfile
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from infra.sample_data import SAMPLE_FOLDER, STYLES, archive_path, build, captions
from infra.sample_data.server import SAMPLE_LIST, SampleServer, resolve

Row = dict[str, str]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    with SAMPLE_LIST.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def server() -> Iterator[SampleServer]:
    with SampleServer() as running:
        yield running


@pytest.fixture
def connection(server: SampleServer) -> Iterator[http.client.HTTPConnection]:
    opened = http.client.HTTPConnection(server.base_url.removeprefix("http://"), timeout=10)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def images(rows: list[Row], server: SampleServer) -> dict[str, Image.Image]:
    """Every image of the list by URL, fetched over one keep-alive connection."""
    opened = http.client.HTTPConnection(server.base_url.removeprefix("http://"), timeout=10)
    fetched: dict[str, Image.Image] = {}
    for row in rows:
        opened.request("GET", server.resolve(row["url"]).removeprefix(server.base_url))
        response = opened.getresponse()
        body = response.read()
        assert (response.status, response.getheader("Content-Type")) == (200, "image/webp"), row["url"]
        fetched[row["url"]] = Image.open(io.BytesIO(body))
        fetched[row["url"]].load()
    opened.close()
    return fetched


def status_of(connection: http.client.HTTPConnection, method: str, path: str) -> tuple[int, bytes]:
    connection.request(method, path)
    response = connection.getresponse()
    return response.status, response.read()


def test_every_listed_image_is_served_and_is_64_pixels_rgb(rows: list[Row], images: dict[str, Image.Image]) -> None:
    assert len(images) == len(rows) > 6000
    assert {(image.format, image.mode, image.size) for image in images.values()} == {("WEBP", "RGB", (64, 64))}


@pytest.mark.parametrize("style", STYLES)
def test_images_are_flattened_on_white(style: str, images: dict[str, Image.Image]) -> None:
    """Counted by corner, since Twemoji draws a tenth of its pictures to the edge (trains, the sea, mountains).

    Were the alpha channel lost, nearly every corner would be black.
    """
    of_style = [np.asarray(image) for url, image in images.items() if f"/{style}/" in url]
    corners = np.stack([pixels[[0, 0, -1, -1], [0, -1, 0, -1]] for pixels in of_style])  # [images, 4, RGB]
    assert (corners.min(axis=2) >= 235).mean() > 0.93


@pytest.mark.parametrize("style", STYLES)
def test_no_image_is_blank_or_a_placeholder_that_others_share(style: str, images: dict[str, Image.Image]) -> None:
    of_style = {url: image for url, image in images.items() if f"/{style}/" in url}
    assert [url for url, image in of_style.items() if np.asarray(image).min() > 240] == []
    pixels = Counter(hashlib.sha256(image.tobytes()).hexdigest() for image in of_style.values())
    assert max(pixels.values()) <= 10  # sets do draw a few concepts alike, e.g. "person" and gendered variants


def test_the_list_names_exactly_the_images_in_the_zips(rows: list[Row]) -> None:
    listed = {row["url"] for row in rows}
    held = set()
    for style in STYLES:
        with zipfile.ZipFile(archive_path(style)) as archive:
            held |= {f"sample://emoji/{style}/{name}" for name in archive.namelist()}
    assert listed == held
    assert len(listed) == len(rows)


def test_the_list_is_sorted_and_has_the_documented_columns(rows: list[Row]) -> None:
    assert tuple(rows[0]) == build.COLUMNS
    assert [row["url"] for row in rows] == sorted(row["url"] for row in rows)
    assert all(value and value == value.strip() for row in rows for value in row.values())


def test_captions_follow_from_concept_and_style_and_contain_both(rows: list[Row]) -> None:
    for row in rows:
        assert row["caption"] == captions.caption(row["concept"], row["subcategory"], row["style"])
        assert row["caption"].endswith(f"{row['concept']} in {row['style']} style")
    assert len({row["caption"] for row in rows}) == len(rows)


def test_concepts_are_plain_lowercase_and_stand_for_one_emoji_of_one_category(rows: list[Row]) -> None:
    of_concept: dict[str, set[tuple[str, ...]]] = {}
    for row in rows:
        assert set(row["concept"]) <= set("abcdefghijklmnopqrstuvwxyz0123456789 -"), row["concept"]
        codepoint = row["url"].rpartition("/")[2]
        of_concept.setdefault(row["concept"], set()).add((codepoint, row["category"], row["subcategory"]))
    assert {len(values) for values in of_concept.values()} == {1}
    assert len({values.copy().pop()[0] for values in of_concept.values()}) == len(of_concept)


def test_each_concept_has_at_least_three_distinct_styles_and_exactly_one_test_style(rows: list[Row]) -> None:
    styles: dict[str, list[str]] = {}
    held_out: dict[str, list[str]] = {}
    for row in rows:
        styles.setdefault(row["concept"], []).append(row["style"])
        if row["split"] == "test":
            held_out.setdefault(row["concept"], []).append(row["style"])
    assert {row["split"] for row in rows} == {"train", "test"}
    for concept, drawn in styles.items():
        assert len(drawn) == len(set(drawn)) >= build.MIN_STYLES
        assert set(drawn) <= set(STYLES)
        assert held_out[concept] == [captions.held_out_style(concept, drawn)]


def test_the_split_holds_out_every_style_about_equally(rows: list[Row]) -> None:
    held_out = Counter(row["style"] for row in rows if row["split"] == "test")
    expected = sum(held_out.values()) / len(STYLES)
    assert all(abs(held_out[style] - expected) < 0.15 * expected for style in STYLES)


def test_skin_tones_and_country_flags_are_left_out(rows: list[Row]) -> None:
    for row in rows:
        codepoints = [int(part, 16) for part in row["url"].rpartition("/")[2].removesuffix(".webp").split("-")]
        assert not any(0x1F3FB <= point <= 0x1F3FF for point in codepoints), row["concept"]  # skin tones
        assert not any(0x1F1E6 <= point <= 0x1F1FF for point in codepoints), row["concept"]  # regional indicators
        assert not any(0xE0020 <= point <= 0xE007F for point in codepoints), row["concept"]  # tags of subdivisions


def test_unlicensed_fluent_families_are_left_out(rows: list[Row]) -> None:
    fluent = {row["concept"] for row in rows if row["style"] == "fluent"}
    assert not {name for name in fluent if name.startswith(("family", "couple with heart"))}
    assert fluent.isdisjoint({"kiss", "men holding hands"})
    assert {"kiss mark", "kissing face", "fox"} <= fluent


def test_the_folder_stays_small() -> None:
    paths = [path for path in SAMPLE_FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in paths) <= 10_000_000


def test_attribution_names_every_style_its_package_and_a_licence_text() -> None:
    readme = (SAMPLE_FOLDER / "README.md").read_text(encoding="utf-8")
    table = {line.split("|")[1].strip(" `"): line for line in readme.splitlines() if line.startswith("| `")}
    for style in STYLES:
        package, _, version = build.PACKAGES[style][0].rpartition("@")
        assert f"{package} {version}" in table[style]
        licence = table[style].partition("(licenses/")[2].partition(")")[0]
        assert (SAMPLE_FOLDER / "licenses" / licence).stat().st_size > 1000


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/emoji/noto/",
        "/emoji/noto/ffff.webp",
        "/emoji/apple/1f98a.webp",
        "/emoji/noto/../noto/1f98a.webp",
        "/emoji/noto/..%2f..%2fREADME.md",
        "/../README.md",
        "/emoji/../../server.py",
        "//etc/passwd",
    ],
)
def test_unknown_paths_and_traversal_are_not_found(connection: http.client.HTTPConnection, path: str) -> None:
    assert status_of(connection, "GET", path) == (404, b"not found\n")
    assert status_of(connection, "GET", "/emoji/noto/1f98a.webp")[0] == 200  # the same connection still works


def test_head_answers_without_a_body(connection: http.client.HTTPConnection) -> None:
    assert status_of(connection, "HEAD", "/emoji/noto/1f98a.webp") == (200, b"")
    assert status_of(connection, "HEAD", "/emoji/noto/ffff.webp") == (404, b"")


def test_resolve_changes_sample_urls_only() -> None:
    base = "http://127.0.0.1:8765"
    assert resolve("sample://emoji/noto/1f98a.webp", base) == f"{base}/emoji/noto/1f98a.webp"
    assert resolve("sample://emoji/noto/1f98a.webp", base + "/") == f"{base}/emoji/noto/1f98a.webp"
    for url in ("https://example.org/sample://x.png", "file:///x.png", ""):
        assert resolve(url, base) == url


def test_two_servers_run_side_by_side_and_a_closed_one_has_no_address() -> None:
    with SampleServer() as first, SampleServer() as second:
        assert first.base_url != second.base_url
    with pytest.raises(RuntimeError, match="not running"):
        _ = first.base_url


def test_concept_names_are_cleaned_without_losing_words() -> None:
    assert captions.concept_name("FOX FACE") == "fox face"
    assert captions.concept_name("keycap: #") == "keycap hash"
    assert captions.concept_name("Japanese “here” button") == "japanese here button"
    assert captions.concept_name("woman’s hat") == "womans hat"
    assert captions.concept_name("piñata") == "pinata"
    with pytest.raises(ValueError, match="no letter"):
        captions.concept_name("!")


@pytest.mark.parametrize(
    ("concept", "expected"),
    [
        *[("fox", "a"), ("owl", "an"), ("unicorn", "a"), ("hourglass done", "an"), ("octopus", "an"), ("compass", "a")],
        *[("globe showing americas", "a"), ("smiling face with heart-eyes", "a"), ("grapes", ""), ("no bicycles", "")],
    ],
)
def test_articles_follow_the_documented_rule(concept: str, expected: str) -> None:
    assert captions.article(concept, "") == expected


def test_flatten_composites_on_white_and_keeps_the_whole_of_an_oblong_image() -> None:
    oblong = Image.new("RGBA", (128, 136), (0, 0, 0, 0))
    oblong.paste((255, 0, 0, 128), (0, 0, 128, 8))
    result = build.flatten(oblong)
    assert (result.mode, result.size) == ("RGB", (64, 64))
    pixels = np.asarray(result).astype(int)  # [y, x, RGB]
    assert pixels[40, 32].tolist() == [255, 255, 255]
    red, green, blue = pixels[1, 32]
    assert red == 255 and abs(green - 127) < 12 and green == blue


def test_zips_do_not_depend_on_time_or_order() -> None:
    assert build.zip_bytes({"a": b"1", "b": b"2"}) == build.zip_bytes({"b": b"2", "a": b"1"})


def test_highest_fitting_quality_is_found_from_either_side() -> None:
    for start in (1, 40, 60, 61, 100):
        assert build.highest_fitting(lambda quality: quality <= 60, start) == 60
    with pytest.raises(ValueError, match="does not fit"):
        build.highest_fitting(lambda quality: False, 5)
