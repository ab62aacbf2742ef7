"""Source of a URL list, whose images img2dataset fetches in a child process."""

from __future__ import annotations

import json
import logging
import os
import re
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
from pydantic import AfterValidator, NonNegativeInt

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
"""Number of attempts to fetch a shard before the death of its process is an error; a single one may be chance."""
_ROOT = Path(__file__).resolve().parents[3]


def _host_and_port(text: str) -> str:
    if not re.fullmatch(r"[^\s/]+:\d{1,5}", text):
        raise ValueError("input should be a host and its port, for example mirror.local:8080")
    return text


HostPort = Annotated[str, AfterValidator(_host_and_port)]


class HttpConfig(Config):
    """Rate limits and safety of HTTP requests to the hosts of a URL list."""

    connections_per_host: RuntimeInt = 8
    """Largest number of concurrent connections of one worker to one host."""
    max_redirects: Annotated[NonNegativeInt, DoesNotAffectResult] = 5
    """Largest number of redirects of a URL, which ends redirect loops too."""
    max_retry_after_s: RuntimeFloat = 60.0
    """Longest wait before a retry that a host may ask for (`Retry-After` of a 429 or 503), in seconds."""
    allow_private_addresses: bool = False
    """Whether to connect to private and loopback addresses, and to read `file:` URLs. An untrusted list must not reach
    what only this machine or its network can access."""
    private_hosts: tuple[HostPort, ...] = ()
    """Hosts as `name:port` that are permitted although their addresses are not public, such as a mirror of your own."""
    opt_out_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """Directives of the X-Robots-Tag header with which an image is not used."""
    user_agent_token: str = "musevl"
    """Name of this program in the User-Agent of requests and in opt-out headers; '' for none."""


@dataclass(frozen=True)
class UrlList:
    """Source with the rows of a list whose images are fetched over HTTP.

    Raises:
        ValueError: as described in `Source`.
    """

    path: str
    """`sample`, or the path of a list: a file, a folder or a pattern, local or s3://."""
    url_column: str
    http: HttpConfig
    guard: Guard
    threads: int
    """Largest number of concurrent connections."""
    tsv_quotes: bool = False
    """Whether double quotes enclose values in lists separated by tabs."""

    @property
    def what(self) -> str:
        """Name of the source in messages."""
        return self._list.what

    @property
    def _list(self) -> RowList:
        path = str(SAMPLE_LIST) if self.path == SAMPLE else self.path
        return RowList(path, "URL list", "download.url_list", _EXPECTED, tsv_quotes=self.tsv_quotes)

    def content(self) -> dict[str, str]:
        """Return the digest of the list's content, which does not depend on its path."""
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
        """Fetch URLs in a child process, and return the folder with the results.

        Raises:
            ChildProcessError: the process died `_TRIES` times.
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
            "memory, lower download.connections_per_worker, .num_workers or .max_bytes; else look at these URLs. The "
            "same command continues from there: finished shards are kept"
        )

    def _try(self, urls: list[str], guard: Guard, scratch: Path) -> str:
        """Fetch into an empty folder; return what went wrong with the process, or ''."""
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
            env=os.environ | {"PYTHONPATH": _python_path()},
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
