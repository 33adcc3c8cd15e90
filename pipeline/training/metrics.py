"""Numbers that say how good a model is: its losses over held-out text, accuracy and F1 of a classifier."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np

from pipeline.text.loader import IGNORED, Rows
from pipeline.text.stream import Tokens, TokenStream
from pipeline.training.objectives.batch import Examples, count_terms

if TYPE_CHECKING:
    import torch

    from pipeline.training.objectives.objective import Example

MEASURED = ("tokens", "sentence")  # terms that make up the loss of a model; the others only help it to learn
FED_ROWS = 16  # windows that a model is fed at once


@dataclass(frozen=True)
class Score:
    """Losses over some text.

    Attributes:
        sums: Each term of the loss, summed.
        weights: How many there are of each unit that the terms count: labels, rows, …
    """

    sums: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """How many tokens were predicted."""
        return int(self.weights["labels"])

    @property
    def terms(self) -> dict[str, float]:
        """The mean of each term; of tokens in nats per token."""
        from pipeline.models.transformer import unit_of_loss

        weights = {term: self.weights.get(unit_of_loss(term), 0) for term in self.sums}
        return {term: total / weights[term] for term, total in self.sums.items() if weights[term]}

    @property
    def loss(self) -> float:
        """The loss in nats: cross entropy per token, and where rows have a class also that per row."""
        return sum(mean for term, mean in self.terms.items() if term in MEASURED)

    @property
    def perplexity(self) -> float:
        """Exponential of the loss per token."""
        return math.exp(min(self.terms["tokens"], 700))

    def bits_per_byte(self, stream: TokenStream) -> float:
        """Return bits per UTF-8 byte of the text, which models with different tokenizers can be compared by.

        It is that only where every token was predicted from those before it.
        """
        return self.terms["tokens"] * stream.num_tokens / stream.num_bytes / math.log(2)

    def __add__(self, other: Self) -> Self:
        return type(self)(_add(self.sums, other.sums), _add(self.weights, other.weights))


def score(
    model: "torch.nn.Module",
    stream: TokenStream,
    examples: Examples,
    windows: Sequence[int | None] | None = None,
    rows: int = FED_ROWS,
    beat: Callable[[], None] = lambda: None,
) -> Score:
    """Return the losses of `model` on a stream of documents, cut into windows that become examples as in training.

    Each window is preceded by the last token before it, the first of all by the end of a text. What is random in an
    example follows from the number of its window, so every time the same is asked.

    Args:
        examples: Makes the examples; each window is as long as its rows.
        windows: Which windows to score, by number; all if null. A None at the end is not scored, but lets ranks that
            share the work call the model equally often.
        rows: Windows that the model is fed at once.
        beat: Called before each of these.
    """
    import torch

    size = examples.objective.row_tokens(examples.seq_len)
    chosen = list(range(num_windows(stream, size)) if windows is None else windows)
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    found = Score()
    with torch.inference_mode():
        for first in range(0, len(chosen), rows):
            beat()
            asked = [number for number in chosen[first : first + rows] if number is not None]
            example = _make(stream, examples, asked or [0])
            losses = model(**{name: torch.from_numpy(array).to(device) for name, array in example.items()})
            weights = count_terms(example)
            if asked:
                found += Score({term: value.item() for term, value in losses.items()}, weights)
            else:
                found += Score(dict.fromkeys(losses, 0.0), dict.fromkeys(weights, 0))
    model.train(was_training)
    return found


def num_windows(stream: TokenStream, size: int) -> int:
    """Return how many windows of `size` tokens a stream is cut into; the last one may be short."""
    return -(-stream.num_tokens // size)


def _make(stream: TokenStream, examples: Examples, numbers: Sequence[int]) -> "Example":
    """Return the examples of some windows; a second text comes from half-way round the stream."""
    size = examples.objective.row_tokens(examples.seq_len)
    total = num_windows(stream, size)
    partners = None
    if examples.objective.partner:
        partners = _rows(stream, size, [(number + total // 2) % total for number in numbers], documents=True)
    rows = _rows(stream, size, numbers, examples.numbers_documents)
    return examples.make(rows, numbers, examples.seq_len, partners)


def _rows(stream: TokenStream, size: int, numbers: Sequence[int], documents: bool) -> Rows:
    """Return windows as the loader returns rows."""
    inputs, labels = (np.stack(side) for side in zip(*(_window(stream, size, n) for n in numbers), strict=True))
    numbered = np.cumsum(inputs == stream.end_of_text, axis=1, dtype=np.int32) if documents else None
    return Rows(inputs, labels, numbered)


def _window(stream: TokenStream, size: int, number: int) -> tuple[Tokens, Tokens]:
    """Return (inputs, labels), each [size]; labels past the end of the stream are ignored."""
    inputs, labels = np.full(size, stream.end_of_text), np.full(size, IGNORED)
    start = number * size
    count = min(size, stream.num_tokens - start)
    labels[:count] = stream.read(start, count)
    inputs[1:count] = labels[: count - 1]
    if start:
        inputs[0] = stream.read(start - 1, 1)[0]
    return inputs, labels


def _add(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Return the fraction that is right."""
    return float(np.mean(np.asarray(predicted) == np.asarray(wanted)))


def macro_f1(predicted: Sequence[int], wanted: Sequence[int], num_classes: int) -> float:
    """Return the mean over classes of F1; a class that is neither wanted nor predicted counts as 0."""
    guess, truth = np.asarray(predicted), np.asarray(wanted)
    scores = []
    for label in range(num_classes):
        hits = int(((guess == label) & (truth == label)).sum())
        named = int((guess == label).sum()) + int((truth == label).sum())
        scores.append(2 * hits / named if named else 0.0)
    return float(np.mean(scores))
