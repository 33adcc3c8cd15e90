"""What lies where in flat vectors, by arithmetic; that matrices come together on real ranks is in tests/numerics."""

import torch

from pipeline.parallel.partitions import Cut, Exchange, Layout, owners


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


def test_whole_matrices_stay_and_cut_ones_go_where_there_is_least_to_do():
    whole, empty = Cut((4, 4), (0, 16, 16), 0), Cut((2, 2), (0, 0, 4), 0)
    cut, small = Cut((3, 3), (0, 4, 9), 0), Cut((1, 2), (0, 1, 2), 0)
    assert owners([whole, empty, cut, small]) == [0, 1, 1, 1]
    even = [Cut((4, 4), (0, 8, 16), 16 * i) for i in range(4)]
    assert sorted(owners(even)) == [0, 0, 1, 1]


def test_one_process_gathers_views_and_scatters_into_them():
    layout = Layout((Cut((2, 2), (0, 4), 0), Cut((2, 1, 3), (0, 6), 4)))
    flat = torch.arange(12.0)
    exchange = Exchange(layout)
    matrices = exchange.gather(flat)
    assert [matrix.tolist() for matrix in matrices] == [[[0, 1], [2, 3]], [[4, 5, 6]], [[7, 8, 9]]]
    exchange.scatter([matrix * 2 for matrix in matrices], flat)
    assert flat.tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 10, 11]  # the padding stays
