"""Source of conversations in LLaVA's JSON layout with a folder of images.

The layout is `[{id, image, conversations: [{from: human | gpt, value}]}]`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from models.config import Config
from stages.download.sources.folder import FolderImages
from stages.download.sources.known_lists import images_named
from stages.download.sources.source import (
    NO_CAPTION,
    PLACE,
    URL,
    Failure,
    Fetched,
    Row,
    SourceOptions,
    find_columns,
    no_place,
    place,
    placed,
)
from stages.download.sources.text import clean, json_lines, load_json, strings
from stages.protocol import RuntimeStr
from storage.digests import digest_of
from storage.input_files import InputFiles, read_input

QUESTION, ANSWER, CONVERSATION = "question", "answer", "conversation"
_RULES = "2"
"""Version of the rules that decide which entries are usable; lists remembered under other rules are not reused."""
_WHAT = "download.files.path"
_EXPECTED = "a JSON file with a list of {id, image, conversations}, or JSONL with one a line"
_MARK = "<image>"
_PLACEHOLDER = re.compile(r"\A\s*<image>[ \t]*\r?\n?|\r?\n[ \t]*<image>\s*\Z")
"""The image placeholder as LLaVA writes it: before the question, or on a line of its own after it."""


class ConversationFiles(Config):
    """Conversations about images in the layout of LLaVA's instruction data."""

    kind: Literal["conversations"]
    """Selects this layout."""
    path: RuntimeStr
    """Path of the JSON or JSONL file. Its columns are the first `question` and its `answer`, the whole `conversation`
    as JSON, and the entry's other fields. The caption is the answer, unless the entry has one."""
    image_folder: RuntimeStr
    """Folder that the entries' `image` paths are relative to."""

    def open(self, options: SourceOptions) -> Conversations:
        """Open the source of the file's entries."""
        return Conversations(self, options)


class Conversations:
    """Source with one row per entry of a conversation file.

    Args:
        config: paths of the file and the images.
        options: the caption column and the size limit of an image.
    """

    def __init__(self, config: ConversationFiles, options: SourceOptions) -> None:
        self.what = f"conversations {config.path}"
        self._config, self._caption_column = config, options.caption_column
        self._images = FolderImages(config.image_folder, "download.files.image_folder", options.max_bytes)

    def content(self) -> dict[str, str]:
        file = InputFiles(self._config.path, _WHAT)
        names = [file.one(_EXPECTED)]
        images = images_named(file, names, ["conversations", _RULES], self._images_named)
        return {"conversations": digest_of(file.sha256s(names)), "files": self._images.digest(images)}

    def rows(self, columns: Sequence[str]) -> pa.Table:
        entries = self._entries(read_input(self._config.path, _WHAT, _EXPECTED))
        images = self._images.resolve([entry.image for entry in entries])
        self._images.say_unlisted(images, self.what)
        for entry, image in zip(entries, images, strict=True):
            entry.image = image
        available = list(dict.fromkeys(name for entry in entries for name in entry.columns))
        found = find_columns(self.what, columns, available)
        return pa.table(
            {name: strings([entry.columns.get(own) for entry in entries]) for name, own in found.items()}
            | {URL: strings(images), PLACE: strings([entry.place() for entry in entries])}
        )

    def fetch(self, rows: list[Row], scratch: Path) -> Iterator[tuple[int, Fetched]]:
        for position, found in placed(rows, "the conversation"):
            yield position, found if isinstance(found, Failure) else self._images.read(found[0])

    def _images_named(self) -> list[str]:
        entries = self._entries(read_input(self._config.path, _WHAT, _EXPECTED))
        return [entry.image for entry in entries if not entry.problem]

    def _entries(self, data: bytes) -> list[_Entry]:
        """Parse all entries; raise ValueError if none is usable."""
        try:
            if self._config.path.endswith((".jsonl", ".ndjson")):
                values = [value for _, value in json_lines(io.BytesIO(data))]
            else:
                values = load_json(data)
        except ValueError as error:
            raise ValueError(f"{self.what} is not readable as JSON: {error}; give {_EXPECTED}") from error
        if not isinstance(values, list):
            raise ValueError(f"{self.what} holds a {type(values).__name__}, not a list; give {_EXPECTED}")
        entries = [_read(value, self._caption_column) for value in values]
        if entries and all(entry.problem for entry in entries):
            raise ValueError(f"{self.what}: entry 0 {entries[0].problem}; give {_EXPECTED}, turns {{from, value}}")
        return entries


@dataclass
class _Entry:
    """An entry of the file, with one conversation about an image."""

    image: str = ""
    """Path of its image within the folder; '' if it has none."""
    problem: str = ""
    """Why the entry is unusable, the cause followed by a colon and details; '' if it is usable."""
    columns: dict[str, Any] = field(default_factory=dict)

    def place(self) -> str:
        """Return the entry's `PLACE`."""
        if self.problem:
            return no_place(NO_CAPTION, f"the entry {self.problem.partition(':')[0]}")
        return place(self.image) if self.image else ""


def _read(value: Any, caption_column: str) -> _Entry:
    """Parse an entry; a text that its turns lack is ''."""
    if not isinstance(value, dict):
        return _Entry(problem=f"is no object: {str(value)[:80]}")
    images = value.get("image")
    images = [image for image in images if image] if isinstance(images, list) else [images] if images else []
    others = {name: what for name, what in value.items() if name not in ("image", "conversations")}
    entry = _Entry(clean(images[0]) if images and isinstance(images[0], str) else "", columns=others)
    entry.problem = _problem(value.get("conversations"), images)
    if entry.problem:
        return entry
    turns = _without_placeholder(value["conversations"]) if images else value["conversations"]
    turns = [{"from": turn["from"], "value": turn["value"].strip()} for turn in turns]
    question, answer = _first_exchange(turns)
    if answer is None:
        entry.problem = "has a question and no answer" if question is not None else "has no question"
    elif answer in ("", _MARK):
        entry.problem = "has an image for an answer" if answer else "has an empty answer"
    caption = others.get(caption_column)
    if caption is None or (isinstance(caption, str) and not caption.strip()):
        others[caption_column] = answer
    entry.columns = others | {QUESTION: question, ANSWER: answer, CONVERSATION: turns}
    return entry


def _problem(turns: Any, images: list[Any]) -> str:
    """Return what is wrong with the layout of an entry, or ''."""
    if not isinstance(turns, list) or not turns:
        return "has no list 'conversations'"
    if not all(isinstance(image, str) for image in images):
        return f"has an image that is no path: {str(images)[:80]}"
    if len(images) > 1:
        return f"has several images, of which only one could be used: {len(images)}"
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt", "system"):
            return f"has a turn that is not from 'human' or 'gpt': {str(turn)[:80]}"
        if not isinstance(turn.get("value"), str):
            return f"has a turn without text: {str(turn)[:80]}"
    return ""


def _without_placeholder(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Remove the one `<image>` placeholder of the image; another `<image>` is text, such as a tag in HTML."""
    for index, turn in enumerate(turns):
        if turn["from"] == "human" and (found := _PLACEHOLDER.search(turn["value"])):
            text = turn["value"][: found.start()] + turn["value"][found.end() :]
            return [*turns[:index], turn | {"value": text}, *turns[index + 1 :]]
    return turns


def _first_exchange(turns: list[dict[str, Any]]) -> tuple[str | None, str | None]:
    """Return the first question, which may span several turns, and its answer; None for what is missing."""
    asked: list[str] = []
    for turn in turns:
        if turn["from"] == "human":
            asked.append(turn["value"])
        elif turn["from"] == "gpt" and asked:
            return "\n".join(filter(None, asked)), turn["value"]
    return ("\n".join(filter(None, asked)) if asked else None), None
