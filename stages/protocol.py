"""The interface of a stage: a function of a config and input artifacts, which the store makes restartable.

The action key decides whether a result exists already. It is the digest of everything that determines the bytes of the
result, and of nothing else: stage, code version, config, input digests and seed; never a path, a host, or a number of
workers that does not affect the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, NonNegativeFloat, PositiveInt

from infra.executors import Executor
from models.config import Config, CountsByContent, Fraction
from storage.digests import digest_of, sha256_file
from storage.input_files import InputFiles
from storage.manifest import FileEntry, Manifest
from storage.store import Store


class DoesNotAffectResult:
    """Marks a config field that affects how a stage runs but not its result, so it does not enter the action key."""


def _share_or_whole(gpus: float) -> float:
    if gpus > 1 and not gpus.is_integer():
        raise ValueError("input should be a share of one GPU, 0 to 1, or a whole number of them")
    return gpus


RuntimeInt = Annotated[PositiveInt, DoesNotAffectResult]
RuntimeFloat = Annotated[NonNegativeFloat, DoesNotAffectResult]
RuntimeFraction = Annotated[Fraction, DoesNotAffectResult]
RuntimeBool = Annotated[bool, DoesNotAffectResult]
RuntimeStr = Annotated[str, DoesNotAffectResult]
GpuShare = Annotated[NonNegativeFloat, AfterValidator(_share_or_whole), DoesNotAffectResult]
Device = Annotated[Literal["auto", "cpu", "cuda"], DoesNotAffectResult]

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Outcome:
    """The result of a stage, from which `run_stage` builds a manifest."""

    kind: str
    """Kind of the artifact, for example `code_table`."""
    files: list[FileEntry]
    """The files of the result, which are in the store already."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Metrics of the result, as JSON."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Whatever else readers need, as JSON; never times, hosts or paths."""
    schema_version: int = 1
    """Version of the layout of this kind of artifact."""


@dataclass(frozen=True)
class StageContext(Generic[C]):
    """Everything that the `run` function of a stage may use."""

    config: C
    seed: int
    inputs: dict[str, Manifest]
    """Input artifacts by the name of the stage that made them."""
    store: Store
    action_key: str
    """Key of this stage's plan, receipts and checkpoints in the store."""
    executor: Executor
    scratch: Path
    """Private local folder, which is removed at the end."""


@dataclass(frozen=True)
class Stage(Generic[C]):
    """One step of the pipeline."""

    name: str
    """Name of the stage, as in `python -m stages.NAME`."""
    section: str
    """Name of the recipe's section with its config."""
    inputs: tuple[str, ...]
    """Names of the stages whose artifacts are its inputs."""
    run: Callable[[StageContext[C]], Outcome]
    version: int = 1
    """Version of the code; raise it if a change of the code changes results, so that old artifacts are not reused."""
    external_inputs: Callable[[C], dict[str, str]] | None = None
    """Returns digests of what the config names outside the store (such as a URL list's content) by name, for the
    key."""
    unused_inputs: Callable[[C], tuple[str, ...]] | None = None
    """Returns those of `inputs` that a config does not use: they need not exist, and do not enter the key."""

    def feeders(self, config: C) -> tuple[str, ...]:
        """Return the names of the stages whose artifacts are inputs with a config."""
        unused = self.unused_inputs(config) if self.unused_inputs else ()
        return tuple(name for name in self.inputs if name not in unused)

    def action_key(self, config: C, seed: int, inputs: dict[str, str]) -> str:
        """Return the action key of this stage's result.

        Args:
            config: config of this stage.
            seed: seed of the recipe.
            inputs: digest of each input artifact by stage name.
        """
        external = self.external_inputs(config) if self.external_inputs else {}
        return digest_of(
            {
                "stage": self.name,
                "version": self.version,
                "config": normalised_config(config),
                "inputs": inputs,
                "external_inputs": external,
                "seed": seed,
            }
        )


def normalised_config(config: Config) -> dict[str, Any]:
    """Return the config as JSON without fields that do not affect the result, and with digests in place of paths.

    Raises:
        OSError: a file whose content enters the key cannot be read.
    """
    values: dict[str, Any] = {}
    dumped = config.model_dump(mode="json")
    for name, info in type(config).model_fields.items():
        if DoesNotAffectResult in info.metadata:
            continue
        value = getattr(config, name)
        values[name] = normalised_config(value) if isinstance(value, Config) else dumped[name]
        marks = [mark for mark in info.metadata if isinstance(mark, CountsByContent)]
        if marks and isinstance(value, str):
            values[name] = _content(marks[0].path(value), name) or value
    return values


def _content(path: str | None, what: str) -> str | None:
    """Return the digest of a file or folder, or None if there is none, as for a hub's name."""
    if not path or not Path(path).exists():
        return None
    return f"sha256:{InputFiles(path, what).digest() if Path(path).is_dir() else sha256_file(path)}"
