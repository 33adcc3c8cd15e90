"""What a decoder has read so far, so that each new position is computed once.

Letters of the shape suffixes: B rows, T positions fed now, S positions in the cache and now, G key and value heads,
K size of a head.
"""

import torch
from torch import Tensor

from pipeline.models.config import AnyModel, EncoderDecoder

KeysValues = tuple[Tensor, Tensor]


class LayerCache:
    """The keys and values of one layer, in memory that is allocated once.

    Attributes:
        memory: Keys and values of what the encoder made, once they are known.
    """

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.memory: KeysValues | None = None

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> KeysValues:
        """Store new positions and return all there are, (B, G, S, K)."""
        start, self.length = self.length, self.length + k_BGTK.shape[2]
        self.keys[:, :, start : self.length] = k_BGTK
        self.values[:, :, start : self.length] = v_BGTK
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def select(self, rows_B: Tensor) -> None:
        """Keep these rows in this order; a row may be there several times."""
        self.keys, self.values = self.keys[rows_B], self.values[rows_B]
        if self.memory is not None:
            self.memory = self.memory[0][rows_B], self.memory[1][rows_B]


class Cache:
    """What a model has read so far. Rows may be padded on the left."""

    def __init__(
        self,
        config: AnyModel,
        capacity: int,
        padding_B: Tensor,
        dtype: torch.dtype = torch.float32,
        sees_all_of_first: bool = False,
    ) -> None:
        """Allocate the cache.

        Args:
            capacity: How many positions it can hold, padding included.
            padding_B: How many padding ids each row begins with; the cache lies on its device.
            sees_all_of_first: Whether the first ids that are fed see one another, as a prefix does.
        """
        shape = (len(padding_B), config.kv_heads, capacity, config.head_dim)
        num_layers = config.decoder_layers if isinstance(config, EncoderDecoder) else config.num_layers
        self.layers = [LayerCache(shape, padding_B.device, dtype) for _ in range(num_layers)]
        self.padding_B, self.sees_all_of_first = padding_B, sees_all_of_first
        self.last_position = config.max_seq_len - 1

    @property
    def length(self) -> int:
        """Return how many positions it holds."""
        return self.layers[0].length

    def positions(self, num_new: int) -> Tensor:
        """Return the positions (B, T) of the next ids; padding, and rows that have reached the limit, stay within."""
        columns_T = torch.arange(self.length, self.length + num_new, device=self.padding_B.device)
        return (columns_T - self.padding_B[:, None]).clamp(0, self.last_position)

    def mask(self, num_new: int) -> Tensor:
        """Return which keys each of the next ids may see, (B, 1, T, S): none that is later, none that is padding."""
        keys_S = torch.arange(self.length + num_new, device=self.padding_B.device)
        queries_T1 = keys_S[self.length :, None]
        not_later_TS = keys_S <= queries_T1
        if self.sees_all_of_first and self.length == 0:
            not_later_TS = torch.ones_like(not_later_TS)
        seen_BTS = not_later_TS & (keys_S >= self.padding_B[:, None, None])
        # Padding sees itself, because a softmax over nothing is not a number; nobody sees padding.
        return (seen_BTS | (keys_S == queries_T1)).unsqueeze(1)

    def select(self, rows_B: Tensor) -> None:
        """Keep these rows in this order; a row may be there several times, as beam search wants it."""
        for layer in self.layers:
            layer.select(rows_B)
        self.padding_B = self.padding_B[rows_B]
