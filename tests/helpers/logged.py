"""Tokenize that writes down which shards it encodes, as a child process.

    python -m tests.helpers.logged RECIPE STORE EXECUTOR LOG

Each line of LOG is a shard, and whether its receipt was in the (local) store when the work on it began.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from stages.mapped.engine import Shard
from stages.pipeline.command import run_one_stage
from stages.tokenize import stage as tokenize
from stages.tokenize.worker import EncodedShard, TokenizeWorker, TokenizeWorkerFactory


class LoggedWorker(TokenizeWorker):
    def make(self, shard: Shard, *, isolated: bool) -> EncodedShard:
        receipts = Path(self.store.uri, "receipts").glob(f"*/{shard.shard}.json")
        with open(os.environ["TEST_LOG"], "a") as log:
            log.write(f"{shard.shard} {'again' if list(receipts) else 'first'}\n")
        return super().make(shard, isolated=isolated)


@dataclass(frozen=True)
class LoggedWorkers(TokenizeWorkerFactory):
    def __call__(self) -> LoggedWorker:
        return LoggedWorker(self)


def main() -> None:
    recipe, store, executor, log = sys.argv[1:]
    os.environ["TEST_LOG"] = log
    tokenize.TokenizeWorkerFactory = LoggedWorkers  # type: ignore[misc]
    run_one_stage("tokenize", recipe, store, executor)  # type: ignore[arg-type]


if __name__ == "__main__":
    from tests.helpers import logged

    logged.main()  # under its own name, so that what it pickles can be found
