"""Numbers that say how good a model is: loss over held-out text, accuracy and F1 of a classifier."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.text.loader import Tokens, TokenStream

if TYPE_CHECKING:
    import torch

IGNORED = -100  # a label that has no loss


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
    model: "torch.nn.Module", stream: TokenStream, seq_len: int, rows: int, first_id: int, shard: slice = slice(None)
) -> Score:
    """Return the loss of `model` on a stream of documents, every token predicted once.

    The stream is cut into windows of `seq_len`; the first token of all is predicted after `first_id`.

    Args:
        rows: Windows that the model is fed at once.
        shard: Which of the groups of `rows` windows to score, for ranks that share the work.
    """
    import torch

    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    nats, tokens = 0.0, 0
    with torch.inference_mode():
        for inputs, labels in list(_windows(stream, seq_len, rows, first_id))[shard]:
            inputs_BT, labels_BT = torch.from_numpy(inputs).to(device), torch.from_numpy(labels).to(device)
            nats += model(inputs_BT, labels_BT).item()
            tokens += int((labels != IGNORED).sum())
    model.train(was_training)
    return Score(nats, tokens)


def _windows(stream: TokenStream, seq_len: int, rows: int, first_id: int) -> Iterator[tuple[Tokens, Tokens]]:
    """Yield (inputs, labels), each [rows, seq_len]; labels past the end of the stream are ignored."""
    for first in range(0, stream.num_tokens, rows * seq_len):
        labels = np.full(rows * seq_len, IGNORED, dtype=np.int64)
        count = min(len(labels), stream.num_tokens - first)
        labels[:count] = stream.read(first, count)
        inputs = np.full(rows * seq_len, first_id, dtype=np.int64)
        inputs[1:count] = labels[: count - 1]
        if first:
            inputs[0] = stream.read(first - 1, 1)[0]
        yield inputs.reshape(rows, seq_len), labels.reshape(rows, seq_len)


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
