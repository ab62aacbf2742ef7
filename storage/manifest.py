"""Manifests of artifacts: the list of an artifact's files with sizes and checksums, and how they were made."""

import json
from dataclasses import dataclass, fields
from typing import Any

from storage.digests import canonical_json, is_sha256, sha256_bytes
from storage.errors import DamagedObject, FileNotInManifest


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: its name, and the size and checksum of its bytes."""

    path: str
    """Relative POSIX path within the artifact."""
    size: int
    """Size in bytes."""
    sha256: str
    """The sha256 of the bytes, as 64 lower-case hexadecimal digits."""

    def __post_init__(self) -> None:
        check_relative_path(self.path)
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 0:
            raise ValueError(f"file {self.path!r}: size is {self.size!r}; give the number of bytes, 0 or more")
        if not is_sha256(self.sha256):
            raise ValueError(f"file {self.path!r}: sha256 is {self.sha256!r}; give 64 lower-case hexadecimal digits")

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON, as in manifests and receipts."""
        return {"path": self.path, "size": self.size, "sha256": self.sha256}

    @classmethod
    def from_json(cls, value: Any) -> "FileEntry":
        """Read an entry of a manifest or a receipt; raise ValueError if it has other fields."""
        if not isinstance(value, dict) or set(value) != {"path", "size", "sha256"}:
            raise ValueError(f"{value!r} is no file entry; it needs exactly path, size and sha256")
        return cls(path=value["path"], size=value["size"], sha256=value["sha256"])


@dataclass(frozen=True)
class Manifest:
    """Describes an artifact. Equal manifests have equal bytes and digests; the order of `files` does not matter."""

    kind: str
    """Kind of the artifact, for example `code_table`."""
    schema_version: int
    """Version of the layout of this kind of artifact."""
    stage: str
    """Name of the stage that made it."""
    config: dict[str, Any]
    """The part of the normalised config that affects the result."""
    inputs: dict[str, str]
    """Digest of each input artifact, by the name of the stage that made it."""
    files: tuple[FileEntry, ...]
    """The files, sorted by path."""
    metrics: dict[str, Any]
    """Metrics of the result, as JSON."""
    metadata: dict[str, Any]
    """Whatever else readers need, as JSON; never times, hosts or paths."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(sorted(self.files, key=lambda entry: entry.path)))
        for name in ("kind", "stage"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"manifest: {name} is {value!r}; give a non-empty name")
        if isinstance(self.schema_version, bool) or not isinstance(self.schema_version, int):
            raise ValueError(f"manifest: schema_version is {self.schema_version!r}; give a whole number")
        for name in ("config", "inputs", "metrics", "metadata"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"manifest: {name} is {getattr(self, name)!r}; give a dict")
        for name, digest in self.inputs.items():
            if not is_sha256(digest):
                raise ValueError(f"manifest: input {name!r} is {digest!r}; give the digest of its artifact")
        _check_no_collisions([entry.path for entry in self.files])
        self.to_bytes()

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as a JSON value."""
        value = {field.name: getattr(self, field.name) for field in fields(self)}
        return value | {"files": [entry.to_json() for entry in self.files]}

    def to_bytes(self) -> bytes:
        """Return the manifest as canonical JSON; raise ValueError if a field is not JSON."""
        return canonical_json(self.to_json())

    @property
    def digest(self) -> str:
        """The sha256 of `to_bytes()`: the artifact's name."""
        return sha256_bytes(self.to_bytes())

    @property
    def size(self) -> int:
        """Total size of all files in bytes."""
        return sum(entry.size for entry in self.files)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Read a manifest from the bytes of `to_bytes`.

        Raises:
            DamagedObject: `data` is not a manifest in canonical JSON.
        """
        try:
            value = json.loads(data)
            files = tuple(FileEntry.from_json(entry) for entry in value["files"])
            manifest = cls(**(value | {"files": files}))
            if manifest.to_bytes() != data:
                raise ValueError("it is not in canonical form")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DamagedObject(f"these {len(data)} bytes are not an artifact's manifest: {error}") from error
        return manifest

    def file(self, path: str) -> FileEntry:
        """Return the entry of one file; raise FileNotInManifest, which lists the files, if there is no such file."""
        for entry in self.files:
            if entry.path == path:
                return entry
        listed = ", ".join(entry.path for entry in self.files[:20]) or "nothing"
        more = f" and {len(self.files) - 20} more" if len(self.files) > 20 else ""
        raise FileNotInManifest(f"artifact {self.kind} of {self.stage} has no file {path!r}; it holds {listed}{more}")

    def files_under(self, prefix: str) -> list[FileEntry]:
        """Return the files in the folder `prefix` (or the file of that name), sorted by path; all of them for ''."""
        folder = prefix.rstrip("/")
        return [e for e in self.files if not folder or e.path == folder or e.path.startswith(folder + "/")]


def check_relative_path(path: object) -> None:
    """Raise ValueError unless `path` is a plain relative POSIX path that stays within its folder."""
    if not isinstance(path, str) or not path:
        raise ValueError(f"path {path!r} is no name; give a relative path such as 'shards/00000.tar'")
    if any(part in ("", ".", "..") for part in path.split("/")) or "\\" in path or not path.isprintable():
        raise ValueError(
            f"path {path!r} is not a plain relative POSIX path; use names joined by '/', without '.', '..' or '\\'"
        )


def _check_no_collisions(paths: list[str]) -> None:
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise ValueError(f"manifest: path {path!r} appears twice; give each file its own name")
        seen.add(path)
    for path in paths:
        parents = path.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            if "/".join(parents[:depth]) in seen:
                raise ValueError(f"manifest: {'/'.join(parents[:depth])!r} is both a file and the folder of {path!r}")
