"""Builds the sample data from npm packages: ``python -m infra.sample_data.build``.

Needs ``npm`` and, to render OpenMoji's SVG files, ``pip install resvg_py==0.5.0``. With the same versions of Pillow
(and so libwebp) and resvg the output is identical byte for byte; the data in the repository is the output of one run.
"""

import argparse
import csv
import hashlib
import importlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from infra.sample_data import SAMPLE_FOLDER, STYLES, URL_PREFIX
from infra.sample_data.captions import caption, concept_name, held_out_style

IMAGE_SIZE = 64  # pixels a side
MAX_FOLDER_BYTES = 9_500_000  # code, licences, list and images together
MIN_STYLES = 3  # a concept drawn in fewer styles is dropped
COLUMNS = ("url", "caption", "concept", "category", "subcategory", "style", "split")

# npm package, sha256 of its archive.
PACKAGES = {
    "noto": ("emoji-datasource-google@16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
    "openmoji": ("openmoji@17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
}
IMAGE_FOLDERS = {
    "noto": "img/google/64",
    "twemoji": "img/twitter/64",
    "openmoji": "color/svg",
    "fluent": "assets",
}
LEFT_OUT_CATEGORIES = {"Component"}  # bare skin tones
LEFT_OUT_SUBCATEGORIES = {"country-flag", "subdivision-flag"}

# Microsoft's MIT-licensed repository holds no families and couples (github.com/microsoft/fluentui-emoji/issues/173),
# though the npm package does: their licence is unclear, so they stay out of the fluent style.
UNLICENSED_FLUENT = re.compile(r"(?:family|couple with heart|kiss)(?::|$)|.* holding hands$")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One emoji and its source image in each style."""

    codepoint: str  # as in file names: lowercase hex, joined by hyphens
    name: str  # short name, see `captions.concept_name`
    category: str  # Unicode group in lowercase
    subcategory: str  # Unicode subgroup
    images: dict[str, Path]  # source image by style, in the order of `STYLES`


def fetch(style: str, folder: Path) -> Path:
    """Download and unpack the package of `style` below `folder`; returns the package's root.

    Raises:
        ValueError: the archive does not have the pinned checksum.
        subprocess.CalledProcessError: npm failed.
    """
    package, pinned = PACKAGES[style]
    target = folder / style
    target.mkdir()
    packed = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=target, check=True, stdout=subprocess.PIPE, text=True
    )
    archive = target / packed.stdout.split()[-1]
    actual = hashlib.sha256(archive.read_bytes()).hexdigest()
    if actual != pinned:
        raise ValueError(f"{package} has sha256 {actual}, expected {pinned}; check the registry or update PACKAGES")
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    return target / "package"


def plain_key(codepoint: str) -> str:
    """Return a code point sequence in lowercase without variation selectors, which the sets use differently."""
    return "-".join(part for part in codepoint.lower().split("-") if part != "fe0f")


def find_concepts(roots: dict[str, Path]) -> list[Concept]:
    """Return base emoji (no skin tones, no country flags) that at least `MIN_STYLES` styles draw, in order of name.

    Raises:
        ValueError: two emoji have the same name.
    """
    files = {
        style: {plain_key(path.stem): path for path in sorted((roots[style] / IMAGE_FOLDERS[style]).iterdir())}
        for style in STYLES
    }
    annotations = {
        plain_key(entry["hexcode"]): entry["annotation"]
        for entry in json.loads((roots["openmoji"] / "data/openmoji.json").read_text(encoding="utf-8"))
    }
    concepts: dict[str, Concept] = {}
    for entry in json.loads((roots["noto"] / "emoji.json").read_text(encoding="utf-8")):
        if entry["category"] in LEFT_OUT_CATEGORIES or entry["subcategory"] in LEFT_OUT_SUBCATEGORIES:
            continue
        key = plain_key(entry["unified"])
        short_name = annotations.get(key, entry["name"])
        images = {style: files[style][key] for style in STYLES if key in files[style]}
        if UNLICENSED_FLUENT.match(short_name):
            images.pop("fluent", None)
        if len(images) < MIN_STYLES:
            continue
        concept = Concept(
            codepoint=entry["unified"].lower(),
            name=concept_name(short_name),
            category=entry["category"].lower(),
            subcategory=entry["subcategory"],
            images=images,
        )
        if concept.name in concepts:
            other = concepts[concept.name].codepoint
            raise ValueError(f"{concept.codepoint} and {other} are both named {concept.name!r}; refine concept_name")
        concepts[concept.name] = concept
    return [concepts[name] for name in sorted(concepts)]


def open_source(path: Path) -> Image.Image:
    """Open a source image as RGBA; SVG files are rendered at four times `IMAGE_SIZE`.

    Raises:
        ImportError: it is an SVG file, and resvg_py is not installed.
    """
    if path.suffix != ".svg":
        return Image.open(path).convert("RGBA")
    try:
        resvg_py = importlib.import_module("resvg_py")
    except ImportError as error:
        raise ImportError("drawing SVG files needs resvg: pip install resvg_py==0.5.0") from error
    png = resvg_py.svg_to_bytes(svg_path=str(path), width=4 * IMAGE_SIZE, height=4 * IMAGE_SIZE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def flatten(image: Image.Image) -> Image.Image:
    """Centre an RGBA image on a white square of its longer side, and resize it to `IMAGE_SIZE` with Lanczos; RGB."""
    side = max(image.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    rgb = canvas.convert("RGB")
    return rgb if side == IMAGE_SIZE else rgb.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)


def encode(image: Image.Image, quality: int) -> bytes:
    """Encode `image` as lossy WebP with sharp YUV."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=6, use_sharp_yuv=True)
    return buffer.getvalue()


def zip_bytes(files: dict[str, bytes]) -> bytes:
    """Build an uncompressed zip of `files` by name, sorted, with fixed times and modes: the same bytes each time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, files[name])
    return buffer.getvalue()


def list_bytes(concepts: Iterable[Concept]) -> bytes:
    """Return the URL list as CSV, sorted by URL."""
    rows = []
    for concept in concepts:
        held_out = held_out_style(concept.name, tuple(concept.images))
        for style in concept.images:
            rows.append(
                (
                    f"{URL_PREFIX}emoji/{style}/{concept.codepoint}.webp",
                    caption(concept.name, concept.subcategory, style),
                    concept.name,
                    concept.category,
                    concept.subcategory,
                    style,
                    "test" if style == held_out else "train",
                )
            )
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(sorted(rows))
    return text.getvalue().encode()


def highest_fitting(fits: Callable[[int], bool], start: int) -> int:
    """Return the highest quality in 1..100 that fits, searched from `start`; sizes grow with quality.

    Raises:
        ValueError: not even quality 1 fits.
    """
    quality = start
    if fits(quality):
        while quality < 100 and fits(quality + 1):
            quality += 1
        return quality
    while quality > 1:
        quality -= 1
        if fits(quality):
            return quality
    raise ValueError(f"the sample data does not fit into {MAX_FOLDER_BYTES} bytes at any quality")


def build_archives(concepts: list[Concept], max_bytes: int, start: int) -> tuple[int, dict[str, bytes]]:
    """Build the zips with the highest WebP quality whose total is at most `max_bytes`; return both."""
    pixels = {
        style: {f"{c.codepoint}.webp": flatten(open_source(c.images[style])) for c in concepts if style in c.images}
        for style in STYLES
    }
    archives: dict[int, dict[str, bytes]] = {}

    def fits(quality: int) -> bool:
        archives[quality] = {
            style: zip_bytes({name: encode(image, quality) for name, image in images.items()})
            for style, images in pixels.items()
        }
        total = sum(map(len, archives[quality].values()))
        print(f"quality {quality}: {total / 1e6:.2f} MB of {max_bytes / 1e6:.2f} MB")
        return total <= max_bytes

    quality = highest_fitting(fits, start)
    return quality, archives[quality]


def other_bytes() -> int:
    """Return the size in bytes of the other files of the folder: code, licences and the README."""
    built = {"emoji.csv", *(f"{style}.zip" for style in STYLES)}
    paths = (path for path in SAMPLE_FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sum(path.stat().st_size for path in paths if path.name not in built)


def main() -> None:
    """Fetch the packages, choose the concepts, and write the list and the zips."""
    parser = argparse.ArgumentParser(description="Build the sample data from npm packages.")
    parser.add_argument("--output", type=Path, default=SAMPLE_FOLDER, help="folder to write the list and the zips to")
    parser.add_argument("--start-quality", type=int, default=92, help="WebP quality at which the search starts")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        concepts = find_concepts({style: fetch(style, Path(folder)) for style in STYLES})
        url_list = list_bytes(concepts)
        max_bytes = MAX_FOLDER_BYTES - len(url_list) - other_bytes()
        quality, archives = build_archives(concepts, max_bytes, arguments.start_quality)

    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "emoji.csv").write_bytes(url_list)
    for style, archive in archives.items():
        (arguments.output / f"{style}.zip").write_bytes(archive)
        print(f"{style}: {sum(style in c.images for c in concepts)} images, {len(archive) / 1e6:.2f} MB")
    print(f"{len(concepts)} concepts, WebP quality {quality}, list {len(url_list) / 1e6:.2f} MB")
    print(dict(Counter(c.category for c in concepts)))


if __name__ == "__main__":
    main()
