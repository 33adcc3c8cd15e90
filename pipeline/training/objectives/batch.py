"""Batches of examples: rows from the loader, each with a seed of its own, made into arrays for the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from pipeline.training.objectives.objective import IGNORED, PADDING, SpecialIds

if TYPE_CHECKING:
    from pipeline.text.loader import Loader, Rows
    from pipeline.training.objectives.objective import Example, Objective

DOCUMENTS = ("documents", "decoder_documents")


@dataclass(frozen=True)
class Examples:
    """How rows become examples: those of a step follow from its number, whoever asks for them.

    Attributes:
        seq_len: Positions of an example's inputs.
        document_mask: Whether documents are kept apart.
        seed: From which all random choices follow, with the number of the sample.
    """

    objective: Objective
    ids: SpecialIds
    seq_len: int
    document_mask: bool
    seed: int

    def read(self, loader: Loader, step: int, mine: slice = slice(None)) -> Example:
        """Return the examples of some of a step's samples, under the names of the model's arguments.

        While the length warms up there are several for each sample, as of the loader's rows.

        Args:
            loader: Gives rows of `objective.row_tokens(seq_len)` tokens.
        """
        rows = loader.read(step, mine, documents=self.numbers_documents)
        partners = loader.read_partners(step, mine) if self.objective.partner else None
        first = (step - 1) * loader.order.batch_rows
        numbers = range(first, first + loader.order.batch_rows)[mine]
        length = rows.labels.shape[1]
        seq_len = self.seq_len if length == loader.order.seq_len else length
        return self.make(rows, numbers, seq_len, partners)

    @property
    def numbers_documents(self) -> bool:
        """Whether the documents of a row must be known."""
        return self.document_mask or self.objective.needs_documents

    def make(self, rows: Rows, numbers: Sequence[int], seq_len: int, partners: Rows | None = None) -> Example:
        """Return the examples of rows, of which each of the `numbers` has equally many."""
        seeds = example_seeds(self.seed, numbers, len(rows.labels) // len(numbers))
        example = self.objective.make_many(rows, seeds, seq_len, self.ids, partners)
        return example if self.document_mask else {**example, **_join_documents(example, rows.documents is not None)}


def example_seeds(seed: int, numbers: Sequence[int], rows_each: int = 1) -> list[int]:
    """Return a seed of 64 bits for every row of every sample; whichever rank asks, a sample's is the same."""
    return [
        xxhash.xxh3_64_intdigest(f"example/{seed}/{number}/{row}".encode())
        for number in numbers
        for row in range(rows_each)
    ]


def count_terms(example: Example) -> dict[str, int]:
    """Return how many labels, rows and rows with a class a batch has: what the sums of its losses are divided by."""
    sentences = np.count_nonzero(example["sentence"] != IGNORED) if "sentence" in example else 0
    return {
        "labels": int(np.count_nonzero(example["labels"] != IGNORED)),
        "rows": len(example["ids"]),
        "sentences": int(sentences),
    }


def _join_documents(example: Example, known: bool) -> Example:
    """Return the documents of examples as one for each row, and padding."""
    if not known:
        return {}
    return {
        name: np.where(example[name] == PADDING, np.int32(PADDING), np.int32(0))
        for name in DOCUMENTS
        if name in example
    }
