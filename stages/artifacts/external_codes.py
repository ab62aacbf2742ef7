"""Codes of another project's tokenizer, which can be compared without its code or weights.

A folder of Parquet files in the layout of `storage.code_table` (columns `key` and `codes`, the rest in the schema's
metadata) replaces tokenizer training and encoding. Its rows are joined with the recipe's own download by key, so
captions, categories and splits are the same as for every other tokenizer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from models.transforms import TransformConfig
from stages.artifacts.images import table_columns
from stages.artifacts.rows import ORIGINAL, VIEW, image_key
from stages.artifacts.shards import IMAGES, codes_file, shard_of
from stages.protocol import Outcome, StageContext
from storage.code_table import CodeTableInfo, code_files, read_code_table, write_code_shard
from storage.digests import digest_of, sha256_file
from storage.image_shards import read_image_shard
from storage.manifest import FileEntry

KIND = "external_codes"
"""Kind of the artifact that takes the place of a tokenizer artifact."""
_FOLDER, _FIELD = "given", "tokenizer.codes"


def content_of(folder: str) -> dict[str, str]:
    """Return the digest of a folder of codes for the action key."""
    return {"codes": digest_of([sha256_file(path) for path in code_files(folder, _FIELD)])}


def keep(context: StageContext[Any]) -> Outcome:
    """Replace tokenizer training: check the given files and store them as an artifact.

    Raises:
        ValueError: the files are no code table, their transform is not one of ours, or a position has several codes.
    """
    paths = code_files(context.config.codes, _FIELD)
    info = read_code_table(paths).info
    TransformConfig(**info.transform)
    if info.code_shape[:2] != (1, 1):
        raise ValueError(
            f"tokenizer.codes={context.config.codes!r} has {info.code_shape[0]} books of depth {info.code_shape[1]}; a "
            f"language model reads several codes per position by their vectors, which a code table does not hold"
        )
    files = [context.store.put_file(path, f"{_FOLDER}/{number:05d}.parquet") for number, path in enumerate(paths)]
    metadata = {"code_shape": list(info.code_shape), "made_by": info.tokenizer_digest}
    return Outcome(KIND, files, metadata=metadata)


def join(context: StageContext[Any]) -> Outcome:
    """Replace encoding: write the given rows as a code table of the recipe's images, shard by shard.

    Raises:
        ValueError: an image of the download has no codes, or the config has a setting that needs images.
    """
    if context.config.min_caption_match is not None:
        raise ValueError(
            f"tokenize.min_caption_match={context.config.min_caption_match} does nothing for codes of another project; "
            "take it out, and leave the images out of the download"
        )
    store, download, given = context.store, context.inputs["download"], context.inputs["train_tokenizer"]
    table = read_code_table([store.fetch(entry) for entry in given.files_under(_FOLDER)])
    views = [view or ORIGINAL for view in table.columns.get(VIEW) or [None] * len(table.keys)]
    rows_of: dict[str, list[int]] = {}
    for row, (key, view) in enumerate(zip(table.keys, views, strict=True)):
        rows_of.setdefault(image_key(key, view), []).append(row)
    info = CodeTableInfo(
        code_shape=table.info.code_shape,
        codebook_names=table.info.codebook_names,
        codebook_sizes=table.info.codebook_sizes,
        tokenizer_digest=given.digest,
        transform=table.info.transform,
    )
    files: list[FileEntry] = []
    count = 0
    for entry in download.files_under(IMAGES):
        samples = list(read_image_shard(store.fetch(entry)))
        if missing := [sample.key for sample in samples if sample.key not in rows_of]:
            raise ValueError(
                f"{len(missing)} of {len(samples)} images of shard {shard_of(entry)} have no codes, first key "
                f"{missing[0]!r}; make codes for every image of the download, by the keys of its metadata tables"
            )
        chosen = [(sample, row) for sample in samples for row in rows_of[sample.key]]
        if not chosen:
            continue  # the shard has no image
        columns = [table_columns(sample, str(views[row])) for sample, row in chosen]
        path = context.scratch / "codes.parquet"
        write_code_shard(
            path,
            info,
            [table.keys[row] for _, row in chosen],
            {name: [row[name] for row in columns] for name in columns[0]},
            np.stack([table.codes[row] for _, row in chosen]),
        )
        files.append(store.put_file(path, codes_file(shard_of(entry))))
        count += len(chosen)
    metadata = {"tokenizer": given.digest, "code_shape": list(info.code_shape)}
    return Outcome("code_table", files, metrics={"num_rows": count}, metadata=metadata)
