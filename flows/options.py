"""Arguments and options that several commands of `musevl` share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stages.pipeline.command import STORE_VARIABLE

if TYPE_CHECKING:
    from storage.store import Access, Store

RecipeOption = Annotated[str, typer.Option("--recipe", help="Name of a recipe, or path of a YAML file.")]
StoreOption = Annotated[
    str, typer.Option("--store", envvar=STORE_VARIABLE, help="Folder, or s3://bucket/prefix.", show_default=True)
]
ExecutorOption = Annotated[
    Literal["ray", "local"], typer.Option("--executor", help="Where mapped work runs: Ray actors, or this process.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override a field; repeatable.")
]
RetryOption = Annotated[
    bool, typer.Option("--retry-failed", help="Fetch again what failed in the download so far; the rest is kept.")
]
DigestArgument = Annotated[str, typer.Argument(metavar="ARTIFACT", help="Digest, or its first 6 or more digits.")]


def open_store(uri: str, access: Access = "read") -> Store:
    """Open a store that must exist; reading needs no write permission."""
    from storage.store import Store

    return Store(uri, access=access)
