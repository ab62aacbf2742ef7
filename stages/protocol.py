"""What a stage is: a plain function of a config and input artifacts, made restartable by the store.

The action key decides whether a result exists already. It is the digest of everything that decides the bytes of the
result and of nothing else: stage, code version, config, input digests and seed; never a path, a host, or a number of
workers that changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import NonNegativeFloat, PositiveInt

from infra.executors import Executor
from models.config import Config, CountsByContent, Fraction
from storage.digests import digest_of, sha256_file
from storage.input_files import InputFiles
from storage.manifest import FileEntry, Manifest
from storage.store import Store


class DoesNotAffectResult:
    """Marks a config field that changes how a stage runs but not one byte of its result; it stays out of the key."""


RuntimeInt = Annotated[PositiveInt, DoesNotAffectResult]
RuntimeFloat = Annotated[NonNegativeFloat, DoesNotAffectResult]
RuntimeFraction = Annotated[Fraction, DoesNotAffectResult]
RuntimeBool = Annotated[bool, DoesNotAffectResult]
RuntimeStr = Annotated[str, DoesNotAffectResult]
Device = Annotated[Literal["auto", "cpu", "cuda"], DoesNotAffectResult]

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Outcome:
    """What a stage made; execution turns it into a manifest."""

    kind: str
    """What the files are, for example `code_table`."""
    files: list[FileEntry]
    """Already in the store."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Numbers of the result; JSON."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Whatever else readers need; JSON. Never times, hosts or paths."""
    schema_version: int = 1
    """Version of the layout that this kind of artifact has."""


@dataclass(frozen=True)
class StageContext(Generic[C]):
    """Everything that `run` may use."""

    config: C
    seed: int
    inputs: dict[str, Manifest]
    """Input artifacts by the name of the stage that made them."""
    store: Store
    action_key: str
    """Under it stand this stage's plan, receipts and checkpoints."""
    executor: Executor
    scratch: Path
    """Private local folder, removed at the end."""


@dataclass(frozen=True)
class Stage(Generic[C]):
    """One step of the pipeline."""

    name: str
    """As in `python -m stages.NAME`."""
    section: str
    """The recipe's section that configures it."""
    config_class: type[C]
    inputs: tuple[str, ...]
    """Names of the stages that may feed it."""
    run: Callable[[StageContext[C]], Outcome]
    version: int = 1
    """Raise it when a change of code changes results: old artifacts are then no longer hits."""
    external_inputs: Callable[[C], dict[str, str]] | None = None
    """Digests of what the config names outside the store (a URL list's content, say), by a name; part of the key."""
    unused_inputs: Callable[[C], tuple[str, ...]] | None = None
    """Those of `inputs` that a config has no use for: they need not be made, and are no part of the key."""

    def feeders(self, config: C) -> tuple[str, ...]:
        """Names of the stages that feed it under a config."""
        unused = self.unused_inputs(config) if self.unused_inputs else ()
        return tuple(name for name in self.inputs if name not in unused)

    def action_key(self, config: C, seed: int, inputs: dict[str, str]) -> str:
        """The identity of the result that this stage would have.

        Args:
            config: of this stage.
            seed: of the recipe.
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
    """The config as JSON without the fields, at any depth, that do not affect the result; digests stand for paths.

    Raises:
        OSError: a file whose content counts cannot be read.
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
    """The digest of a file or folder; None where there is none, as where a hub's name is given."""
    if not path or not Path(path).exists():
        return None
    return f"sha256:{InputFiles(path, what).digest() if Path(path).is_dir() else sha256_file(path)}"
