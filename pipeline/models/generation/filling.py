"""Filling masks with an encoder.

Letters of the shape suffixes: M masks, V ids of the vocabulary.
"""

from collections.abc import Sequence

import torch

from pipeline.models.generation.checks import check_prompts, refuse
from pipeline.models.generation.reading import evaluating, pad
from pipeline.models.generation.settings import FillMask, check_decoding
from pipeline.models.transformer import Transformer

Candidates = list[tuple[int, float]]


@torch.inference_mode()
def fill(
    model: Transformer, rows: Sequence[Sequence[int]], mask_id: int, settings: FillMask | None = None
) -> list[list[Candidates]]:
    """Return for each row, and in it for each place of `mask_id`, the likeliest (id, probability), the likeliest first.

    Every mask is filled as if the others stayed masks. What a row gets does not depend on the other rows.

    Raises:
        ConfigError: If the model is no encoder, or a row is empty, too long or has no mask.
    """
    settings = settings or FillMask()
    refuse(check_decoding(settings, model.config), check_prompts(model.config, rows, mask_id))
    if not rows:
        return []
    with evaluating(model):
        ids_BT, documents_BT = pad(rows, model.embedding.weight.device, left=False)
        masks_BT = (ids_BT == mask_id) & (documents_BT >= 0)
        hidden_BTD = model.hidden(ids_BT, documents=documents_BT)
        probabilities_MV = model.logits(hidden_BTD[masks_BT]).float().softmax(-1)
        best = probabilities_MV.topk(settings.candidates, dim=-1)
    found = [list(zip(*pair, strict=True)) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    counts = masks_BT.sum(1).tolist()
    starts = [sum(counts[:row]) for row in range(len(counts))]
    return [found[start : start + count] for start, count in zip(starts, counts, strict=True)]
