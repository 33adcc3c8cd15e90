import pytest

from pipeline.errors import ConfigError
from pipeline.parallel.mesh import shape_batch


@pytest.mark.parametrize(
    ("rows", "microbatch", "ranks", "expected"),
    [
        (16, None, 1, (16, 1)),
        (16, None, 4, (4, 1)),
        (16, 2, 4, (2, 2)),
        (16, 99, 4, (4, 1)),  # a microbatch larger than a rank's share is that share
    ],
)
def test_a_batch_is_rows_times_accumulation_times_ranks(rows, microbatch, ranks, expected):
    shape = shape_batch(rows, microbatch, ranks)
    assert (shape.microbatch, shape.accumulation) == expected
    assert shape.microbatch * shape.accumulation * shape.data_ranks == rows


def test_every_row_is_fed_by_exactly_one_rank():
    shape = shape_batch(24, 3, 4)
    fed = [row for rank in range(4) for rows in shape.microbatches(rank) for row in range(24)[rows]]
    assert fed == list(range(24))


def test_numbers_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="run.ranks: a batch of 16 rows does not divide among 3 data-parallel ranks"):
        shape_batch(16, None, 3)
    with pytest.raises(ConfigError, match="run.microbatch_sequences: the 8 rows of a rank do not divide"):
        shape_batch(16, 3, 2)
