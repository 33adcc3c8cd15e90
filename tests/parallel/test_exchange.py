"""Who works on which matrix, and how they come together in one process and on real ranks."""

import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist

from pipeline.parallel.exchange import Exchange, WholeMatrices, owners
from pipeline.parallel.partitions import Cut, Layout


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


SHAPES = {"rows": ((8, 3), 0), "columns": ((5, 4), 1), "alone": ((4, 4), None), "square": ((4, 4), 1)}


def put_in_vector(tensor, tensor_rank, data, data_rank):
    """Return the vector of a rank, in which each whole matrix counts from a number of its own, and its layout.

    Each data-parallel rank has an equal piece of all that its tensor-parallel rank has, whatever it cuts through.
    """
    slices, cuts, start = [], [], 0
    for number, (name, (shape, dim)) in enumerate(SHAPES.items()):
        whole = torch.arange(float(shape[0] * shape[1])).view(shape) + 100 * number
        slices.append(whole if dim is None else whole.chunk(tensor, dim)[tensor_rank])
        cuts.append((name, tuple(slices[-1].shape), start, dim))
        start += slices[-1].numel()
    vector = torch.cat([piece.reshape(-1) for piece in slices])
    ends = [len(vector) * rank // data for rank in range(data + 1)]
    laid_out = []
    for name, shape, begin, dim in cuts:
        bounds = tuple(min(max(end - begin, 0), shape[0] * shape[1]) for end in ends)
        offset = min(max(begin - ends[data_rank], 0), ends[data_rank + 1] - ends[data_rank])
        laid_out.append(Cut(shape, bounds, offset, name, dim))
    return vector[ends[data_rank] : ends[data_rank + 1]].clone(), tuple(laid_out)


def exchange_on_a_rank(rank, world, tensor):
    groups = [dist.new_group(list(range(first, world, tensor))) for first in range(tensor)]
    shared = [dist.new_group(list(range(first, first + tensor))) for first in range(0, world, tensor)]
    data_rank, tensor_rank = divmod(rank, tensor)
    vector, cuts = put_in_vector(tensor, tensor_rank, world // tensor, data_rank)
    layout = Layout(cuts, data_rank, groups[tensor_rank], tensor, tensor_rank, shared[data_rank])
    exchange = WholeMatrices(layout)
    alone, alike = exchange.gather(vector)
    for matrix in (*alone, *alike):
        (number,) = set((matrix / 100).floor().int().flatten().tolist())
        shape, dim = list(SHAPES.values())[number]
        assert torch.equal(matrix, torch.arange(float(shape[0] * shape[1])).view(shape) + 100 * number)
        assert any(matrix is other for other in alone) == (dim is not None)
    counts = torch.tensor([len(alone), len(alike)])
    dist.all_reduce(counts)
    assert counts.tolist() == [3, tensor]
    assert len(alone) <= 2  # the work is spread
    wanted = vector * 2
    exchange.scatter([matrix * 2 for matrix in alone], [matrix * 2 for matrix in alike], vector)
    assert torch.equal(vector, wanted)


@pytest.mark.parametrize(("world", "tensor"), [(2, 2), (4, 2), (4, 4)])
def test_shared_matrices_come_together_and_go_back(world, tensor):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world):
        if child := os.fork():
            ranks.append(child)
            continue
        status = 1
        try:
            torch.set_num_threads(1)
            store = dist.TCPStore("127.0.0.1", port, world, is_master=rank == 0)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            exchange_on_a_rank(rank, world, tensor)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks] == [0] * world
