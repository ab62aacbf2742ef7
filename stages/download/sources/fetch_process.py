"""The child process that fetches the URLs of one shard: img2dataset's downloader over our guarded HTTP.

``python -m stages.download.sources.fetch_process JOB.json``; `stages.download.sources.url_list` writes the job. In a
child process, data from untrusted servers cannot exhaust the memory of the stage, and a crash loses none of its work.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

from stages.download.sources.guarded_http import Guard, GuardedOpener

COLUMNS = ["url", "row"]
"""Columns of the list that img2dataset reads; `row` identifies the answers, which arrive in any order."""
SHARD = "0"
"""Images are written to SHARD/KEY.jpg, whatever their format, and the result of each row to SHARD.parquet."""


UNUSED_LIBRARIES = ("albumentations", "wandb", "webdataset")
"""Libraries that img2dataset imports for features that are switched off here: resizing, online logging, tar files. With
PyTorch and pandas, which they import, they take nine seconds of CPU and 300 MB in the process of every shard."""

_LOOK_EVERY_S = 1.0


def end_with(parent: int) -> None:
    """End this process soon after its parent has ended, because a parent that is killed cannot end it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def import_only_what_is_used() -> None:
    """Make the modules of img2dataset importable without its command line and without `UNUSED_LIBRARIES`."""
    for name in UNUSED_LIBRARIES:
        sys.modules[name] = ModuleType(name)  # empty, so that any use of it raises AttributeError
    spec = importlib.util.find_spec("img2dataset")
    assert spec is not None
    sys.modules["img2dataset"] = importlib.util.module_from_spec(spec)  # not executed: it imports the command line
    sys.meta_path.insert(0, _WithoutPandas())


class _WithoutPandas(importlib.abc.MetaPathFinder):
    """Makes pandas unavailable, which pyarrow imports only if it can."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError("nothing in this process needs pandas", name=fullname)


def run(job: dict[str, Any]) -> bool:
    """Fetch all URLs of a job; return whether the whole list was processed."""
    guard = {name: tuple(value) if isinstance(value, list) else value for name, value in job["guard"].items()}
    urllib.request.install_opener(GuardedOpener(Guard(**guard)))  # type: ignore[arg-type]  # only `open` is used
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import FilesSampleWriter

    download = Downloader(
        sample_writer_class=FilesSampleWriter,
        resizer=Resizer(image_size=1, resize_mode="no", resize_only_if_bigger=False, disable_all_reencoding=True),
        thread_count=job["threads"],
        save_caption=False,
        extract_exif=False,
        output_folder=job["output_folder"],
        column_list=COLUMNS,
        timeout=guard["timeout_s"],
        number_sample_per_shard=job["num_urls"],
        oom_shard_count=1,
        compute_hash=None,
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,  # the opener decides which failures are retried
        user_agent_token=job["user_agent_token"] or None,
        disallowed_header_directives=job["opt_out_directives"] or None,
    )
    complete, _ = download((0, job["list"]))
    return bool(complete)


def main() -> int:
    """Read the job, process it and return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the stage ends this one
    import_only_what_is_used()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    end_with(job["parent"])
    return 0 if run(job) else 1


if __name__ == "__main__":
    raise SystemExit(main())
