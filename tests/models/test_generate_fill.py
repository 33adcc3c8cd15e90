"""An encoder fills masks."""

import pytest
import torch
from model_variants import ENCODERS, MAX_SEQ_LEN, make

from pipeline.errors import ConfigError
from pipeline.models.generation.filling import fill
from pipeline.models.generation.settings import FillMask

MASK = 3
ROWS = [[1, MASK, 2], [MASK, 4, 5, MASK, 6, 0], [7, 8, 9, 10, MASK]]


@pytest.mark.parametrize("name", ENCODERS)
def test_candidates_are_the_likeliest_and_no_row_changes_another(name):
    model = make(name)
    found = fill(model, ROWS, MASK, FillMask(candidates=4))
    assert [len(masks) for masks in found] == [1, 2, 1]
    for row, masks in zip(ROWS, found, strict=True):
        with torch.no_grad():
            probabilities = model(torch.tensor([row]))[0].softmax(-1)
        places = [place for place, number in enumerate(row) if number == MASK]
        for place, candidates in zip(places, masks, strict=True):
            best = probabilities[place].topk(4)
            assert [number for number, _ in candidates] == best.indices.tolist()
            assert [share for _, share in candidates] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_what_cannot_be_filled_is_refused():
    assert fill(make("bert"), [], MASK) == []
    with pytest.raises(ConfigError) as error:
        fill(make("bert"), [[1, 2], [MASK] * (MAX_SEQ_LEN + 1)], MASK)
    assert error.value.problems == (
        "prompt.0: there is no mask to fill",
        f"prompt.1: {MAX_SEQ_LEN + 1} ids are more than the model's {MAX_SEQ_LEN} positions; shorten it",
    )
    with pytest.raises(ConfigError, match="needs a model of kind 'encoder'"):
        fill(make(), ROWS, MASK)
