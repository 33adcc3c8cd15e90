"""Which tokens each token may see: masks for causes, windows, documents and prefixes, and what layers are told of them.

Letters of the shape suffixes: B rows, T positions that look (queries), S positions that are seen (keys), H heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.cache import Cache
from pipeline.models.config import Shape
from pipeline.models.positions import RelativeBias, Rotary, document_positions, make_rotary


@dataclass(frozen=True)
class Sight:
    """What the layers of one kind share in a pass.

    Attributes:
        mask: True where a query may see a key, or numbers that are added to the scores, (B or 1, H or 1, T, S). Null
            hides nothing, or with `causal` what is later.
        rotary: What `rotate` takes; null where positions are not rotary.
    """

    mask: Tensor | None
    rotary: Rotary | None
    causal: bool


@dataclass(frozen=True)
class View:
    """What the layers of a stack are told about its tokens.

    Attributes:
        everywhere: For the layers that see all; `nearby` is for those with a window.
        ids_BT: The tokens themselves, for routers that look at them.
        real_BT: False at padding; null where there is none.
        memory_BSD: What the encoder made, for cross attention.
        memory_mask: Which of it each position may see, (B, 1, T or 1, S); null is all.
    """

    everywhere: Sight
    nearby: Sight
    ids_BT: Tensor
    real_BT: Tensor | None
    memory_BSD: Tensor | None = None
    memory_mask: Tensor | None = None


@dataclass(frozen=True)
class Place:
    """Where the tokens that are fed now lie.

    Attributes:
        positions: What embeddings and rotations count, (T) or (B, T): from the beginning of each document.
        queries_T: Their columns in the row; `keys_S` are those that can be seen, in a cache the earlier ones too.
        mask: Which keys each may see, (B or 1, 1, T, S); null is all, or all that is not later.
    """

    positions: Tensor
    queries_T: Tensor
    keys_S: Tensor
    mask: Tensor | None


def place(
    ids_BT: Tensor,
    causal: bool,
    documents_BT: Tensor | None = None,
    prefix_BT: Tensor | None = None,
    cache: Cache | None = None,
) -> Place:
    """Say where tokens lie and which of them each may see, whatever the layer.

    Args:
        documents_BT: Numbers the documents of each row; none sees another.
        prefix_BT: True where all of a document may look although it comes later.
        cache: What comes before; then neither documents nor prefixes are told apart.
    """
    num_new, device = ids_BT.shape[1], ids_BT.device
    if cache is not None:
        keys_S = torch.arange(cache.length + num_new, device=device)
        return Place(cache.positions(num_new), keys_S[cache.length :], keys_S, cache.mask(num_new))
    columns_T = torch.arange(num_new, device=device)
    mask = None if documents_BT is None else same_document(documents_BT, documents_BT)
    if causal and (documents_BT is not None or prefix_BT is not None):
        seen = _not_later(columns_T, columns_T)[None, None]
        seen = seen if prefix_BT is None else seen | prefix_BT[:, None, None]
        mask = seen if mask is None else mask & seen
    positions = columns_T if documents_BT is None else document_positions(documents_BT)
    return Place(positions, columns_T, columns_T, mask)


def look(
    config: Shape, at: Place, causal: bool, relative: RelativeBias | None, dtype: torch.dtype
) -> tuple[Sight, Sight]:
    """Return what the layers see that see all, and what those with a window see."""
    rotary = make_rotary(at.positions, config, dtype) if config.positions == "rotary" else None
    everywhere = Sight(_biased(at.mask, at, causal, relative, dtype), rotary, causal)
    if config.sliding_window is None:
        return everywhere, everywhere
    near = _window(at, config.sliding_window, causal)
    near = near[None, None] if at.mask is None else near & at.mask
    if rotary is not None and config.local_rope_theta is not None:
        rotary = make_rotary(at.positions, config, dtype, config.local_rope_theta)
    return everywhere, Sight(_biased(near, at, causal, relative, dtype), rotary, causal)


def memory_mask(documents_BS: Tensor | None, documents_BU: Tensor | None) -> Tensor | None:
    """Return which of the encoder's positions each of the decoder's may read, (B, 1, U or 1, S), or null for all.

    Args:
        documents_BS: Numbers the encoder's documents, -1 is padding.
        documents_BU: Numbers the decoder's; null reads all that is not padding.
    """
    if documents_BS is None:
        return None
    if documents_BU is None:
        return (documents_BS >= 0)[:, None, None]
    mask = same_document(documents_BU, documents_BS)
    # a document without inputs, such as padding, sees all: a softmax over nothing is not a number
    return mask | ~mask.any(-1, keepdim=True)


def same_document(queries_BT: Tensor, keys_BS: Tensor) -> Tensor:
    """Return which keys are of each query's document, (B, 1, T, S)."""
    return (queries_BT.unsqueeze(2) == keys_BS.unsqueeze(1)).unsqueeze(1)


def _window(at: Place, window: int, causal: bool) -> Tensor:
    """Return which keys are near enough, (T, S): the last `window` positions, or half of them on either side."""
    distance_TS = at.keys_S - at.queries_T.unsqueeze(1)
    return (distance_TS <= 0) & (distance_TS > -window) if causal else distance_TS.abs() <= window // 2


def _not_later(queries_T: Tensor, keys_S: Tensor) -> Tensor:
    return keys_S <= queries_T.unsqueeze(1)


def _biased(
    mask: Tensor | None, at: Place, causal: bool, relative: RelativeBias | None, dtype: torch.dtype
) -> Tensor | None:
    """Return a mask as attention takes it: with relative positions, numbers that are added to the scores."""
    if relative is None:
        return mask
    bias: Tensor = relative(at.queries_T, at.keys_S).to(dtype)
    if mask is None and causal:
        mask = _not_later(at.queries_T, at.keys_S)
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)
