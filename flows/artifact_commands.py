"""The commands `musevl artifacts ...`."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from flows.options import DigestArgument, StoreOption, open_store
from flows.text import byte_bar, megabytes, one_line, text_table
from infra.terminal import say
from stages.pipeline.command import DEFAULT_STORE

artifacts_app = typer.Typer(help="What the store holds.", no_args_is_help=True)


@artifacts_app.command("ls")
def artifacts_ls(store: StoreOption = DEFAULT_STORE) -> None:
    """List the artifacts."""
    opened = open_store(store)
    pins = opened.pins()
    rows = [
        [
            a.digest[:12], a.stage, a.kind, str(a.num_files), megabytes(a.size), a.action_key[:12],
            "pinned" if a.digest in pins else "",
        ]
        for a in opened.artifacts()
    ]  # fmt: skip
    say(text_table(["artifact", "stage", "kind", "files", "size", "action", ""], rows))


@artifacts_app.command("show")
def artifacts_show(artifact: DigestArgument, store: StoreOption = DEFAULT_STORE) -> None:
    """Print the manifest of an artifact as JSON."""
    manifest = open_store(store).load(artifact)
    say(json.dumps({"digest": manifest.digest, **manifest.to_json()}, indent=2))


@artifacts_app.command("export")
def artifacts_export(
    artifact: DigestArgument,
    folder: Annotated[Path, typer.Argument(help="Where to; made if needed, files of the same names are replaced.")],
    only: Annotated[str, typer.Option(help="Only this folder of the artifact, for example model or codes.")] = "",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Copy an artifact's files out of the store, under their names in the artifact, each one checked."""
    opened = open_store(store)
    manifest = opened.load(artifact)
    files = manifest.files_under(only)
    if not files:
        folders = ", ".join(sorted({entry.path.split("/")[0] for entry in manifest.files}))
        raise ValueError(f"artifact {manifest.digest[:12]} has no folder {only!r}; it has {folders}")
    with byte_bar("copied", sum(entry.size for entry in files)) as on_file:
        opened.materialise(manifest, folder, only, on_file)
    say(f"{len(files)} files in {folder}")


@artifacts_app.command("verify")
def artifacts_verify(
    artifact: Annotated[str | None, typer.Argument(metavar="ARTIFACT", help="Only this one (default: all).")] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Read every byte again; damaged files are set aside, and the next run rebuilds them. Exit code 1 on damage."""
    opened = open_store(store)
    sizes = [found.size for found in opened.artifacts() if found.digest.startswith(artifact or "")]
    with byte_bar("checked", sum(sizes)) as on_file:
        problems = opened.verify(artifact, on_file)
    for problem in problems:
        say(one_line(f"{problem.digest[:12] or 'record'}  {problem.path}: {problem.reason}"))
    if problems:
        say(f"{len(problems)} problems; the next run of these stages rebuilds what is missing", file=sys.stderr)
        raise typer.Exit(1)
    say("all files are intact")


@artifacts_app.command("lineage")
def artifacts_lineage(artifact: DigestArgument, store: StoreOption = DEFAULT_STORE) -> None:
    """Print what an artifact was made from, and what that was made from, as a tree."""
    from flows.artifacts import lineage_text

    say(lineage_text(open_store(store), artifact))


@artifacts_app.command("diff")
def artifacts_diff(
    first: DigestArgument,
    second: Annotated[str, typer.Argument(metavar="OTHER", help="Digest, or its first 6 or more digits.")],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Say how two artifacts differ: settings, inputs, files, metrics. Exit code 1 where they do."""
    from flows.artifacts import diff_text

    opened = open_store(store)
    found = diff_text(opened.load(first), opened.load(second))
    say(found or "no difference")
    if found:
        raise typer.Exit(1)


@artifacts_app.command("pin")
def artifacts_pin(
    artifact: DigestArgument,
    note: Annotated[str, typer.Option(help="Why it is kept.")] = "",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Keep an artifact and all that it was made from: gc leaves them alone, forget refuses."""
    say(f"pinned {open_store(store, 'write').pin(artifact, note)}")


@artifacts_app.command("unpin")
def artifacts_unpin(artifact: DigestArgument, store: StoreOption = DEFAULT_STORE) -> None:
    """Take a pin away."""
    say(f"unpinned {open_store(store, 'write').unpin(artifact)}")


@artifacts_app.command("forget")
def artifacts_forget(artifact: DigestArgument, store: StoreOption = DEFAULT_STORE) -> None:
    """Take an artifact out of the list; gc may then remove its bytes, and its stage runs again.

    An action whose record is unreadable is named by its key.
    """
    say(f"forgot {open_store(store, 'write').forget(artifact)}; `musevl artifacts gc` shows what this frees")


@artifacts_app.command("gc")
def artifacts_gc(
    store: StoreOption = DEFAULT_STORE,
    grace_days: Annotated[
        float,
        typer.Option(min=0, max=36500, help="Keep what is younger; longer than any run that is at work."),
    ] = 7.0,
    delete: Annotated[bool, typer.Option("--delete", help="Delete it. Without, only say what would go.")] = False,
) -> None:
    """Find what no artifact, pin or work in progress needs: orphans, abandoned work, damaged and unfinished files.

    Exit code 1 where damage keeps it from telling what is needed: then it leaves all blobs alone.
    """
    from flows.artifacts import garbage_text

    found = open_store(store, "write" if delete else "read").collect_garbage(timedelta(days=grace_days), delete=delete)
    say(garbage_text(found, deleted=delete))
    if found.unreadable:
        raise typer.Exit(1)
