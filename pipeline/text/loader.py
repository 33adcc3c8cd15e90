"""The loader: a tokens artifact as one stream of documents, cut into sequences, in an order that is pure mathematics.

`SequenceLoader.rows(step)` is a function of (seed, step) alone; nothing is stored but the step.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import ArtifactError
from pipeline.text.arrow import open_tokens

Tokens = npt.NDArray[np.int64]


def held_out(text_hash: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """Return which documents are held out: those whose content hash lies in the lowest `fraction` of all hashes.

    The choice depends on a document's text alone: not on order, tokenizer or what else is in the corpus, and copies
    of a text are always on the same side.
    """
    return text_hash < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))


class TokenStream:
    """The chosen documents of token parts, in order, seen as one long row of tokens.

    Attributes:
        num_tokens: Length of the stream; every document ends with its end-of-text id.
        num_bytes: UTF-8 bytes of the documents' texts.
        num_documents: How many documents were chosen.
    """

    def __init__(self, paths: Iterable[Path], fraction: float, held: bool) -> None:
        self._values, part_of, begins, lengths = [], [], [], []
        self.num_bytes = 0
        for number, path in enumerate(paths):
            part = open_tokens(path)
            chosen = held_out(part.text_hash, fraction) == held
            self._values.append(part.values)
            begins.append(part.offsets[:-1][chosen])
            lengths.append(np.diff(part.offsets)[chosen])
            part_of.append(np.full(int(chosen.sum()), number, dtype=np.int32))
            self.num_bytes += int(part.num_bytes[chosen].sum())
        self._part = np.concatenate(part_of) if part_of else np.zeros(0, np.int32)
        self._begin = np.concatenate(begins).astype(np.int64) if begins else np.zeros(0, np.int64)
        self._start = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]) if lengths else np.zeros(1, np.int64)
        self.num_documents = len(self._part)
        self.num_tokens = int(self._start[-1])

    def read(self, start: int, length: int) -> Tokens:
        """Return tokens [start, start + length) of the stream."""
        out = np.empty(length, dtype=np.int64)
        document = int(np.searchsorted(self._start, start, side="right")) - 1
        filled = 0
        while filled < length:
            skip = start + filled - int(self._start[document])
            count = min(length - filled, int(self._start[document + 1]) - start - filled)
            begin = int(self._begin[document]) + skip
            out[filled : filled + count] = self._values[self._part[document]][begin : begin + count]
            filled += count
            document += 1
        return out

    def document(self, index: int) -> Tokens:
        """Return the tokens of one document."""
        start, end = int(self._start[index]), int(self._start[index + 1])
        return self.read(start, end - start)


class SequenceLoader:
    """Sequences of `seq_len` inputs and their labels, shuffled anew in every epoch.

    Raises:
        ArtifactError: If the stream is shorter than one sequence.
    """

    def __init__(self, stream: TokenStream, seq_len: int, batch_rows: int, seed: int) -> None:
        self.stream, self.seq_len, self.batch_rows, self.seed = stream, seq_len, batch_rows, seed
        self.num_sequences = (stream.num_tokens - 1) // seq_len
        if self.num_sequences < 1:
            raise ArtifactError(
                f"seq_len: the {stream.num_documents} training documents have {stream.num_tokens} tokens, fewer than "
                f"one sequence of {seq_len} and its last label; use more text, a smaller seq_len or validation_fraction"
            )

    def rows(self, step: int) -> Tokens:
        """Return which sequences are in the batch of `step` (from 1): one batch after another through each epoch."""
        first = (step - 1) * self.batch_rows
        samples = np.arange(first, first + self.batch_rows)
        epochs, places = np.divmod(samples, self.num_sequences)
        rows = [permute(int(p), self.num_sequences, self.seed, int(e)) for e, p in zip(epochs, places, strict=True)]
        return np.array(rows, dtype=np.int64)

    def read(self, rows: Tokens) -> tuple[Tokens, Tokens]:
        """Return (inputs, labels), each [rows, seq_len]; a label is the token after its input."""
        sequences = np.stack([self.stream.read(int(row) * self.seq_len, self.seq_len + 1) for row in rows])
        return sequences[:, :-1], sequences[:, 1:]


def permute(index: int, size: int, seed: int, epoch: int) -> int:
    """Return where `index` goes in a pseudorandom permutation of range(size), in constant memory.

    A balanced Feistel network of six rounds over the smallest even number of bits that holds `size`, with cycle
    walking (Black and Rogaway 2002): values that fall outside are sent round again.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(6):
            left, right = right, left ^ (_mix(right, seed, epoch, round_number) & mask)
        index = (left << half) | right
        if index < size:
            return index


def _mix(value: int, seed: int, epoch: int, round_number: int) -> int:
    """Mix 64 bits: the finalizer of SplitMix64 (Steele et al. 2014) over the value and its key."""
    word = 2**64 - 1
    x = (value + 0x9E3779B97F4A7C15 * (1 + seed) + 0xD1342543DE82EF95 * (1 + epoch) + (round_number << 56)) & word
    for _ in range(2):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        x ^= x >> 31
    return x
