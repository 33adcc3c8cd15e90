"""What lies where in flat vectors, by arithmetic; that it is so under DeepSpeed is in tests/numerics."""

from pipeline.parallel.partitions import Cut, Layout, join


def test_a_stack_is_taken_apart_into_matrices():
    # 2 matrices of 6; rank 0 has 5 elements, rank 1 has 7, which begin at place 10 of its partition
    first, second = Cut((2, 2, 3), (0, 5, 12), offset=10).matrices(rank=1)
    assert first == Cut((2, 3), (0, 5, 6), offset=10)
    assert second == Cut((2, 3), (0, 0, 6), offset=11)
    first, second = Cut((2, 2, 3), (0, 5, 12), offset=3).matrices(rank=0)
    assert (first.offset, first.share(0), second.share(0)) == (3, 5, 0)


def test_a_matrix_is_itself():
    cut = Cut((2, 3), (0, 1, 6), offset=4)
    assert list(cut.matrices(rank=0)) == [cut]


def test_a_shared_stack_is_taken_apart_into_shared_matrices():
    for dim in (1, 2):
        cuts = list(Cut((2, 2, 3), (0, 12), offset=0, name="experts.up", sliced=dim).matrices(rank=0))
        assert [(cut.shape, cut.name, cut.sliced) for cut in cuts] == [((2, 3), "experts.up", dim - 1)] * 2


def test_the_shape_of_a_whole():
    rows, columns, alone = (Cut((2, 3), (0, 6), 0, sliced=dim) for dim in (0, 1, None))
    layout = Layout((rows, columns, alone), tensor=4, tensor_rank=1)
    assert [layout.whole_shape(cut) for cut in layout.cuts] == [(8, 3), (2, 12), (2, 3)]


def test_vectors_one_after_another():
    first = Layout((Cut((2, 2), (0, 1, 4), 0), Cut((3,), (0, 0, 3), 3)), rank=1)
    second = Layout((Cut((5,), (0, 2, 5), 1),), rank=1)
    joined = join([first, second], [8, 4])
    assert [cut.offset for cut in joined.cuts] == [0, 3, 9]
    assert [cut.share(joined.rank) for cut in joined.cuts] == [3, 3, 3]
