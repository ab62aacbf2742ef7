"""Download with a decoder that some images bring down, as a child process.

TEST_POISON=SHA256,... python -m tests.helpers.poison_download RECIPE STORE EXECUTOR [SECTION.FIELD=VALUE ...]
"""

from __future__ import annotations

import os
import signal
import sys

from stages.download import shard as download_shard
from stages.download.image_facts import ImageFacts, Inspector
from stages.download.sources.source import Failure
from stages.pipeline.command import run_one_stage
from storage.digests import sha256_bytes


class PoisonableInspector(Inspector):
    """Segfaults on images with the digests in TEST_POISON, which child processes inherit."""

    def __call__(self, data: bytes) -> ImageFacts | Failure:
        if sha256_bytes(data) in os.environ["TEST_POISON"].split(","):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().__call__(data)


def main() -> None:
    recipe, store, executor, *overrides = sys.argv[1:]
    download_shard.Inspector = PoisonableInspector  # type: ignore[misc]
    run_one_stage("download", recipe, store, executor, overrides)  # type: ignore[arg-type]


if __name__ == "__main__":
    from tests.helpers import poison_download

    poison_download.main()  # under its own name, so that what it pickles can be found
