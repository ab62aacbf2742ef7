"""What pretraining and fine-tuning share: rows of a code table, sequences, one optimiser step, the artifact."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from models.language.visual_codes import VisualCodes, VisualCodesConfig
from models.language.vlm import IGNORED, LossAverage, UnifiedVlm, next_token_loss
from models.language.vocabulary import Vocabulary
from models.ranks import is_first_rank, mean_over_ranks, mean_terms, num_ranks, own_part, rank, start_equal
from stages.artifacts.codes import CodedRows
from stages.artifacts.models import put_json, put_weights, read_json, read_weights
from stages.language.sequences import Batch, Sequence, SequenceBuilder
from stages.protocol import Outcome, RuntimeBool, StageContext
from stages.runtime.devices import autocast, resolve_device
from stages.runtime.seeds import mix_seed
from stages.training.loop import EpochSampler, History, build_optimiser, optimise
from stages.training.shared import SharedLoopConfig
from storage.manifest import FileEntry, Manifest
from storage.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

VOCABULARY = "vocabulary.json"
_FOLDER = "model"
_VISUAL, _VISUAL_WEIGHTS = "visual.json", "visual.safetensors"
_MOST_TOKENS = 4096
"""Longest sequence unless told otherwise: models that read 32,768 tokens and more need memory for each of them."""


class VlmLoopConfig(SharedLoopConfig):
    """The loop of a language model, and what lets a larger one fit."""

    micro_batch_size: NonNegativeInt = 0
    """Sequences that a process reads at a time; the gradients of its part of the batch add up before the optimiser's
    step (gradient accumulation). 0 reads all at once. Sums are split by it, so the last bits depend on it."""
    recompute_activations: RuntimeBool = False
    """Forget the layers' activations in the forward pass and compute them again in the backward pass: a third more
    time for a fraction of the memory, and the same result."""
    max_tokens: PositiveInt | None = None
    """Longest sequence, an image's codes and the markers among its tokens; `null` is what the language model and its
    tokenizer say of themselves, at most 4,096. The model is asked and draws within it, too."""
    long_text: Literal["cut", "leave_out"] = "cut"
    """What becomes of text that is too long to stand beside an image, whose codes are never cut: `cut` takes its end
    away, `leave_out` the row. The stage's metrics count both."""


SequenceMaker = Callable[[SequenceBuilder, CodedRows, int], Sequence]
TextsOf = Callable[[dict[str, str]], list[tuple[str, ...]]]
"""Of a row's text fields: the texts of each sequence that may be made of it."""


def longest_sequence(
    asked: int | None, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stage: str = "pretrain"
) -> int:
    """The tokens that a sequence may have.

    Args:
        asked: the config's `max_tokens`.
        llm: whose positions are a limit, where it has one.
        tokenizer: whose `model_max_length` counts where nothing is asked for; it is 1e30 where nobody set it.
        stage: name of the config's section, for messages.

    Raises:
        ValueError: more is asked for than the model has positions.
    """
    positions = getattr(llm.config.get_text_config(), "max_position_embeddings", None) or _MOST_TOKENS
    if asked is None:
        return min(positions, tokenizer.model_max_length, _MOST_TOKENS)
    if asked > positions:
        raise ValueError(
            f"{stage}.max_tokens={asked} is more than the {positions} positions of the language model; lower it "
            "(pretrain.llm.max_positions sets those of a small model)"
        )
    return asked


@dataclass(frozen=True)
class FittingRows:
    """The rows that a training takes, and what was found of the length of their texts."""

    positions: list[int]
    """Of the rows."""
    metrics: dict[str, int]
    """`num_rows` there were, `num_cut` and `num_left_out` for their texts."""


def fitting_rows(builder: SequenceBuilder, rows: CodedRows, texts_of: TextsOf, config: VlmLoopConfig) -> FittingRows:
    """Find the rows with texts that are too long, and leave them out where the config says so.

    Raises:
        ValueError: none is left.
    """
    places = range(len(rows))
    long = {index for index in places if not all(builder.fits(*texts) for texts in texts_of(rows.row(index)))}
    leave_out = config.long_text == "leave_out"
    kept = [index for index in places if not (leave_out and index in long)]
    if not kept:
        raise ValueError(
            f"all {len(rows)} rows have text longer than the {builder.room} tokens that max_tokens="
            f"{builder.max_tokens} leaves beside an image; raise max_tokens, or set long_text=cut"
        )
    if long and is_first_rank():
        logger.warning(
            "%d of %d rows have text longer than the %d tokens that fit beside an image: %s",
            len(long), len(rows), builder.room, "left out" if leave_out else "cut",
        )  # fmt: skip
    counts = {"num_cut": 0 if leave_out else len(long), "num_left_out": len(long) if leave_out else 0}
    return FittingRows(kept, {"num_rows": len(rows)} | counts)


class VlmTraining:
    """One next-token loss over whatever sequences `make` writes; randomness inside `make` is torch's."""

    def __init__(
        self,
        config: VlmLoopConfig,
        seed: int,
        vlm: UnifiedVlm,
        builder: SequenceBuilder,
        rows: CodedRows,
        make: SequenceMaker,
        texts_of: TextsOf,
        average: LossAverage = "token",
    ) -> None:
        """
        Args:
            config: the loop.
            seed: of the stage.
            vlm: what is trained.
            builder: writes its sequences.
            rows: of the code table.
            make: one sequence of a row.
            texts_of: the texts of every sequence that `make` can make of a row.
            average: what the loss is a mean over.

        Raises:
            ValueError: no row has text that is short enough.
        """
        self.config, self.builder, self.rows, self.make, self.average = config, builder, rows, make, average
        self.seed = seed
        self.device = resolve_device(config.device)
        self.vlm = vlm.to(self.device).train()
        start_equal(self.vlm)
        if config.recompute_activations:
            self.vlm.llm.activation_checkpointing_enable({"use_reentrant": False})
        self.optimiser = build_optimiser(vlm, config.optimiser)
        self.fitting = fitting_rows(builder, rows, texts_of, config)
        self.sampler = EpochSampler(len(self.fitting.positions), config.batch_size, seed)

    def step(self, step: int) -> dict[str, Tensor]:
        if num_ranks() > 1:  # each draws for its own part alone
            torch.manual_seed(mix_seed(self.seed, "step", step, rank()))
        indices = self._positions(step)
        sequences = [self.make(self.builder, self.rows, index) for index in indices[own_part(len(indices))]]
        size = self.config.micro_batch_size or len(sequences)
        batches = [self.builder.batch(sequences[start : start + size]) for start in range(0, len(sequences), size)]
        total = torch.zeros((), device=self.device)
        norm = optimise(
            self._losses(batches, total), self.vlm, self.optimiser, self.config.optimiser, step, self.config.steps
        )
        return mean_terms({"loss": total}) | {"gradient_norm": norm}

    def _losses(self, batches: list[Batch], total: Tensor) -> Iterator[Tensor]:
        """Each batch's share of the loss; their sum, which is added to `total`, averages to that of all ranks."""
        if self.average == "token":  # ranks and parts have different numbers, and each token counts the same
            weights = torch.tensor([float((batch.labels[:, 1:] != IGNORED).sum()) for batch in batches])
        else:
            weights = torch.tensor([float(len(batch.labels)) for batch in batches])
        weights = weights.to(self.device)
        weights = weights / mean_over_ranks(weights.sum())
        for batch, weight in zip(batches, weights, strict=True):
            with autocast(self.device, self.config.precision):
                loss = weight * next_token_loss(self.vlm, *batch.to(self.device), average=self.average)
            total += loss.detach()
            yield loss

    def batch_keys(self, step: int) -> list[str]:
        return [self.rows.keys[index] for index in self._positions(step)]

    def _positions(self, step: int) -> list[int]:
        return [self.fitting.positions[index] for index in self.sampler.batch(step)]

    def pictures(self) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"vlm": self.vlm.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.vlm.load_state_dict(state["vlm"])
        self.optimiser.load_state_dict(state["optimiser"])


def put_vlm(context: StageContext[Any], vlm: UnifiedVlm, tokenizer: PreTrainedTokenizerFast) -> list[FileEntry]:
    """Save a plain Hugging Face folder under `model/`, readable by transformers alone, and `vocabulary.json`.

    With several codes a position also `visual.json` and `visual.safetensors`, which need musevl.
    """
    folder = context.scratch / _FOLDER
    vlm.llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [context.store.put_file(path, f"{_FOLDER}/{path.relative_to(folder).as_posix()}") for path in paths]
    files.append(context.store.put_bytes(vlm.vocabulary.to_json().encode(), VOCABULARY))
    if vlm.visual is not None:
        shapes = [list(vlm.visual.head(book).codebook.shape) for book in range(len(vlm.visual.heads))]
        description = {"config": vlm.visual.config.model_dump(mode="json"), "codebook_shapes": shapes}
        files += [put_json(context.store, description, _VISUAL), put_weights(context, vlm.visual, _VISUAL_WEIGHTS)]
    return files


def vlm_outcome(training: VlmTraining, files: list[FileEntry], history: History) -> Outcome:
    """The `vlm` artifact of a training, with what those who use the model need to know."""
    builder = training.builder
    metadata = {
        "tokenizer": training.rows.info.tokenizer_digest,
        "vocabulary_size": builder.vocabulary.size,
        "max_tokens": builder.max_tokens,
    }
    return Outcome("vlm", files, metrics={"loss": history.last("loss")} | training.fitting.metrics, metadata=metadata)


def load_vlm(store: Store, manifest: Manifest) -> tuple[UnifiedVlm, SequenceBuilder]:
    """The model of a `vlm` artifact, in eval mode on the CPU, and what writes its sequences."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    vocabulary = Vocabulary.from_json(store.read_bytes(manifest.file(VOCABULARY)).decode())
    with store.attempt_dir() as scratch:
        store.materialise(manifest, scratch, _FOLDER)
        llm = AutoModelForCausalLM.from_pretrained(scratch / _FOLDER, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch / _FOLDER)
    visual = None
    if not vocabulary.one_code:
        description = read_json(store, manifest, _VISUAL)
        codebooks = [torch.zeros(shape) for shape in description["codebook_shapes"]]
        visual = build_visual(VisualCodesConfig(**description["config"]), llm, codebooks, vocabulary)
        visual.load_state_dict(read_weights(store, manifest, _VISUAL_WEIGHTS))
    builder = SequenceBuilder(tokenizer, vocabulary, manifest.metadata["max_tokens"])
    return UnifiedVlm(llm, vocabulary, visual).eval(), builder


def build_visual(
    config: VisualCodesConfig, llm: PreTrainedModel, codebooks: list[Tensor], vocabulary: Vocabulary
) -> VisualCodes:
    """Both ends of the visual positions of a language model, for a tokenizer's codebooks."""
    return VisualCodes(config, llm.config.hidden_size, codebooks, vocabulary.code_shape[1])
