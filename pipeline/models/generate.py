"""Text generation: greedy or sampled, in batches of prompts of any lengths, each position computed once.

Letters of the shape suffixes: B prompts, T positions, V ids of the vocabulary.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.layers import Cache
from pipeline.models.transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_id: int | None = None,
    seed: int = 0,
    first_row: int = 0,
) -> list[list[int]]:
    """Return the new ids for each prompt, without the prompt and without `stop_id`.

    A row ends at `stop_id`, after `max_new_tokens`, or when prompt and new ids together are `max_seq_len` long. What a
    row becomes depends on neither the other prompts nor the padding, up to rounding.

    Args:
        temperature: Divides the logits; None takes the likeliest id every time.
        top_k: If given, only so many of the likeliest ids can be drawn.
        top_p: If given, only the likeliest ids can be drawn that together reach this probability (nucleus sampling,
            Holtzman et al. 2020, arXiv:1904.09751), the last one included.
        seed: With the number of a row it fixes all that is drawn for that row.
        first_row: The number of the first prompt, for a caller that feeds a long list in pieces.

    Raises:
        ConfigError: If a prompt is empty or leaves no room, or a setting is out of its range.
    """
    _check(prompts, model.config.max_seq_len, max_new_tokens, temperature, top_k, top_p)
    randoms = [random.Random(f"{seed}/{first_row + row}") for row in range(len(prompts))]
    new_ids: list[list[int]] = [[] for _ in prompts]
    room = [min(max_new_tokens, model.config.max_seq_len - len(prompt)) for prompt in prompts]
    open_rows = set(range(len(prompts)))
    with _evaluating(model):
        ids_BT, cache = _start(model, prompts, max(room, default=0))
        while open_rows:
            logits_BV = model.logits(model.hidden(ids_BT, cache)[:, -1]).float()
            if temperature is None:
                ids_B = logits_BV.argmax(-1)
            else:
                uniform_B = torch.tensor([r.random() for r in randoms], device=logits_BV.device)
                ids_B = sample(_cooled(logits_BV, temperature), uniform_B, top_k, top_p)
            _append(ids_B.tolist(), new_ids, open_rows, room, stop_id)
            ids_BT = ids_B.unsqueeze(1)
    return new_ids


def sample(logits_BV: Tensor, uniform_B: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Return one id a row, (B,): where a number drawn uniformly from [0, 1) falls on the cumulated probabilities.

    The ids lie from the likeliest to the least likely, those that `top_k` and `top_p` leave out have no length.
    """
    probabilities_BV, ids_BV = logits_BV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        probabilities_BV[:, top_k:] = 0.0
    if top_p is not None:
        mass_B1 = probabilities_BV.sum(-1, keepdim=True)
        before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        probabilities_BV = probabilities_BV.where(before_BV < top_p * mass_B1, 0.0)
    ends_BV = probabilities_BV.cumsum(-1)
    # Rounding can put the point at the very end; it then belongs to the last id that has a length.
    last_B1 = probabilities_BV.count_nonzero(-1).unsqueeze(1) - 1
    point_B1 = uniform_B.unsqueeze(1) * ends_BV[:, -1:]
    choice_B1 = torch.searchsorted(ends_BV, point_B1, right=True).minimum(last_B1)
    return ids_BV.gather(1, choice_B1).squeeze(1)


def _cooled(logits_BV: Tensor, temperature: float) -> Tensor:
    """Return the logits divided by `temperature`, less a number for each row that makes its largest 0.

    Their softmax is the same, and no temperature is so low that a logit overflows to infinity. What 32 bits cannot
    invert counts as the lowest that they can, at which anything but the largest logit already has probability 0.
    """
    peaks_B1 = logits_BV.amax(-1, keepdim=True)
    return (logits_BV - peaks_B1) / max(temperature, torch.finfo(torch.float32).tiny)


def _append(
    next_ids: list[int], new_ids: list[list[int]], open_rows: set[int], room: list[int], stop_id: int | None
) -> None:
    """Give each open row its next id, and close the rows that it ends."""
    for row in tuple(open_rows):
        if next_ids[row] != stop_id:
            new_ids[row].append(next_ids[row])
        if next_ids[row] == stop_id or len(new_ids[row]) == room[row]:
            open_rows.remove(row)


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    """Switch dropout off for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _start(model: Transformer, prompts: Sequence[Sequence[int]], num_new: int) -> tuple[Tensor, Cache]:
    """Return the prompts with padding on their left, (B, T), and an empty cache that has room for what follows."""
    weight = model.embedding.weight
    longest = max(map(len, prompts), default=0)
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    padding_B = torch.tensor(padding, device=weight.device)
    return torch.tensor(rows, device=weight.device), Cache(model.config, longest + num_new, padding_B, weight.dtype)


def _check(
    prompts: Sequence[Sequence[int]],
    max_seq_len: int,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
) -> None:
    problems = []
    for row, prompt in enumerate(prompts):
        if not prompt:
            problems.append(f"prompts.{row}: empty; begin with at least one id, such as the one that ends documents")
        elif len(prompt) >= max_seq_len:
            problems.append(
                f"prompts.{row}: {len(prompt)} ids leave no room in the model's {max_seq_len} positions; shorten it"
            )
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens: wanted at least 1, found {max_new_tokens}")
    if temperature is not None and not 0 < temperature < math.inf:
        problems.append(
            f"temperature: wanted more than 0 and finite, or null for the likeliest id, found {temperature}"
        )
    if temperature is None and (top_k is not None or top_p is not None):
        problems.append("temperature: null takes the likeliest id, so top_k and top_p must be null too")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k: wanted at least 1, or null for no limit, found {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        problems.append(f"top_p: wanted more than 0 and at most 1, or null for no limit, found {top_p}")
    if problems:
        raise ConfigError(*problems)
