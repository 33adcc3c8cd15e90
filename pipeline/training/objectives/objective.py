"""What an objective is: a pure function from a row of tokens and a seed to one example for the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline.settings import Choice

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pipeline.models.config import AnyModel
    from pipeline.text.loader import Rows

    Array = npt.NDArray[Any]
    Example = dict[str, Array]

IGNORED = -100  # a label that has no loss; where a row has no token, the same
PADDING = -1  # the document of a position that holds nothing


@dataclass(frozen=True)
class Row:
    """One row of the loader.

    Attributes:
        tokens: int64 [n]; -100 behind the last token where the row is not full.
        inputs: The token before each, in the text it is from; int64 [n].
        documents: Numbers the document of each token, in their order; int32 [n].
    """

    tokens: Array
    inputs: Array
    documents: Array


@dataclass(frozen=True, eq=False)
class SpecialIds(Mapping[str, int]):
    """The ids of special tokens by their text, and what else of a vocabulary an objective must know.

    Attributes:
        end_of_text: The id that ends a document; it also fills what is padded.
        special: Which ids stand for no text (or do not exist); bool [vocab_size].
        continues: Which ids go on with the word before them; bool [vocab_size].
        breaks: Which ids end in a space, so that what follows begins a word; bool [vocab_size].
        decoder_start: What the decoder of an encoder-decoder reads first; null is the end of a text.
    """

    numbers: Mapping[str, int]
    end_of_text: int
    vocab_size: int
    special: npt.NDArray[np.bool_]
    continues: npt.NDArray[np.bool_]
    breaks: npt.NDArray[np.bool_]
    decoder_start: int | None = None

    def __getitem__(self, token: str) -> int:
        return self.numbers[token]

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def ordinary(self) -> Array:
        """The ids that stand for text; int64 [at most vocab_size]."""
        import numpy as np

        return np.flatnonzero(~self.special)


class Objective(Choice):
    """What a model is trained to do. Every method is a pure function, the same on every machine."""

    @property
    def families(self) -> frozenset[str]:
        """Which models it can train: decoder, encoder, encoder_decoder."""
        raise NotImplementedError

    @property
    def term_names(self) -> Mapping[str, str]:
        """How the log calls each of the model's loss terms."""
        raise NotImplementedError

    @property
    def partner(self) -> bool:
        """Whether an example needs a second row, from elsewhere in the corpus."""
        return False

    @property
    def needs_documents(self) -> bool:
        """Whether it must know the documents of a row even where they may see one another."""
        return False

    def special_tokens(self) -> list[str]:
        """Return the special tokens that the tokenizer must have."""
        return []

    def row_tokens(self, seq_len: int) -> int:
        """Return how many tokens of text make one example whose inputs have `seq_len` positions."""
        return seq_len

    def target_len(self, seq_len: int) -> int:
        """Return how many positions the decoder of an encoder-decoder has beside `seq_len` inputs; 0 for the others."""
        return 0

    def make(self, row: Row, seed: int, seq_len: int, ids: SpecialIds, partner: Row | None = None) -> Example:
        """Return one example: arrays under the names of the model's arguments.

        Their shapes depend on the settings and `seq_len` alone: 1-D, but 0-D for `sentence`. Padding is the end-of-text
        id with label -100 and document -1.

        Args:
            row: `row_tokens(seq_len)` tokens.
            seed: 64 bits from which all random choices follow.
            partner: A row from elsewhere, if `partner` is true.
        """
        raise NotImplementedError

    def make_many(
        self, rows: Rows, seeds: Sequence[int], seq_len: int, ids: SpecialIds, partners: Rows | None = None
    ) -> Example:
        """Return the examples of several rows, stacked: as `make`, with a first dimension of rows."""
        import numpy as np

        seconds = [None] * len(seeds) if partners is None else _split(partners)
        examples = [
            self.make(row, seed, seq_len, ids, second)
            for row, seed, second in zip(_split(rows), seeds, seconds, strict=True)
        ]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

    def check(self, config: AnyModel, seq_len: int) -> Iterator[tuple[str, str]]:
        """Yield (setting, problem) for what cannot work; settings are those of the stage, such as `objective.kind`."""
        if config.kind not in self.families:
            wanted = " or ".join(f"'{family}'" for family in sorted(self.families))
            yield "objective.kind", f"'{self.kind}' trains a model of kind {wanted}, found '{config.kind}'"
        if self.row_tokens(seq_len) < 1:
            yield "seq_len", f"{seq_len} positions leave no room for text with the objective '{self.kind}'"


def _split(rows: Rows) -> list[Row]:
    """Return rows one by one; where their documents are not known they are one document each."""
    import numpy as np

    documents = np.zeros(rows.labels.shape, np.int32) if rows.documents is None else rows.documents
    return [Row(*arrays) for arrays in zip(rows.labels, rows.inputs, documents, strict=True)]
