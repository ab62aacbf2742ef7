"""LLaVA's conversation JSON with an image folder: `[{id, image, conversations: [{from: human | gpt, value}]}]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from models.config import Config
from stages.sources.folder import FolderImages
from stages.sources.known_lists import look_up_list
from stages.sources.source import (
    NO_CAPTION,
    PLACE,
    URL,
    Failure,
    Fetched,
    Row,
    check_columns,
    no_place,
    place,
    placed,
)
from stages.sources.text import clean, json_lines, load_json, strings
from stages.stage import RuntimeStr
from storage.input_files import read_input

QUESTION, ANSWER, CONVERSATION = "question", "answer", "conversation"
_WHAT = "download.files.path"
_EXPECTED = "a JSON file with a list of {id, image, conversations}, or JSONL with one a line"
_IMAGE_MARK = "<image>"


class ConversationFiles(Config):
    """Conversations about images, as LLaVA's instruction data."""

    kind: Literal["conversations"]
    """Which layout the files have."""
    path: RuntimeStr
    """The JSON or JSONL file. Columns are `question` and `answer` of the first turn, the whole `conversation` as JSON,
    and the entry's other fields; the caption is the first answer unless the entry has one."""
    image_folder: RuntimeStr
    """Folder that the entries' `image` paths start from."""


class Conversations:
    """The entries of a conversation file, one row each.

    Args:
        config: where they are.
        caption_column: name of the caption's column.
        max_bytes: of an image; of larger ones no more is read.
    """

    def __init__(self, config: ConversationFiles, caption_column: str, max_bytes: int) -> None:
        self.what = f"conversations {config.path}"
        self._config, self._caption_column = config, caption_column
        self._images = FolderImages(config.image_folder, "download.files.image_folder", max_bytes)

    def content(self) -> dict[str, str]:
        known = look_up_list(self._config.path, _WHAT, _EXPECTED, ["conversations"], self._names_in)
        return {"conversations": known.sha256, "files": self._images.digest(known.images)}

    def rows(self, columns: Sequence[str]) -> pa.Table:
        entries = self._entries(read_input(self._config.path, _WHAT, _EXPECTED))
        described = [{} if wrong else self._columns(entry) for entry, wrong in entries]
        names = _names(entries)
        places = [
            no_place(NO_CAPTION, f"the entry {wrong.partition(':')[0]}") if wrong else place(name) if name else ""
            for name, (_, wrong) in zip(names, entries, strict=True)
        ]
        check_columns(self.what, columns, list(dict.fromkeys(name for row in described for name in row)))
        return pa.table(
            {name: strings([row.get(name) for row in described]) for name in columns}
            | {URL: strings(names), PLACE: strings(places)}
        )

    def fetch(self, rows: list[Row], scratch: Path) -> Iterator[tuple[int, Fetched]]:
        for position, found in placed(rows, "the conversation"):
            yield position, found if isinstance(found, Failure) else self._images.read(found[0])

    def _names_in(self, data: bytes) -> list[str]:
        return _names(self._entries(data))

    def _entries(self, data: bytes) -> list[tuple[Any, str]]:
        """Each with what is wrong with it, '' where nothing is; raises ValueError where none is right."""
        try:
            if self._config.path.endswith((".jsonl", ".ndjson")):
                entries = [entry for _, entry in json_lines(data)]
            else:
                entries = load_json(data)
        except ValueError as error:
            raise ValueError(f"{self.what} is not readable as JSON: {error}; give {_EXPECTED}") from error
        if not isinstance(entries, list):
            raise ValueError(f"{self.what} holds a {type(entries).__name__}, not a list; give {_EXPECTED}")
        problems = [_problem(entry) for entry in entries]
        if problems and all(problems):
            raise ValueError(f"{self.what}: entry 0 {problems[0]}; give {_EXPECTED}, turns {{from, value}}")
        return list(zip(entries, problems, strict=True))

    def _columns(self, entry: dict[str, Any]) -> dict[str, Any]:
        turns = [
            {"from": turn["from"], "value": turn["value"].replace(_IMAGE_MARK, "").strip()}
            for turn in entry["conversations"]
        ]
        said = {speaker: [turn["value"] for turn in turns if turn["from"] == speaker] for speaker in ("human", "gpt")}
        question, answer = ("".join(values[:1]) for values in said.values())
        others = {name: value for name, value in entry.items() if name not in ("image", "conversations")}
        first = {QUESTION: question, ANSWER: answer, CONVERSATION: turns}
        return {self._caption_column: answer} | others | first


def _names(entries: list[tuple[Any, str]]) -> list[str]:
    """The path of each entry's image; '' where it has none, or something is wrong with it."""
    return ["" if wrong else _image(entry) for entry, wrong in entries]


def _image(entry: dict[str, Any]) -> str:
    """The path of an entry's image; '' where it has none."""
    image = entry.get("image")
    return clean((image[0] if isinstance(image, list) else image) or "")


def _problem(entry: Any) -> str:
    """What is wrong with an entry; '' where nothing is."""
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list) or not entry["conversations"]:
        return "has no list 'conversations'"
    image = entry.get("image")
    path = image[0] if isinstance(image, list) and len(image) == 1 else image
    if not (path is None or isinstance(path, str)):
        return f"has the image {image!r}, not one path"
    for turn in entry["conversations"]:
        if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt", "system"):
            return f"has a turn that is not from 'human' or 'gpt': {str(turn)[:80]}"
        if not isinstance(turn.get("value"), str):
            return f"has a turn without text: {str(turn)[:80]}"
    return ""
