"""Embedded sample data: openly licensed emoji in four drawing styles, with a URL list and a loopback server.

``emoji.csv`` lists the images with captions; one zip per style holds the images; README.md names authors and licences.
"""

from pathlib import Path

SAMPLE_FOLDER: Path = Path(__file__).parent
"""The folder that holds the list, the zips and their licences."""

SAMPLE_LIST: Path = SAMPLE_FOLDER / "emoji.csv"
"""The URL list: columns url, caption, concept, category, subcategory, style, split."""

STYLES: tuple[str, ...] = ("noto", "twemoji", "openmoji", "fluent")
"""Names of the drawing styles; each has a ``<style>.zip``."""

URL_PREFIX: str = "sample://"
"""Scheme of the URLs in the list; `infra.sample_data.server.resolve` turns them into HTTP URLs."""


def archive_path(style: str) -> Path:
    """Return the path of the zip of `style`, whether or not it has been built.

    Raises:
        ValueError: `style` is not one of `STYLES`.
    """
    if style not in STYLES:
        raise ValueError(f"style {style!r} is unknown; choose one of {', '.join(STYLES)}")
    return SAMPLE_FOLDER / f"{style}.zip"
