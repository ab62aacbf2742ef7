"""Grouping of the members of a WebDataset tar into samples, each an image and its caption.

In this layout, the members of one sample follow each other and share their name up to the first dot. Many existing tars
violate both rules, so all headers (and texts) of a tar are read before members are grouped. Ambiguous members become no
sample, since an image must not get another one's text.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.download.sources.images import is_image_name
from stages.download.sources.source import NUM_EXAMPLES, has_text, same_column
from stages.download.sources.text import TEXT_SUFFIXES, decode, load_json, pair_folded, split_suffix
from storage.input_files import is_clutter

_JSON = "json"
NO_OBJECT = "the .json beside the image is no JSON object"
REPEATED = "its name comes several times in the tar, and it is not clear which text is its own"
_RAW_SUFFIXES = ("img", "image", "bin", "")
"""Suffixes of members that are more likely to be images than other members without an image suffix."""
_CHUNK = 1 << 20


@dataclass(slots=True)
class TarImage:
    """Name and position of an image in a tar."""

    name: str
    offset: int
    size: int


@dataclass(slots=True)
class TarSample:
    """The members of one sample."""

    stem: str
    """Name of the members without the suffix."""
    order: int
    """Index of its first member in the tar."""
    images: list[TarImage] = field(default_factory=list)
    others: list[TarImage] = field(default_factory=list)
    """Other members; if there is a text but no image, one of them is taken for the image, and decoding will tell."""
    texts: dict[str, str] = field(default_factory=dict)
    """Texts by suffix."""
    fields: dict[str, Any] | None = None
    """The requested fields of its .json; None if there is no .json."""
    problem: str = ""
    """Why it is unusable: `REPEATED`, or `NO_OBJECT`, since the .json may hold the caption or the split; '' if it is
    usable.
    """

    @property
    def image(self) -> TarImage | None:
        """The sample's first image, or None."""
        return self.images[0] if self.images else None

    @property
    def has_text(self) -> bool:
        """Whether it has a text or a .json."""
        return bool(self.texts or self.problem) or self.fields is not None

    @property
    def kinds(self) -> tuple[object, ...]:
        """The numbers and kinds of its members, for comparison with other samples."""
        return len(self.images), len(self.others), *sorted(self.texts), self.fields is not None, self.problem

    def add(self, other: TarSample) -> None:
        """Merge the texts and fields of another sample into this one; its own take precedence."""
        self.texts = other.texts | self.texts
        if other.fields is not None:
            self.fields = other.fields | (self.fields or {})
        self.problem = self.problem or other.problem

    def caption(self, column: str) -> Any:
        """Return the caption from its .json, else from its text member; '' if both are empty or missing."""
        said = (self.fields or {}).get(column)
        if said is not None and has_text(str(said)):
            return said
        return next((self.texts[suffix] for suffix in TEXT_SUFFIXES if has_text(self.texts.get(suffix, ""))), "")


class TarReader:
    """Reads the samples of tars, and collects what messages need.

    Args:
        columns: fields of the samples' .json to keep.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = columns
        self.seen: dict[str, None] = {}
        """Names of the fields of all .json members, in order of appearance."""
        self.problem = ""
        """What is wrong with the first invalid .json; '' if all are valid."""
        self.left_out: list[str] = []
        """Names of the first members that belong to no sample."""
        self.num_left_out = 0
        self._tar = ""

    def samples(self, file: Any, tar: str) -> list[TarSample]:
        """Return the samples of one tar, in the order of their first members.

        Args:
            file: a seekable binary file.
            tar: name of the tar, for messages.

        Raises:
            tarfile.TarError: the tar is damaged or truncated.
            OSError: it cannot be read.
        """
        self._tar = tar
        rounds: dict[str, list[TarSample]] = {}
        counts: dict[str, int] = {}
        for order, member in enumerate(_members(file)):
            name = member.name.removeprefix("./")
            if is_clutter(name) or not member.isfile():
                self._leave_out([] if member.isdir() else [name])
                continue
            stem, suffix = split_suffix(name)
            number = counts[name] = counts.get(name, 0) + 1  # a name may be repeated
            known = rounds.setdefault(stem, [])
            if number > len(known):
                known.append(TarSample(stem, order))
            self._add(known[number - 1], name, suffix, member, file)
        groups: dict[str, list[TarSample]] = {}
        for stem, repeated in rounds.items():
            groups.setdefault(_key(stem), []).extend(self._told_apart(repeated))
        samples = _paired([sample for key, group in groups.items() for sample in self._joined(key, group)])
        for sample in samples:
            self._leave_out([image.name for image in sample.images[1:]])
        return sorted(samples, key=lambda sample: sample.order)

    def _add(self, sample: TarSample, name: str, suffix: str, member: tarfile.TarInfo, file: Any) -> None:
        image = TarImage(name, member.offset_data, member.size)
        if is_image_name(name):
            sample.images.append(image)
        elif suffix in TEXT_SUFFIXES:
            text = decode(_data(file, member)).rstrip("\r\n")
            if sample.texts.setdefault(suffix, text) != text:  # KEY.txt and KEY.TXT
                sample.problem = REPEATED
        elif suffix == _JSON:
            self._add_json(sample, name, _data(file, member))
        else:
            sample.others.insert(0 if suffix in _RAW_SUFFIXES else len(sample.others), image)

    def _add_json(self, sample: TarSample, name: str, data: bytes) -> None:
        try:
            value = load_json(data)
            wrong = "" if isinstance(value, dict) else f"no JSON object, but {str(value)[:40]!r}"
        except ValueError as error:
            wrong = f"not JSON: {error}"
        if wrong:
            sample.problem, self.problem = NO_OBJECT, self.problem or f"{self._tar}: {name} is {wrong}"
            return
        self.seen |= dict.fromkeys(value)
        sample.fields = sample.fields or {}
        for column in self._columns:
            own = column if column in value else next((key for key in value if same_column(key, column)), None)
            if own is not None:
                sample.fields[column] = value[own]

    def _leave_out(self, names: Sequence[str]) -> None:
        self.num_left_out += len(names)
        self.left_out += [f"{self._tar}/{name}" for name in names[: NUM_EXAMPLES - len(self.left_out)]]

    def _told_apart(self, repeated: list[TarSample]) -> list[TarSample]:
        """Return the repeated samples of one name; mark them as unusable unless all have the same kinds of members."""
        if len({sample.kinds for sample in repeated}) == 1:
            return repeated
        for sample in repeated:
            sample.problem = REPEATED
            if not sample.images:
                self._leave_out([f"{sample.stem}.{suffix}" for suffix in sample.texts] or [sample.stem])
        return [sample for sample in repeated if sample.images]

    def _joined(self, key: str, group: list[TarSample]) -> list[TarSample]:
        """Group samples that share their name up to the first dot.

        An image and a text of exactly the same name form a sample. Remaining texts and images are merged into the
        sample whose name they extend (`3.mask.png` into `3.png`), and images into the text whose name they extend
        (`2.left.png` into `2.txt`). Two different endings form a sample (`9.input.png`, `9.outputs.txt`) if they are
        the only ones and contain no
        digit: `img.0001.png` does not belong to `img.0003.txt`.
        """
        for sample in group:
            if sample.others and sample.has_text and not sample.images:
                sample.images.append(sample.others.pop(0))
            self._leave_out([image.name for image in sample.others])
        if len({sample.stem for sample in group}) < len(group):
            return [sample for sample in group if sample.images or sample.has_text]
        images = [sample for sample in group if sample.images]
        texts = [sample for sample in group if sample.has_text and not sample.images]
        alone = []
        for text in texts:
            parents = [image for image in images if text.stem.startswith(f"{image.stem}.")]
            children = [image for image in images if image.stem.startswith(f"{text.stem}.") and not image.has_text]
            endings = text.stem[len(key) :] + "".join(image.stem[len(key) :] for image in images)
            if parents:
                max(parents, key=lambda image: len(image.stem)).add(text)
            elif children:
                children[0].add(text)
                children[0].images += [image for child in children[1:] for image in child.images]
                images = [image for image in images if image not in children[1:]]
            elif len(images) == len(texts) == 1 and not images[0].has_text and not any(map(str.isdigit, endings)):
                images[0].add(text)
            else:
                alone.append(text)
        for image in images:
            if not image.has_text and any(image.stem.startswith(f"{other.stem}.") for other in images):
                self._leave_out([each.name for each in image.images])
            else:
                alone.append(image)
        return alone


def _members(file: Any) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar without keeping them in memory.

    Raises:
        tarfile.TarError: the tar is damaged or truncated, even if tarfile does not notice.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]
            yield member
        # tarfile also stops silently at the end of the file and at a damaged header
        file.seek(tar.offset)
        if (end := file.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("a damaged header" if any(end) else "its end is missing: it is cut off")
        while rest := file.read(_CHUNK):
            if any(rest):
                raise tarfile.ReadError("more follows after its end: are these several tars in one file?")


def _data(file: Any, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    data = bytes(file.read(member.size))
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name} ends early")
    return data


def _key(stem: str) -> str:
    """Return a name up to its first dot."""
    folder, slash, base = stem.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _paired(samples: list[TarSample]) -> list[TarSample]:
    """Merge images and texts whose names are equal except for upper case or the Unicode form of accents."""
    images = {str(at): sample.stem for at, sample in enumerate(samples) if sample.images and not sample.has_text}
    texts = {str(at): sample.stem for at, sample in enumerate(samples) if not sample.images}
    pairs = pair_folded(images, texts)
    for image, text in pairs.items():
        samples[int(image)].add(samples[int(text)])
    taken = set(pairs.values())
    return [sample for at, sample in enumerate(samples) if str(at) not in taken]
