"""One image, from its URL to a picture that the model draws: the pipeline in the order in which it happens.

Read this first. Each step is a stage's own function on data of one size that a person can follow; the tests in
`tests/stages` run the same stages as processes and kill them.
"""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from models.transforms import normalise, to_pixels
from stages.artifacts.codes import load_rows
from stages.artifacts.images import ImageSource
from stages.artifacts.models import load_tokenizer
from stages.language.training import load_vlm
from stages.pipeline.assistant import Assistant
from stages.runtime.devices import autocast
from tests.helpers.tiny import TinyRun


def test_one_image_from_url_to_drawing(tiny_run: TinyRun) -> None:
    store, recipe = tiny_run.store, tiny_run.recipe
    artifacts = {name: result.manifest for name, result in tiny_run.results.items()}

    # A URL became a row of metadata and an image in a tar.
    metadata = pq.read_table(store.fetch(artifacts["download"].file("metadata/00000.parquet"))).to_pylist()
    row = next(row for row in metadata if row["split"] == "train")
    assert row["url"].startswith("sample://emoji/")
    assert row["status"] == "ok" and row["concept"] in row["caption"]
    source = ImageSource(store, artifacts["download"], recipe.tokenizer.transform, split="train")
    position = source.keys.index(row["key"])
    encoded = source.raw(position)
    assert len(encoded) == row["bytes"]
    assert Image.open(io.BytesIO(encoded)).size == (64, 64) == (row["width"], row["height"])

    # The tokenizer sees it as a square tensor and writes it as a grid of codes.
    tokenizer = load_tokenizer(store, artifacts["train_tokenizer"].digest)
    pixels = source.pixels([position])  # [1, 3, H, W] uint8
    size = recipe.tokenizer.transform.image_size
    assert pixels.shape == (1, 3, size, size)
    with torch.no_grad(), autocast(torch.device("cpu"), artifacts["tokenize"].config["precision"]):
        codes = tokenizer.encode(normalise(pixels))  # [1, N, D, h, w]
    assert codes.shape == (1, *tokenizer.code_shape)

    # The code table holds the same codes under the same key, with the digest of the tokenizer that made them.
    rows = load_rows(store, artifacts["tokenize"], split="train", views=False)
    assert rows.info.tokenizer_digest == artifacts["train_tokenizer"].digest
    stored = rows.codes[rows.keys.index(row["key"])]
    agreement = float((stored == codes[0]).float().mean())
    assert agreement > 0.9, "the same image in another batch may differ in a last bit, and so in a code, now and then"

    # Codes are drawn as an image again.
    with torch.no_grad():
        drawn = to_pixels(tokenizer.decode(stored[None].long()))
    assert drawn.shape == pixels.shape

    # In the language model's vocabulary a code is a token, between two markers.
    vlm, builder = load_vlm(store, artifacts["sft"])
    vocabulary = builder.vocabulary
    image_tokens = builder.image(stored)
    assert image_tokens[0] == vocabulary.soi and image_tokens[-1] == vocabulary.eoi
    back = vocabulary.codes(torch.tensor(image_tokens[1:-1])).view(tokenizer.grid)
    assert torch.equal(back, stored[0, 0].long())
    assert vlm.llm.get_output_embeddings().weight.shape[0] == vocabulary.size

    # It answers a question about the image, and draws one from words.
    assistant = Assistant(recipe, store)
    assert isinstance(assistant.ask(encoded, recipe.evaluate.question), str)
    (drawing,) = assistant.draw(f"Draw {row['caption']}.", seed=1)
    assert drawing.size == (size, size)
    (again,) = assistant.draw(f"Draw {row['caption']}.", seed=1)
    assert np.array_equal(np.asarray(drawing), np.asarray(again)), "a seed means a picture"
