"""The command line of a single stage, `python -m stages.NAME --recipe mini`, which is what `ray job submit` runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from infra.interrupts import GOES_ON, end_on_signals
from infra.malloc import reexec_with_fast_malloc
from infra.terminal import say
from stages.pipeline.errors import USER_ERRORS, report
from stages.pipeline.recipe_files import check_stage_name, recipe_values
from stages.runtime.process import prepare_process

if TYPE_CHECKING:
    from infra.executors import ExecutorName
    from stages.pipeline.execution import StageResult

DEFAULT_STORE = ".musevl/store"
STORE_VARIABLE = "MUSEVL_STORE"


def default_store() -> str:
    """Return the default store of commands: MUSEVL_STORE, else a folder below the current one."""
    return os.environ.get(STORE_VARIABLE) or DEFAULT_STORE


def run_standalone(name: str, argv: Sequence[str] | None = None) -> int:
    """Parse a stage module's command line, run the stage and print one line about it.

    Args:
        name: name of the stage.
        argv: arguments; by default those of the process, which is then re-executed with the faster allocator.

    Returns:
        The exit code: 0, or 2 after an error message of one line on stderr.
    """
    if argv is None:
        reexec_with_fast_malloc()
        end_on_signals(GOES_ON)
    parser = _Parser(
        prog=f"python -m stages.{name}",
        description=f"Run the stage {name} of a recipe; its inputs are found in the store.",
    )
    parser.add_argument("--recipe", default="mini", help="name of a recipe, or path of a YAML file (default: mini)")
    parser.add_argument("--store", default=default_store(), help="folder or s3://bucket/prefix (default: %(default)s)")
    parser.add_argument("--executor", choices=("ray", "local"), default="ray", help="where mapped work runs")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override a field")
    try:
        arguments = parser.parse_args(argv)
        result = run_one_stage(name, arguments.recipe, arguments.store, arguments.executor, arguments.set)
    except USER_ERRORS as error:
        return report(error)
    say(result_line(result))
    return 0


class _Parser(argparse.ArgumentParser):
    """Raises an error with a message of one line, as every command does."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def run_one_stage(
    name: str, recipe: str, store_uri: str, executor_name: ExecutorName, overrides: Sequence[str] = ()
) -> StageResult:
    """Open the recipe, the store and the executor, and run one stage with them.

    Raises:
        ValueError, OSError, StoreError: the input is wrong; the message is meant for the user.
    """
    check_stage_name(name)
    recipe_values(recipe, list(overrides))  # checked before imports that take seconds
    prepare_process()
    # Imported here to keep this module light
    from infra.executors import build_executor
    from stages.pipeline.execution import check_ready, run_stage
    from stages.pipeline.recipe import load_recipe
    from storage.store import Store

    loaded = load_recipe(recipe, list(overrides))
    store = Store(store_uri)
    executor = build_executor(executor_name)
    try:
        check_ready(loaded, store, executor, [name])
        return run_stage(name, loaded, store, executor)
    finally:
        executor.close()


def result_line(result: StageResult) -> str:
    """Format the result of a stage: its name, whether it was found or made, the digest and the seconds."""
    return f"{result.stage}  {'hit' if result.hit else 'made'}  {result.digest}  {result.seconds:.1f} s"
