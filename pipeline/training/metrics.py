"""Numbers that say how good a model is: loss over held-out text, accuracy and F1 of a classifier."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.text.loader import IGNORED
from pipeline.text.stream import Tokens, TokenStream

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Score:
    """Loss over some text.

    Attributes:
        nats: Summed cross entropy.
        tokens: How many tokens were predicted.
    """

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Mean cross entropy, nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(self.loss)

    def bits_per_byte(self, stream: TokenStream) -> float:
        """Return bits per UTF-8 byte of the text, which models with different tokenizers can be compared by."""
        return self.loss * stream.num_tokens / stream.num_bytes / math.log(2)


def score(
    model: "torch.nn.Module",
    stream: TokenStream,
    seq_len: int,
    rows: int,
    first_id: int,
    windows: Sequence[int | None] | None = None,
    document_mask: bool = False,
) -> Score:
    """Return the loss of `model` on a stream of documents, cut into windows of `seq_len` tokens to predict.

    Each window is preceded by the last token before it; the first of all by `first_id`.

    Args:
        rows: Windows that the model is fed at once.
        first_id: The id that ends every document.
        windows: Which windows to score, by number; all if null. A None feeds a window without labels, so that ranks
            that share the work can call the model equally often.
        document_mask: Whether the model sees each document alone, as the loader's rows are masked in training.
    """
    import torch

    chosen = range(num_windows(stream, seq_len)) if windows is None else windows
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    nats, tokens = 0.0, 0
    with torch.inference_mode():
        for first in range(0, len(chosen), rows):
            pairs = [_window(stream, seq_len, first_id, number) for number in chosen[first : first + rows]]
            inputs, labels = (np.stack(side) for side in zip(*pairs, strict=True))
            fed = [inputs, labels, *([np.cumsum(inputs == first_id, axis=1)] if document_mask else [])]
            nats += model(*(torch.from_numpy(array).to(device) for array in fed)).item()
            tokens += int((labels != IGNORED).sum())
    model.train(was_training)
    return Score(nats, tokens)


def num_windows(stream: TokenStream, seq_len: int) -> int:
    """Return how many windows a stream is cut into; the last one may be short."""
    return -(-stream.num_tokens // seq_len)


def _window(stream: TokenStream, seq_len: int, first_id: int, number: int | None) -> tuple[Tokens, Tokens]:
    """Return (inputs, labels), each [seq_len]; labels past the end of the stream are ignored."""
    inputs, labels = np.full(seq_len, first_id), np.full(seq_len, IGNORED)
    if number is not None:
        start = number * seq_len
        count = min(seq_len, stream.num_tokens - start)
        labels[:count] = stream.read(start, count)
        inputs[1:count] = labels[: count - 1]
        inputs[0] = stream.read(start - 1, 1)[0] if start else first_id
    return inputs, labels


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
