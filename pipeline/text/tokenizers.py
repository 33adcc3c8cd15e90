"""Tokenizers: byte-level BPE, trained, loaded, and run over batches of text. The only door to `tokenizers`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ArtifactError
from pipeline.settings import fingerprint

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

END_OF_TEXT = "<|endoftext|>"
TOKENIZER = "tokenizer.json"
NUM_BYTES = 256  # the alphabet of byte-level BPE, always in the vocabulary


class Tokenizer:
    """A tokenizer in the Hugging Face format.

    Note: the text of a special token in a document is encoded as ordinary text, so that no document can forge an end
    of text, and nothing is added, padded or cut off.
    """

    def __init__(self, inner: Any) -> None:
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(map(int, self._inner.get_vocab(with_added_tokens=True).values()))

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by their text, in the order of the ids."""
        added = sorted(self._inner.get_added_tokens_decoder().items())
        return {token.content: number for number, token in added if token.special}

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the tokenizer, whatever its file is formatted like."""
        return fingerprint(json.loads(self._inner.to_str()))

    @property
    def dtype(self) -> str:
        """The smallest type that holds every id, uint16 or uint32."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, or null if the vocabulary lacks it."""
        number: int | None = self._inner.token_to_id(token)
        return number

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(
        self, texts: Sequence[str], end: int | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Return (the ids of all texts one after another, of `dtype`; how many each text has).

        Args:
            end: An id to put after each text, counted with it.
        """
        import numpy as np

        closing = [] if end is None else [end]
        rows = [e.ids + closing for e in self._inner.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        values = np.fromiter(itertools.chain.from_iterable(rows), self.dtype, int(lengths.sum()))
        return values, lengths

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        text: str = self._inner.decode(ids, skip_special_tokens=False)
        return text

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self._inner.save(str(path), pretty=True)


def load(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`.

    Raises:
        ArtifactError: If it is not one.
    """
    import tokenizers

    try:
        return Tokenizer(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except Exception as error:  # the library raises bare Exception
        raise ArtifactError(f"{path}: not a tokenizer in the Hugging Face format ({error}); make it again") from None


def train(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str], min_frequency: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016; bytes and pre-tokenization of Radford et al. 2019).

    The result depends on the counts of words alone: not on the order of texts, nor on threads. The special tokens
    have the first ids, in their order; the vocabulary is smaller than `vocab_size` if the texts have too few pairs.
    """
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner)
