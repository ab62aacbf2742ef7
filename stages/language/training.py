"""Training of the language model, shared by pretraining and fine-tuning: rows, sequences, steps and the artifact."""

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
"""Default limit of the sequence length, since models that read 32,768 tokens and more need much memory for them."""


class VlmLoopConfig(SharedLoopConfig):
    """Configuration of the language model's training loop, with settings that save memory."""

    micro_batch_size: NonNegativeInt = 0
    """Number of sequences per forward pass of a process; gradients are accumulated over its part of the batch. 0 uses
    all at once. The last bits of the result depend on it, because sums are split by it."""
    recompute_activations: RuntimeBool = False
    """Activation checkpointing: recompute the layers' activations in the backward pass instead of storing them. It
    takes a third more time and a fraction of the memory, with the same result."""
    max_tokens: PositiveInt | None = None
    """Length of the longest sequence, including an image's codes and the markers; `null` is the limit of the language
    model and its tokenizer, at most 4,096. It applies to inference with the model too."""
    long_text: Literal["cut", "leave_out"] = "cut"
    """What to do with text that does not fit into a sequence with an image, whose codes are never truncated: `cut`
    truncates the text, `leave_out` omits the row. The stage's metrics count both."""


SequenceMaker = Callable[[SequenceBuilder, CodedRows, int], Sequence]
TextsOf = Callable[[dict[str, str]], list[tuple[str, ...]]]
"""Maps a row's text fields to the texts of each sequence that may be built from it."""


def longest_sequence(
    asked: int | None, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stage: str = "pretrain"
) -> int:
    """Return the largest number of tokens of a sequence.

    Args:
        asked: the config's `max_tokens`.
        llm: the language model, whose number of positions is a limit if it has one.
        tokenizer: its `model_max_length` is used if `asked` is None; transformers sets it to 1e30 if unknown.
        stage: name of the config's section, for messages.

    Raises:
        ValueError: `asked` is more than the model has positions.
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
    """The rows used for training, and counts of texts that are too long."""

    positions: list[int]
    """Indices of the rows used."""
    metrics: dict[str, int]
    """`num_rows` before, and how many were truncated (`num_cut`) or omitted (`num_left_out`)."""


def fitting_rows(builder: SequenceBuilder, rows: CodedRows, texts_of: TextsOf, config: VlmLoopConfig) -> FittingRows:
    """Find the rows with texts that are too long, and omit them if the config says so.

    Raises:
        ValueError: no row is left.
    """
    places = range(len(rows))
    long = {index for index in places if not all(builder.fits(*texts) for texts in texts_of(rows.row(index)))}
    leave_out = config.long_text == "leave_out"
    kept = [index for index in places if not (leave_out and index in long)]
    if not kept:
        raise ValueError(
            f"all {len(rows)} rows have text longer than the {builder.room} tokens that max_tokens="
            f"{builder.max_tokens} leaves next to an image; raise max_tokens, or set long_text=cut"
        )
    if long and is_first_rank():
        logger.warning(
            "%d of %d rows have text longer than the %d tokens that fit next to an image: %s",
            len(long), len(rows), builder.room, "left out" if leave_out else "cut",
        )  # fmt: skip
    counts = {"num_cut": 0 if leave_out else len(long), "num_left_out": len(long) if leave_out else 0}
    return FittingRows(kept, {"num_rows": len(rows)} | counts)


class VlmTraining:
    """Trains with the next-token loss on sequences that `make` builds; its random choices use torch's generator."""

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
            config: configuration of the training loop.
            seed: seed of the stage.
            vlm: the model to train.
            builder: builds its sequences.
            rows: rows of the code table.
            make: builds a sequence of a row.
            texts_of: returns the texts of every sequence that `make` may build of a row.
            average: what the loss is averaged over.

        Raises:
            ValueError: the text of every row is too long.
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
        if num_ranks() > 1:  # each rank makes random choices for its own part only
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
        """Yield the weighted loss of each micro-batch, and add them to `total`; its mean over ranks is the loss."""
        if self.average == "token":  # weights by tokens, whose number differs between ranks and micro-batches
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
    """Save a Hugging Face folder under `model/`, which transformers alone can read, and `vocabulary.json`.

    With several codes per position also save `visual.json` and `visual.safetensors`, which need musevl.
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
    """Build the outcome with the `vlm` artifact of a training, and the metadata that users of the model need."""
    builder = training.builder
    metadata = {
        "tokenizer": training.rows.info.tokenizer_digest,
        "vocabulary_size": builder.vocabulary.size,
        "max_tokens": builder.max_tokens,
    }
    return Outcome("vlm", files, metrics={"loss": history.last("loss")} | training.fitting.metrics, metadata=metadata)


def load_vlm(store: Store, manifest: Manifest) -> tuple[UnifiedVlm, SequenceBuilder]:
    """Load the model of a `vlm` artifact in eval mode on the CPU, and its sequence builder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    vocabulary = Vocabulary.from_json(store.read_bytes(manifest.file(VOCABULARY)).decode())
    with store.scratch_dir() as scratch:
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
    """Build input projections and output heads of visual positions for a tokenizer's codebooks."""
    return VisualCodes(config, llm.config.hidden_size, codebooks, vocabulary.code_shape[1])
