"""The loader: which tokens are in which row of which step, as a pure function of (settings, seed, step).

A step's samples are consecutive numbers; the mixture says which source each is of and which sample of that source, a
permutation of the source's rows says which row that is, and packing says which tokens the row has. Nothing is stored
but the step, and nothing is built at start that grows with the number of samples.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.errors import ArtifactError, ConfigError
from pipeline.text.mixture import AnyMixture, Epochs, make_mixer
from pipeline.text.packing import AnyPacking, ContiguousRows, WarmUp
from pipeline.text.shuffle import permute, unpermute
from pipeline.text.stream import Span, Tokens, TokenStream

IGNORED = -100  # a label that has no loss

CHUNK = 1 << 16  # samples whose places are computed at one time: one by one they would cost a hundred times as much
KEPT_CHUNKS = 4
ROWS_AT_ONCE = 64  # that are copied before they become int64: what stays in a cache
AHEAD_TOKENS = 1 << 16  # of steps that are read at one time, if one follows the other: each by itself costs more


@dataclass(frozen=True)
class Samples:
    """The samples of one global batch, in their order.

    Attributes:
        source: Which source each is of, by its place among the names; int64 [rows].
        epoch: How often that source was gone through before; int64 [rows].
        row: Which row of that source it is; int64 [rows].
    """

    source: Tokens
    epoch: Tokens
    row: Tokens


class Rows(NamedTuple):
    """What a model is fed; not to be written to, for steps read one after another share their memory.

    Attributes:
        inputs: int64 [rows, tokens].
        labels: The token after each input, or -100 where there is none; int64 [rows, tokens].
        documents: Numbers the documents of each row, in their order; int32 [rows, tokens]. None if not asked for.
    """

    inputs: Tokens
    labels: Tokens
    documents: npt.NDArray[np.int32] | None


class _Ahead(NamedTuple):
    """Rows of steps [first, first + len(rows)) as `read` gives them."""

    first: int
    mine: slice
    documents: bool
    rows: list[Rows]


@dataclass(frozen=True)
class Order:
    """All that fixes the order of training; the fields are settings of pretraining.

    Attributes:
        batch_rows: Samples of one global batch, each of `seq_len` tokens.
    """

    mixture: AnyMixture
    packing: AnyPacking
    seq_len: int
    batch_rows: int
    steps: int
    seed: int
    warmup: Sequence[WarmUp] = ()
    max_epochs: float | None = None


class Loader:
    """Rows of tokens in their order, from one or several sources.

    Attributes:
        names: The sources.
        sizes: How many rows an epoch of each has.

    Raises:
        ArtifactError: If a source holds less than a row.
        ConfigError: If the mixture holds less than the steps ask for.
    """

    def __init__(self, sources: Mapping[str, TokenStream], order: Order) -> None:
        self.names, self.order = sorted(sources), order  # the order of a mapping is not part of a fingerprint
        self.streams = [sources[name] for name in self.names]
        self.packers = [order.packing.pack(stream, order.seq_len) for stream in self.streams]
        self.sizes = [packer.num_rows for packer in self.packers]
        self.end_of_text, self.vocab_size = self.streams[0].end_of_text, self.streams[0].vocab_size
        self._check_sizes()
        self.mixer = make_mixer(order.mixture, dict(zip(self.names, self.sizes, strict=True)), order.seq_len)
        self._check_epochs()
        self._chunk = lru_cache(KEPT_CHUNKS)(self._samples)
        self._ahead = _Ahead(0, slice(None), True, [])
        # each source is shuffled by a key of its own, else those of one size would go in step
        self._seeds = [xxhash.xxh3_64_intdigest(f"{order.seed}/{name}".encode()) for name in self.names]

    def counts(self, steps: int) -> dict[str, int]:
        """Return how many samples of each source the first `steps` steps have."""
        return dict(zip(self.names, self.mixer.counts(steps * self.order.batch_rows), strict=True))

    def row_length(self, step: int) -> int:
        """Return the length of the rows at a step (from 1): `seq_len`, or less while it warms up."""
        seen = (step - 1) * self.order.batch_rows * self.order.seq_len
        return next((part.seq_len for part in self.order.warmup if seen < part.tokens), self.order.seq_len)

    def samples(self, step: int) -> Samples:
        """Return the samples of the batch of `step` (from 1)."""
        return self._samples_of(range(step, step + 1))

    def _samples_of(self, steps: range) -> Samples:
        first, stop = (steps.start - 1) * self.order.batch_rows, (steps.stop - 1) * self.order.batch_rows
        pieces = [
            [array[max(0, first - chunk * CHUNK) : stop - chunk * CHUNK] for array in self._chunk(chunk)]
            for chunk in range(first // CHUNK, -(-stop // CHUNK))
        ]
        return Samples(*(pieces[0] if len(pieces) == 1 else map(np.concatenate, zip(*pieces, strict=True))))

    def read(self, step: int, mine: slice = slice(None), documents: bool = True) -> Rows:
        """Return the rows of some of a step's samples; while the length warms up there are several for each.

        Args:
            documents: Whether to number the documents.

        Raises:
            ArtifactError: If a part is damaged, or holds an id outside the vocabulary.
        """
        ahead = self._ahead
        if (ahead.mine, ahead.documents) != (mine, documents):
            ahead = _Ahead(step, mine, documents, [])
        number = step - ahead.first
        if not 0 <= number < len(ahead.rows):
            # twice as many as before, if this one follows: so the first are not waited for, nor are single ones
            steps = 2 * len(ahead.rows) if number == len(ahead.rows) else 1
            rows = self._read_steps(step, steps, mine, documents)
            ahead, number = _Ahead(step, mine, documents, rows), 0
            self._ahead = ahead  # in one go: several threads may read
        return ahead.rows[number]

    def read_partners(self, step: int, mine: slice = slice(None)) -> Rows:
        """Return for every row of `read` one from elsewhere in its source, a third to two thirds of it further on.

        Raises:
            ArtifactError: If a part is damaged, or holds an id outside the vocabulary.
        """
        samples = self.samples(step)
        sources, numbers = samples.source[mine], samples.row[mine].copy()
        places = (step - 1) * self.order.batch_rows + np.arange(self.order.batch_rows)[mine]
        for source in set(sources.tolist()):
            rows, size = (sources == source).nonzero()[0], self.sizes[source]
            least = -(-size // 3)
            further = least + permute(places[rows] % least, least, self._seeds[source], -1)  # no epoch has this number
            numbers[rows] = (numbers[rows] + further) % size
        return self._cut(step, self._read(sources, numbers, documents=True))

    def spans(self, step: int) -> Iterator[tuple[str, list[Span]]]:
        """Yield for every sample of a step its source and what documents its labels are of."""
        samples = self.samples(step)
        for source, row in zip(samples.source.tolist(), samples.row.tolist(), strict=True):
            pieces = self.packers[source].row(row)
            yield self.names[source], [span for piece in pieces for span in self.streams[source].spans(*piece)]

    def steps_of(self, source: int, start: int, stop: int) -> list[int]:
        """Return the steps whose batch has tokens of [start, stop), a document's place in a source's stream."""
        steps = set()
        size, last = self.sizes[source], self.order.steps * self.order.batch_rows
        for row in self.packers[source].rows_of(start, stop):
            for epoch in range(-(-self.mixer.counts(last)[source] // size)):
                number = epoch * size + unpermute(row, size, self._seeds[source], epoch)
                sample = self.mixer.place(source, number)
                if sample is not None and sample < last:
                    steps.add(sample // self.order.batch_rows + 1)
        return sorted(steps)

    def _samples(self, chunk: int) -> tuple[Tokens, Tokens, Tokens]:
        """Return (source, epoch, row) of samples [chunk * CHUNK, (chunk + 1) * CHUNK)."""
        sources, numbers = self.mixer.pick(np.arange(chunk * CHUNK, (chunk + 1) * CHUNK))
        epochs, rows = np.empty_like(numbers), np.empty_like(numbers)
        for source in np.unique(sources).tolist():
            mine, size = np.flatnonzero(sources == source), self.sizes[source]
            counted = numbers[mine]  # one after another
            first = int(counted[0]) // size
            edges = np.searchsorted(counted, np.arange(first, int(counted[-1]) // size + 2) * size)
            for epoch, (begin, end) in enumerate(pairwise(edges.tolist()), first):
                now = mine[begin:end]
                epochs[now] = epoch
                rows[now] = permute(counted[begin:end] - epoch * size, size, self._seeds[source], epoch)
        return sources, epochs, rows

    def _read_steps(self, first: int, steps: int, mine: slice, documents: bool) -> list[Rows]:
        """Return the rows of up to so many steps from `first` on, at least one's: views of what is read at one time."""
        count = len(range(*mine.indices(self.order.batch_rows)))
        most = min(self.order.steps - first + 1, AHEAD_TOKENS // max(1, count * self.order.seq_len))
        steps = max(1, min(steps, most))
        samples = self._samples_of(range(first, first + steps))
        sources, numbers = (
            array.reshape(steps, self.order.batch_rows)[:, mine].ravel() for array in (samples.source, samples.row)
        )
        whole, shape = self._read(sources, numbers, documents), (steps, count, self.order.seq_len)
        numbered = [None] * steps if whole.documents is None else whole.documents.reshape(shape)
        rows = list(map(Rows, whole.inputs.reshape(shape), whole.labels.reshape(shape), numbered))
        if self.order.warmup:
            rows = [self._cut(first + number, one) for number, one in enumerate(rows)]
        return rows

    def _read(self, sources: Tokens, numbers: Tokens, documents: bool) -> Rows:
        """Return rows of `seq_len` by their source and number."""
        if all(isinstance(packer, ContiguousRows) for packer in self.packers):
            inputs, labels, begins = self._read_whole(sources, numbers, documents)
        else:
            inputs, labels, begins = self._read_pieces(sources, numbers)
        return Rows(inputs, labels, _number(begins) if documents else None)

    def _cut(self, step: int, rows: Rows) -> Rows:
        """Return rows cut to the length that they have at a step."""
        length = self.row_length(step)
        if length == self.order.seq_len:
            return rows
        numbered = None if rows.documents is None else rows.documents.reshape(-1, length)
        return Rows(rows.inputs.reshape(-1, length), rows.labels.reshape(-1, length), numbered)

    def _read_whole(
        self, sources: Tokens, numbers: Tokens, documents: bool
    ) -> tuple[Tokens, Tokens, npt.NDArray[np.bool_]]:
        """Return the inputs and labels of rows in one piece, two views of the same, and where a document begins."""
        seq_len = self.order.seq_len
        tokens = np.empty((len(numbers), seq_len + 1), np.int64)
        begins = np.empty((len(numbers) if documents else 0, seq_len), np.bool_)
        for source in set(sources.tolist()):
            mine = np.flatnonzero(sources == source)
            for first in range(0, len(mine), ROWS_AT_ONCE):
                rows: Tokens | slice = mine[first : first + ROWS_AT_ONCE]
                ids = self.streams[source].gather(numbers[rows] * seq_len - 1, seq_len + 1)
                if len(mine) == len(numbers):  # numpy writes to a slice faster
                    rows = slice(first, first + len(ids))
                tokens[rows] = ids
                if documents:
                    begins[rows] = ids[:, :-1] == self.end_of_text
        return tokens[:, :-1], tokens[:, 1:], begins

    def _read_pieces(self, sources: Tokens, numbers: Tokens) -> tuple[Tokens, Tokens, npt.NDArray[np.bool_]]:
        """Return the inputs and labels of rows of several pieces, and at which positions a document begins."""
        shape = (len(numbers), self.order.seq_len)
        inputs, labels = np.full(shape, self.end_of_text), np.full(shape, IGNORED)
        begins = np.zeros(shape, np.bool_)
        for row, (source, number) in enumerate(zip(sources.tolist(), numbers.tolist(), strict=True)):
            at = 0
            for start, stop in self.packers[source].row(number):
                tokens = self.streams[source].read(start - 1, stop - start + 1)
                inputs[row, at : at + stop - start], labels[row, at : at + stop - start] = tokens[:-1], tokens[1:]
                begins[row, at] = True
                at += stop - start
        return inputs, labels, begins | (inputs == self.end_of_text)

    def _check_sizes(self) -> None:
        """Refuse a source that has no row."""
        for name, stream, size in zip(self.names, self.streams, self.sizes, strict=True):
            if size < 1:
                raise ArtifactError(
                    f"tokens '{name}': has {stream.num_tokens:,} tokens, fewer than one sequence of "
                    f"{self.order.seq_len}; use more text or a smaller seq_len"
                )

    def _check_epochs(self) -> None:
        """Refuse more steps than the mixture holds at the epochs that it allows."""
        steps, counts = self.order.steps, self.counts(self.order.steps)
        if self._fits(steps):
            return
        most = bisect_left(range(1, steps), True, key=lambda step: not self._fits(step))
        problems = []
        for name, size in zip(self.names, self.sizes, strict=True):
            setting, limit = self._limit(name)
            if limit is not None and counts[name] >= limit * size + 1:
                problems.append(
                    f"{setting}: {steps:,} steps go {counts[name] / size:.2f} times through '{name}' "
                    f"({size * self.order.seq_len:,} tokens), at most {limit:g} are allowed; use at most {most:,} "
                    "steps, more text or another mixture, or raise it"
                )
        raise ConfigError(*problems)

    def _fits(self, steps: int) -> bool:
        """Return whether no source is gone through too often; shares are kept to within one sample."""
        limits = [self._limit(name)[1] for name in self.names]
        counts = self.counts(steps).values()
        return all(
            limit is None or count < limit * size + 1
            for limit, size, count in zip(limits, self.sizes, counts, strict=True)
        )

    def _limit(self, name: str) -> tuple[str, float | None]:
        """Return the setting that says how often a source may be gone through, and what it says."""
        mixture = self.order.mixture
        return (
            ("mixture.epochs", mixture.epochs[name])
            if isinstance(mixture, Epochs)
            else ("max_epochs", self.order.max_epochs)
        )


def _number(begins: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Return the running sum of each row: faster than cumsum where there are few to count."""
    rows, length = begins.shape
    edges = begins.copy()
    edges[:, 0] = True
    places = np.flatnonzero(edges)
    firsts = np.searchsorted(places, np.arange(rows) * length)
    counts = np.diff(firsts, append=len(places))
    numbers = np.arange(len(places)) - np.repeat(firsts - begins[:, 0], counts)
    return np.repeat(numbers.astype(np.int32), np.diff(places, append=rows * length)).reshape(rows, length)
