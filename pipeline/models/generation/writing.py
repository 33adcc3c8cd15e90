"""Continuing prompts: greedily, by drawing or by beam search; each position is computed once."""

import random
from collections.abc import Callable, Sequence

import torch

from pipeline.models.config import AnyModel
from pipeline.models.generation.beams import search
from pipeline.models.generation.checks import check_prompts, refuse
from pipeline.models.generation.reading import Reader, evaluating
from pipeline.models.generation.rows import Row
from pipeline.models.generation.sampling import Repetition, choose
from pipeline.models.generation.settings import BeamSearch, Greedy, Sample, Writing, check_decoding
from pipeline.models.generation.text import Text
from pipeline.models.transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    decoding: Writing | None = None,
    *,
    max_new_tokens: int,
    end_id: int | None = None,
    start_id: int | None = None,
    seed: int = 0,
    first_row: int = 0,
    texts: Sequence[Text] | None = None,
    watch: Callable[[], None] = lambda: None,
    cached: bool = True,
    sees_prompt: bool = False,
) -> list[list[int]]:
    """Return the new ids for each prompt, without the prompt and without `end_id`.

    A row ends at `end_id`, when its text has a stop string, after `max_new_tokens`, or when what the decoder reads is
    `max_seq_len` long, new ids included. What a row becomes depends on neither the other prompts nor the padding, up to
    rounding.

    Args:
        decoding: Null is greedy.
        max_new_tokens: At least 1.
        start_id: What the decoder of an encoder-decoder begins with; null is `end_id`.
        seed: With the number of a row it fixes all that is drawn for that row.
        first_row: The number of the first prompt, for a caller that feeds a long list in pieces.
        texts: If given, one for each prompt: they follow the rows, end them at their stop strings, and are closed with
            them; a beam search tells them the text it has found.
        watch: Called after every step.
        cached: Whether keys and values are kept; without, the result is the same, and each step takes longer.
        sees_prompt: Whether each token of a prompt sees all of it, as a model needs that was trained on prefixes.

    Raises:
        ConfigError: If the model is an encoder, or a prompt is empty or leaves no room.
    """
    decoding = decoding or Greedy()
    refuse(check_decoding(decoding, model.config), check_prompts(model.config, prompts))
    assert max_new_tokens >= 1
    if not prompts:
        return []
    limits = [min(max_new_tokens, room) for room in _rooms(model.config, prompts)]
    rows = [
        Row(room, end_id, None if texts is None else texts[row], random.Random(f"{seed}/{first_row + row}"))
        for row, room in enumerate(limits)
    ]
    with evaluating(model):
        first_id = end_id if start_id is None else start_id
        reader = Reader(model, prompts, max(limits), first_id, cached, sees_prompt)
        vocab_size = model.config.real_vocab_size
        repetition = Repetition(decoding.repetition_penalty, reader.rows, vocab_size, end_id)
        if isinstance(decoding, BeamSearch):
            search(reader, rows, repetition, decoding, watch)
        else:
            _continue(reader, rows, repetition, decoding, watch)
    return [row.new_ids for row in rows]


def _rooms(config: AnyModel, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return how many ids can follow each prompt."""
    return [config.max_seq_len - (1 if config.kind == "encoder_decoder" else len(prompt)) for prompt in prompts]


def _continue(
    reader: Reader, rows: list[Row], repetition: Repetition, decoding: Greedy | Sample, watch: Callable[[], None]
) -> None:
    """Give every row one id after another until all are closed."""
    new_ids = None
    while True:
        logits_BV = repetition.apply(reader.read(new_ids))
        new_ids = choose(logits_BV, decoding, [row.draws.random() for row in rows]).tolist()
        repetition.add(new_ids)
        for row, new_id in zip(rows, new_ids, strict=True):
            row.take(new_id)
        watch()
        kept = [number for number, row in enumerate(rows) if not row.closed]
        if not kept:
            return
        if len(kept) <= len(rows) // 2:  # fewer rows are worth a copy of what they have read
            reader.select(kept)
            repetition.select(kept)
            rows, new_ids = [rows[number] for number in kept], [new_ids[number] for number in kept]
