"""The artifact store: files by digest, artifacts by action key, and the records of work in progress.

Layout under one URI: `cas/sha256/ab/...` blobs and manifests, `actions/KEY.json` the one point where a result becomes
visible, `pins/`, `plans/`, `receipts/KEY/SHARD.json`, `marks/KEY/SHARD/`, `checkpoints/KEY/STEP/`, `runs/`
provenance, `quarantine/` damaged bytes.
"""

import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from storage.blobs import Blobs, blob_key
from storage.cache import Cache, cache_limit_bytes, default_cache_dir
from storage.digests import is_sha256, sha256_bytes
from storage.errors import AmbiguousDigest, DamagedObject, ObjectMissing, StoreError, UnknownArtifact
from storage.files import refuse_links
from storage.garbage import Collection, find_garbage, remove
from storage.held_folders import scratch_folder
from storage.manifest import FileEntry, Manifest
from storage.objects.object_store import ObjectStore
from storage.records import (
    action_digest,
    checked_name,
    read_pins,
    read_record,
    read_runs,
    record_bytes,
)
from storage.verify import Problem, Verifier
from storage.work import Work

logger = logging.getLogger(__name__)

Access = Literal["create", "write", "read"]
"""What a store is opened for; see `Store`."""

ACTION_SCHEMA = 1


@dataclass(frozen=True)
class Commit:
    """How a commit ended."""

    digest: str
    """The artifact that the action now stands for; the winner's when `adopted`."""
    created: bool
    """Whether this call made it visible."""
    adopted: bool
    """Whether another result was there first and was taken instead of ours."""


@dataclass(frozen=True)
class ArtifactInfo:
    """One line about an artifact."""

    digest: str
    kind: str
    stage: str
    action_key: str
    size: int
    """Bytes of its files together."""
    num_files: int


class Store:
    """An artifact store. Cheap to open; pickles as its URI and options, so workers can receive it.

    Args:
        uri: a local folder, `file:///path` or `s3://bucket/prefix`.
        cache_dir: where blobs of an S3 store are kept once downloaded; default MUSEVL_CACHE or the user's cache folder.
        endpoint_url: of an S3 service; default from AWS_ENDPOINT_URL. Credentials come from the standard AWS places.
        access: `create` makes the store if needed, and checks that it can be written; `write` wants it to be there, and
            checks the same; `read` wants it to be there and writes nothing, so that reading takes no more rights than
            reading. What is written to a store that was opened to be read fails where the store refuses it.

    Raises:
        StoreError: the folder or bucket cannot be used so, or does not hold create-only writes.
        ValueError: an unknown kind of URI.
    """

    def __init__(
        self,
        uri: str,
        *,
        cache_dir: Path | None = None,
        endpoint_url: str | None = None,
        access: Access = "create",
    ) -> None:
        options = {} if endpoint_url is None else {"endpoint_url": endpoint_url}
        self._objects = ObjectStore(str(uri), **options)
        self._cache_dir = cache_dir
        self._endpoint_url = endpoint_url
        self._blobs = Blobs(self._objects, Cache(cache_dir or default_cache_dir(), cache_limit_bytes()))
        if access != "create":
            self._objects.check_exists()
        if access != "read":
            self._objects.check_writes()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.uri, self._cache_dir, self._endpoint_url)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    @property
    def uri(self) -> str:
        """The store's URI: an absolute path, or s3://bucket/prefix."""
        return self._objects.uri

    @property
    def objects(self) -> ObjectStore:
        """The objects beneath, for tools and tests."""
        return self._objects

    # Files

    def put_file(self, local_path: str | Path, path: str) -> FileEntry:
        """Store a complete local file and return its entry, named `path`, for a manifest or a receipt."""
        return self._blobs.put_file(local_path, path)

    def put_bytes(self, data: bytes, path: str) -> FileEntry:
        """Store bytes and return their entry, named `path`, for a manifest or a receipt."""
        return self._blobs.put_bytes(data, path)

    def fetch(self, entry: FileEntry) -> Path:
        """Return a local read-only file with the entry's bytes, checked; its name is a digest.

        Keep the returned object for as long as the file is wanted: the cache of an S3 store holds it by that.

        Raises:
            ObjectMissing, DamagedObject: the blob is not there, or is not what `entry` says.
        """
        return self._blobs.fetch(entry)

    def holds(self, entry: FileEntry) -> bool:
        """Say whether a file is there with its size; its bytes are not read."""
        return not self._blobs.missing([entry])

    def read_bytes(self, entry: FileEntry) -> bytes:
        """Return the entry's bytes, checked; raises as `fetch` does."""
        return self._blobs.read_bytes(entry)

    def materialise(
        self,
        manifest: Manifest,
        folder: str | Path,
        prefix: str = "",
        on_file: Callable[[FileEntry], object] = lambda entry: None,
    ) -> None:
        """Copy an artifact's files to `folder/<path in the artifact>`, each one checked.

        Args:
            manifest: of the artifact.
            folder: made if needed; files of the same names are replaced.
            prefix: only the files in this folder of the artifact; they keep their full paths.
            on_file: called after each file.

        Raises:
            ObjectMissing, DamagedObject: as by `fetch`.
            StoreError: a folder on the way to a file is a symbolic link, and would lead it elsewhere.
        """
        for entry in manifest.files_under(prefix):
            refuse_links(Path(folder), entry.path, "the folder that files are copied to")
            self._blobs.copy_to(entry, Path(folder) / entry.path)
            on_file(entry)

    # Artifacts

    def commit(self, action_key: str, manifest: Manifest) -> Commit:
        """Make an artifact the result of an action.

        The first commit of a key wins. A later one with the same digest succeeds too; one with another digest adopts
        the winner, and the nondeterminism is put on record in `runs/`. A winner whose blobs are no longer all there is
        replaced. (Of two processes that repair one action at once, the later one stays.)

        Raises:
            StoreError: blobs of `manifest` are missing; store its files first.
        """
        key = _action_path(action_key)
        if missing := self._blobs.missing(manifest.files):
            names = ", ".join(entry.path for entry in missing[:5])
            raise StoreError(
                f"cannot commit {manifest.stage} to {self.uri}: {len(missing)} of its {len(manifest.files)} files are "
                f"not stored ({names}); call put_file for each and use the entries that it returns"
            )
        digest = self._blobs.put_bytes(manifest.to_bytes(), "manifest").sha256
        record = record_bytes({"manifest": digest, "schema": ACTION_SCHEMA})
        if self._objects.create(key, record):
            return Commit(digest, created=True, adopted=False)
        winner = self._action_digest(key)
        if winner == digest:
            return Commit(digest, created=False, adopted=False)
        if winner is None or self._intact(winner) is None:
            logger.warning("the result of action %s is damaged or incomplete; replaced by %s", action_key, digest)
            self._objects.put(key, record)
            return Commit(digest, created=True, adopted=False)
        self.record_run(
            {
                "event": "nondeterminism",
                "stage": manifest.stage,
                "action_key": action_key,
                "adopted": winner,
                "discarded": digest,
            }
        )
        logger.warning("action %s gave %s, but %s was there first and is used", action_key, digest, winner)
        return Commit(winner, created=False, adopted=True)

    def lookup(self, action_key: str) -> Manifest | None:
        """Return an action's artifact, None when there is none or any of its blobs is missing or of the wrong size."""
        digest = self._action_digest(_action_path(action_key))
        return None if digest is None else self._intact(digest)

    def load(self, digest_or_prefix: str) -> Manifest:
        """Return the manifest of a digest, or of the artifact whose digest begins so (at least 6 digits).

        Raises:
            UnknownArtifact, AmbiguousDigest: there is none, or several begin so.
            DamagedObject: the bytes are not a manifest.
        """
        return self._read_manifest(self._resolve(digest_or_prefix))

    def artifacts(self) -> list[ArtifactInfo]:
        """Return what is in the store, one entry an action, sorted by stage and digest; unreadable ones are skipped."""

        def info(key: str) -> ArtifactInfo | None:
            digest = self._action_digest(key)
            try:
                manifest = None if digest is None else self._read_manifest(digest)
            except (ObjectMissing, DamagedObject) as error:
                logger.warning("skipped %s: %s", key, error)
                return None
            if digest is None or manifest is None:
                return None
            name = key.removeprefix("actions/").removesuffix(".json")
            return ArtifactInfo(digest, manifest.kind, manifest.stage, name, manifest.size, len(manifest.files))

        found = [info for info in self._objects.map(info, self._objects.list("actions/")) if info is not None]
        return sorted(found, key=lambda item: (item.stage, item.digest, item.action_key))

    def verify(
        self, digest: str | None = None, on_file: Callable[[FileEntry], object] = lambda entry: None
    ) -> list[Problem]:
        """Re-hash every blob of one artifact (digest or prefix), or all that is in use; return what is wrong.

        In use are the artifacts of actions and pins, what they were made from, and the files of plans and receipts.
        Damaged bytes are moved to `quarantine/`, so the next lookup of their artifact, plan or receipt is a miss; where
        the store cannot be written they stay, and the problem says so. `on_file` is called after each file.
        """
        verifier = Verifier(self._objects, self._blobs, on_file)
        if digest is not None:
            verifier.check_artifact(self._resolve(digest))
        else:
            verifier.check_store(self._actions(), self.pins())
        return verifier.problems

    def pin(self, digest_or_prefix: str, note: str = "") -> str:
        """Keep an artifact and all that it was made from, whatever happens to its action; return its digest."""
        digest = self._resolve(digest_or_prefix)
        self._objects.put(f"pins/{digest}.json", record_bytes({"note": note}))
        return digest

    def unpin(self, digest_or_prefix: str) -> str:
        """Take a pin away; return the digest. UnknownArtifact when nothing is pinned under that name."""
        matches = [digest for digest in self.pins() if digest.startswith(digest_or_prefix)]
        if len(matches) != 1:
            raise UnknownArtifact(f"{len(matches)} pinned artifacts begin with {digest_or_prefix!r}; give one digest")
        self._objects.delete(f"pins/{matches[0]}.json")
        return matches[0]

    def pins(self) -> dict[str, str]:
        """Return the note of every pinned artifact, by digest."""
        return read_pins(self._objects)

    def forget(self, name: str) -> str:
        """Take an artifact out of the list: no run finds it any more, and `collect_garbage` may remove its bytes.

        Args:
            name: its digest or prefix; the whole action key for an action whose record is unreadable.

        Returns:
            Its digest, or the action key.

        Raises:
            StoreError: it is pinned.
        """
        actions = self._actions()
        if name in actions and actions[name] is None:
            self._objects.delete(_action_path(name))
            return name
        digest = self._resolve(name)
        if digest in self.pins():
            raise StoreError(f"artifact {digest[:12]} is pinned; `musevl artifacts unpin {digest[:12]}` first")
        for action_key, found in actions.items():
            if found == digest:
                self._objects.delete(_action_path(action_key))
        return digest

    def collect_garbage(self, grace: timedelta, *, delete: bool) -> Collection:
        """Find what neither an action, a pin nor work in progress needs; while one of those is unreadable, no blob.

        Args:
            grace: what is younger stays; longer than any run that may be at work.
            delete: also remove it.

        Returns:
            What was found or, where `delete`, removed.

        Raises:
            StoreError: the store cannot be listed or read; nothing more is removed.
        """
        cutoff = (datetime.now(UTC) - grace).timestamp()

        def look() -> Collection:
            return find_garbage(self._objects, self._actions(), self.pins(), self._read_manifest, cutoff)

        return remove(self._objects, look(), look, cutoff) if delete else look()

    # Work in progress

    def work(self, action_key: str) -> Work:
        """Return the work in progress on an action: its plan, receipts, marks and checkpoints."""
        return Work(self._objects, self._blobs, action_key)

    @contextmanager
    def scratch_dir(self) -> Iterator[Path]:
        """Yield a private local scratch folder (in MUSEVL_SCRATCH if set), removed at the end."""
        with scratch_folder("musevl-scratch-") as folder:
            yield folder

    # Provenance

    def record_run(self, run: dict[str, Any]) -> str:
        """Put a run on record (JSON: who, what, when, how long); return its id, which begins with the UTC time."""
        run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex}"
        self._objects.create(f"runs/{run_id}.json", record_bytes(run | {"id": run_id}))
        return run_id

    def runs(self, limit: int | None = None) -> list[dict[str, Any]]:
        """Return the run records, newest first, each with its `id`; at most `limit` of them.

        One that is damaged is left out, with a warning that names it: it is nobody's input.
        """
        return read_runs(self._objects, limit)

    # Within

    def _action_digest(self, key: str) -> str | None:
        """Return the digest that an action stands for, None when the action is absent or unreadable."""
        try:
            return self._read_action(key)
        except ObjectMissing:
            return None

    def _read_action(self, key: str) -> str | None:
        """Return the digest that an action stands for, None when it is unreadable; ObjectMissing when it is absent."""
        try:
            return action_digest(read_record(self._objects, key))
        except (ValueError, DamagedObject) as error:
            logger.warning("ignored the action record %s: %s", key, error)
            return None

    def _actions(self) -> dict[str, str | None]:
        """Return the digest that each action stands for, by action key, None where its record is unreadable."""

        def read(key: str) -> tuple[str, str | None] | None:
            try:
                return key.removeprefix("actions/").removesuffix(".json"), self._read_action(key)
            except ObjectMissing:
                return None  # forgotten since it was listed

        found = self._objects.map(read, self._objects.list("actions/"))
        return dict(action for action in found if action is not None)

    def _read_manifest(self, digest: str) -> Manifest:
        data = self._objects.read(blob_key(digest))
        if sha256_bytes(data) != digest:
            raise DamagedObject(
                f"the manifest {digest} in the store {self.uri} is damaged; run `musevl artifacts verify`"
            )
        return Manifest.from_bytes(data)

    def _intact(self, digest: str) -> Manifest | None:
        try:
            manifest = self._read_manifest(digest)
        except (ObjectMissing, DamagedObject) as error:
            logger.warning("artifact %s is not usable: %s", digest, error)
            return None
        if missing := self._blobs.missing(manifest.files):
            logger.warning("artifact %s lacks %d files, first %s", digest, len(missing), missing[0].path)
            return None
        return manifest

    def _resolve(self, prefix: str) -> str:
        if len(prefix) < 6 or not set(prefix) <= set("0123456789abcdef") or len(prefix) > 64:
            raise UnknownArtifact(f"{prefix!r} is no artifact digest; give at least 6 of its hexadecimal digits")
        if is_sha256(prefix) and self._objects.size(blob_key(prefix)) is not None:
            return prefix
        digests = self._actions().values()
        matches = sorted({digest for digest in digests if digest is not None and digest.startswith(prefix)})
        if not matches:
            raise UnknownArtifact(
                f"no artifact in {self.uri} begins with {prefix!r}; list what there is with artifacts()"
            )
        if len(matches) > 1:
            raise AmbiguousDigest(
                f"{len(matches)} artifacts begin with {prefix!r}: {', '.join(matches)}; give more digits"
            )
        return matches[0]


def _reopen(uri: str, cache_dir: Path | None, endpoint_url: str | None) -> Store:
    # A worker's store is the one that its driver has opened, and checked, for what it does
    return Store(uri, cache_dir=cache_dir, endpoint_url=endpoint_url, access="read")


def _action_path(action_key: str) -> str:
    return f"actions/{checked_name(action_key, 'action key')}.json"
