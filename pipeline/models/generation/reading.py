"""Models read step by step, and say after each step what they expect next: one way for all families.

Letters of the shape suffixes: B rows, T positions fed now, S positions that the encoder reads, D d_model, V ids of the
vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.errors import ArtifactError
from pipeline.models.cache import Cache
from pipeline.models.config import EncoderDecoder
from pipeline.models.transformer import Transformer

PADDING = -1  # the document of what holds nothing


class Reader:
    """Rows that a decoder reads, each as if it were alone.

    A decoder reads the prompts, padded on the left so that all rows end together. Of an encoder-decoder the encoder
    reads them, once, and the decoder begins with `start_id`.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        num_new: int,
        start_id: int | None = None,
        cached: bool = True,
        sees_prompt: bool = False,
    ) -> None:
        """Prepare the rows; nothing but the encoder runs yet.

        Args:
            num_new: How many ids will follow at most.
            cached: Whether each position is computed once; else everything is computed at every step.
            sees_prompt: Whether a decoder sees all of its prompt from each of its tokens, as of a prefix in training.
        """
        self.model, self.device = model, model.embedding.weight.device
        self.memory_BSD: Tensor | None = None
        self.memory_documents_BS: Tensor | None = None
        self.rows = [list(prompt) for prompt in prompts]
        if isinstance(model.config, EncoderDecoder):
            assert start_id is not None, "the decoder of an encoder-decoder must begin with something"
            ids_BS, self.memory_documents_BS = pad(self.rows, self.device, left=False)
            self.memory_BSD, _ = model.encode(ids_BS, self.memory_documents_BS)
            self.rows = [[start_id] for _ in prompts]
        self.prefixes = [len(row) if sees_prompt else 0 for row in self.rows]
        self.cache: Cache | None = None
        if cached:
            longest = max(map(len, self.rows))
            padding_B = torch.tensor([longest - len(row) for row in self.rows], device=self.device)
            dtype = model.embedding.weight.dtype
            self.cache = Cache(model.config, longest + num_new, padding_B, dtype, sees_prompt)

    def read(self, new_ids: Sequence[int] | None = None) -> Tensor:
        """Give each row its next id, the first time none, and return the logits of what follows, (B, V) in fp32."""
        if new_ids is not None and self.cache is not None:
            ids_BT = torch.tensor(new_ids, device=self.device).unsqueeze(1)
            return self._logits(ids_BT, None)
        if new_ids is not None:
            for row, new_id in zip(self.rows, new_ids, strict=True):
                row.append(new_id)
        # a row that has reached the limit is read no more, whatever it becomes
        rows = [row[-self.model.config.max_seq_len :] for row in self.rows]
        ids_BT, documents_BT = pad(rows, self.device, left=True)
        return self._logits(ids_BT, documents_BT if self.cache is None else None)

    def select(self, kept: Sequence[int]) -> None:
        """Keep these rows in this order; a row may be there several times."""
        if list(kept) == list(range(len(self.rows))):
            return
        kept_B = torch.tensor(kept, device=self.device)
        self.rows = [list(self.rows[row]) for row in kept]
        self.prefixes = [self.prefixes[row] for row in kept]
        if self.cache is not None:
            self.cache.select(kept_B)
        if self.memory_BSD is not None and self.memory_documents_BS is not None:
            self.memory_BSD = self.memory_BSD[kept_B]
            self.memory_documents_BS = self.memory_documents_BS[kept_B]

    def _prefix(self, documents_BT: Tensor) -> Tensor | None:
        """Return which positions are of a prompt that all of it sees, (B, T), of rows that are padded on the left."""
        if not any(self.prefixes):
            return None
        place_BT = (documents_BT != PADDING).cumsum(1)  # from 1
        lengths_B = torch.tensor(self.prefixes, device=self.device)
        return (place_BT > 0) & (place_BT <= lengths_B.unsqueeze(1))

    def _logits(self, ids_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
        if self.memory_BSD is None:
            prefix_BT = None if documents_BT is None else self._prefix(documents_BT)
            x_BTD = self.model.hidden(ids_BT, self.cache, documents_BT, prefix_BT)
        else:  # all rows of the decoder are of one length
            assert self.model.decoder is not None
            x_BTD, _ = self.model.decode(ids_BT, self.memory_BSD, self.memory_documents_BS, None, self.cache)
            x_BTD = self.model.decoder.finish(x_BTD)
        logits_BV = self.model.logits(x_BTD[:, -1]).float()
        if logits_BV.isnan().any():
            raise ArtifactError(
                "the model's logits are not numbers: its training went wrong, or its weights are damaged"
            )
        return logits_BV


def pad(rows: Sequence[Sequence[int]], device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
    """Return rows of one length, (B, T), and the number of the document at each position: 0, and -1 for padding."""
    longest = max(map(len, rows))
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    documents_BT = torch.full((len(rows), longest), PADDING)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(len(row))
        ids_BT[number, place] = torch.tensor(row)
        documents_BT[number, place] = 0
    return ids_BT.to(device), documents_BT.to(device)


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Switch dropout off for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
