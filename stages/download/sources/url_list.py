"""URL lists, fetched by img2dataset in a process of its own."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import NonNegativeInt

from infra.sample_data.server import SAMPLE_LIST, SampleServer
from models.config import Config
from stages.download.sources.failures import read_failure
from stages.download.sources.fetch_process import COLUMNS, SHARD
from stages.download.sources.guarded_http import Guard
from stages.download.sources.lists import EXPECTED, RowList, Sought
from stages.download.sources.source import PLACE, URL, Fetched, Row
from stages.protocol import DoesNotAffectResult, RuntimeFloat, RuntimeInt

logger = logging.getLogger(__name__)

SAMPLE = "sample"
_EXPECTED = f"{EXPECTED}, or `{SAMPLE}`"
_SAMPLE_SCHEME = "sample://"
_TRIES = 2
"""How often a shard is fetched before the death of its process counts; what struck once may have been chance."""
_ROOT = Path(__file__).resolve().parents[3]


class HttpConfig(Config):
    """Manners and safety of fetching from hosts that a list names."""

    connections_per_host: RuntimeInt = 8
    """Most connections at a time from one worker to one host."""
    max_redirects: Annotated[NonNegativeInt, DoesNotAffectResult] = 5
    """Redirects that are followed; a loop ends there too."""
    max_retry_after_s: RuntimeFloat = 60.0
    """Longest wait that a host may ask for (`Retry-After` of a 429 or 503) before it is tried again, seconds."""
    allow_private_addresses: bool = False
    """Connect to addresses of private networks and loopback, and read `file:` URLs. A list from elsewhere must not
    reach what only this machine or its network sees."""
    private_hosts: tuple[str, ...] = ()
    """Hosts as `name:port` that may be connected to although their address is not public: a mirror of one's own."""
    opt_out_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """Images whose X-Robots-Tag header has one of these are not used."""
    user_agent_token: str = "musevl"
    """Name that requests and opt-out headers know us by; '' for none."""


@dataclass(frozen=True)
class UrlList:
    """The rows of a list whose images are fetched over HTTP.

    Raises:
        ValueError: as `Source` says.
    """

    path: str
    """`sample`, or a list: a file, a folder or a pattern, local or s3://."""
    url_column: str
    http: HttpConfig
    guard: Guard
    threads: int
    """Connections at a time."""
    tsv_quotes: bool = False
    """Whether double quotes enclose values where tabs separate them."""

    @property
    def what(self) -> str:
        """How messages name it."""
        return self._list.what

    @property
    def _list(self) -> RowList:
        path = str(SAMPLE_LIST) if self.path == SAMPLE else self.path
        return RowList(path, "URL list", "download.url_list", _EXPECTED, tsv_quotes=self.tsv_quotes)

    def content(self) -> dict[str, str]:
        """The list counts by its content, not by its path."""
        return {"url_list": self._list.digest()}

    def rows(self, columns: Sequence[str]) -> pa.Table:
        sought = Sought(self.url_column, "set download.url_column to the one with the URLs")
        table = self._list.read(sought, columns)
        urls = pc.utf8_trim_whitespace(table[self.url_column])
        places = pa.array([""] * table.num_rows, pa.string())
        return pa.table({name: table[name] for name in columns} | {URL: urls, PLACE: places})

    def fetch(self, rows: list[Row], scratch: Path) -> Iterator[tuple[int, Fetched]]:
        with ExitStack() as stack:
            urls, guard = [row[URL] for row in rows], self.guard
            if any(url.startswith(_SAMPLE_SCHEME) for url in urls):
                server = stack.enter_context(SampleServer())
                urls = [server.resolve(url) for url in urls]
                guard = replace(guard, trusted=(server.base_url.removeprefix("http://"),))
            folder = self._run(urls, guard, scratch)
        for batch in pq.ParquetFile(folder / f"{SHARD}.parquet").iter_batches():
            for answer in batch.to_pylist():
                yield int(answer["row"]), _result(answer, folder)

    def _run(self, urls: list[str], guard: Guard, scratch: Path) -> Path:
        """The folder with what a process of its own fetched.

        Raises:
            ChildProcessError: the process died of these URLs twice.
        """
        for number in range(_TRIES):
            folder = scratch / str(number)
            folder.mkdir()
            problem = self._try(urls, guard, folder)
            if not problem:
                return folder
            logger.warning("the process that fetched %d URLs %s", len(urls), problem)
            shutil.rmtree(folder)
        raise ChildProcessError(
            f"the process that fetched its {len(urls)} URLs {problem} ({_TRIES} times); if the machine ran out of "
            "memory, lower download.threads_per_worker, .num_workers or .max_bytes; else look at these URLs. The same "
            "command goes on from there: finished shards are kept"
        )

    def _try(self, urls: list[str], guard: Guard, scratch: Path) -> str:
        """Fetch into an empty folder; what went wrong with the process, '' where nothing did."""
        listed = pa.table({"url": pa.array(urls, pa.string()), "row": [str(row) for row in range(len(urls))]})
        with pa.ipc.new_file(scratch / "urls.arrow", listed.schema) as writer:
            writer.write_table(listed.select(COLUMNS))
        job = {
            "parent": os.getpid(),
            "list": str(scratch / "urls.arrow"),
            "num_urls": len(urls),
            "output_folder": str(scratch),
            "threads": self.threads,
            "guard": asdict(guard),
            "user_agent_token": self.http.user_agent_token,
            "opt_out_directives": list(self.http.opt_out_directives),
        }
        (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
        ended = subprocess.run(
            [sys.executable, "-m", "stages.download.sources.fetch_process", str(scratch / "job.json")],
            # albumentations, which img2dataset imports, else asks the network for updates
            env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONPATH": _python_path()},
            capture_output=True,
            text=True,
        )
        if ended.returncode == 0:
            return ""
        said = (ended.stderr.strip() or ended.stdout.strip() or "no output").splitlines()[-1]
        return f"ended with exit code {ended.returncode}: {said}"


def _result(answer: Row, scratch: Path) -> Fetched:
    if answer["status"] != "success":
        return read_failure(answer["error_message"])
    return (scratch / SHARD / f"{answer['key']}.jpg").read_bytes()


def _python_path() -> str:
    return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
