"""Text output about artifacts: lineage, differences, and garbage of a store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows.text import megabytes, one_line, text_table
from storage.errors import DamagedObject, ObjectMissing, UnknownArtifact
from storage.garbage import Collection
from storage.manifest import Manifest
from storage.store import Store

_SHORT = 12
_MAX_FILES = 10


def lineage_text(store: Store, artifact: str) -> str:
    """Return the lineage of an artifact as an indented tree, one line each; repeated artifacts are not expanded.

    Raises:
        StoreError: the artifact itself does not exist.
    """
    manifest = store.load(artifact)
    lines: list[str] = []
    _branch(store, manifest.stage, manifest.digest, "", lines, set())
    return "\n".join(one_line(line) for line in lines)


def _branch(store: Store, stage: str, digest: str, indent: str, lines: list[str], shown: set[str]) -> None:
    if digest in shown:
        lines.append(f"{indent}{stage}  {digest[:_SHORT]}  (above)")
        return
    shown.add(digest)
    try:
        manifest = store.load(digest)
    except (ObjectMissing, UnknownArtifact, DamagedObject):
        lines.append(f"{indent}{stage}  {digest[:_SHORT]}  missing from this store")
        return
    lines.append(f"{indent}{stage}  {digest[:_SHORT]}  {manifest.kind}, {megabytes(manifest.size)}")
    for name, made_from in manifest.inputs.items():
        _branch(store, name, made_from, indent + "  ", lines, shown)


def diff_text(first: Manifest, second: Manifest) -> str:
    """Return the differences between two artifacts part by part, or ''."""
    parts = [
        ("what they are", {"kind": first.kind, "stage": first.stage}, {"kind": second.kind, "stage": second.stage}),
        ("settings", _flat(first.config), _flat(second.config)),
        ("inputs", _short(first.inputs), _short(second.inputs)),
        ("metrics", _flat(first.metrics), _flat(second.metrics)),
        ("metadata", _flat(first.metadata), _flat(second.metadata)),
    ]
    found = [f"{title}\n{table}" for title, one, other in parts if (table := _differences(one, other))]
    files = _differences(_files(first), _files(second), most=_MAX_FILES)
    return "\n\n".join([*found, f"files\n{files}"] if files else found)


def _files(manifest: Manifest) -> dict[str, str]:
    return {entry.path: f"{entry.sha256[:_SHORT]} ({megabytes(entry.size)})" for entry in manifest.files}


def _differences(first: Mapping[str, Any], second: Mapping[str, Any], most: int | None = None) -> str:
    names = [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]
    if not names:
        return ""
    rows = [[name, str(first.get(name, "-")), str(second.get(name, "-"))] for name in names[:most]]
    more = f"\nand {len(names) - len(rows)} more" if len(names) > len(rows) else ""
    return text_table(["", "first", "second"], rows) + more


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _short(inputs: Mapping[str, str]) -> dict[str, str]:
    return {name: digest[:_SHORT] for name, digest in inputs.items()}


def garbage_text(collection: Collection, *, deleted: bool) -> str:
    """Return what a garbage collection found, by reason, and which damaged records limited it."""
    garbage, parts = collection.garbage, list[str]()
    if collection.unreadable:
        lines = [one_line(line) for line in collection.unreadable]
        parts += ["every blob is kept, for it is not known what these need:", *lines, ""]
    if not garbage:
        return "\n".join([*parts, "nothing to remove"])
    rows = []
    for reason in dict.fromkeys(item.reason for item in garbage):
        held = [item for item in garbage if item.reason == reason]
        rows.append([reason, str(len(held)), megabytes(sum(item.size for item in held))])
    total = megabytes(sum(item.size for item in garbage))
    end = f"deleted {total}" if deleted else f"{total} could go; nothing was deleted, `--delete` does it"
    return "\n".join([*parts, text_table(["reason", "objects", "size"], rows), end])
