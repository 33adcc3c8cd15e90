"""How whole matrices come out of the flat vectors that ranks share, and go back into them."""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, compress, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.partitions import Cut, Layout


class WholeMatrices:
    """Brings every matrix to one rank: first over those that share the vector, then over tensor-parallel ranks.

    A matrix that every tensor-parallel rank has by itself comes to one rank of each, which all work on it: it must be
    in the same order and company on each, so that its numbers are the same in every bit.
    """

    def __init__(self, layout: Layout) -> None:
        self._data = Exchange(layout)
        mine = self._data.mine
        self._is_sliced = [cut.sliced is not None and layout.tensor > 1 for cut in mine]
        self._sliced = list(compress(mine, self._is_sliced))
        self._tensor = Exchange(_lay_out_slices(self._sliced, layout)) if self._sliced else None
        self._wholes = [] if self._tensor is None else self._tensor.mine

    def gather(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the matrices that only this rank works on, and those that its tensor-parallel ranks work on too."""
        found = self._data.gather(flat)
        alike = [matrix for matrix, is_sliced in zip(found, self._is_sliced, strict=True) if not is_sliced]
        if self._tensor is None:
            return [], alike
        slices = zip(compress(found, self._is_sliced), self._sliced, strict=True)
        wholes = self._tensor.gather(torch.cat([_turn(matrix, cut).reshape(-1) for matrix, cut in slices]))
        return [_turn(whole, cut) for whole, cut in zip(wholes, self._wholes, strict=True)], alike

    def scatter(self, alone: Sequence[Tensor], alike: Sequence[Tensor], flat: Tensor) -> None:
        """Write matrices, both in the order of `gather`, back to where their pieces lie in the vector of each rank."""
        slices: list[Tensor] = []
        if self._tensor is not None:
            sizes = [math.prod(cut.shape) for cut in self._sliced]
            vector = flat.new_empty(sum(sizes))
            self._tensor.scatter([_turn(whole, cut) for whole, cut in zip(alone, self._wholes, strict=True)], vector)
            for piece, cut in zip(torch.split(vector, sizes), self._sliced, strict=True):
                slices.append(piece.view(cut.shape[::-1]).mT if cut.sliced == 1 else piece.view(cut.shape))
        rest, others = iter(slices), iter(alike)
        self._data.scatter([next(rest if is_sliced else others) for is_sliced in self._is_sliced], flat)


def _turn(matrix: Tensor, cut: Cut) -> Tensor:
    """Turn a matrix that is shared by columns, so that it is shared by rows; and back."""
    return matrix.mT if cut.sliced == 1 else matrix


def _lay_out_slices(slices: Sequence[Cut], layout: Layout) -> Layout:
    """Lay out what one rank has of matrices that tensor-parallel ranks share: turned slices, one after another."""
    cuts = []
    starts = accumulate((math.prod(cut.shape) for cut in slices), initial=0)
    for cut, start in zip(slices, starts, strict=False):
        rows, columns = cut.shape[::-1] if cut.sliced == 1 else cut.shape
        bounds = tuple(rank * rows * columns for rank in range(layout.tensor + 1))
        cuts.append(Cut((rows * layout.tensor, columns), bounds, start, cut.name, cut.sliced))
    return Layout(tuple(cuts), layout.tensor_rank, layout.tensor_group)


class Exchange:
    """Brings the pieces of every matrix to one rank that owns it, and takes them back.

    Each rank sends and receives about as much as its partition
    holds, whatever the number of ranks; where no matrix is cut nothing is sent.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.matrices = layout.matrices()
        self.owners = owners(self.matrices)
        ranks = range(layout.world)
        self.mine = [matrix for matrix, owner in self._owned() if owner == layout.rank]
        self.sent = [sum(m.share(layout.rank) for m, owner in self._owned() if owner == rank) for rank in ranks]
        self.received = [sum(m.share(rank) for m in self.mine) for rank in ranks]
        self.is_cut = any(m.share(owner) < math.prod(m.shape) for m, owner in self._owned())
        self.travelling = [matrix for matrix, _ in sorted(self._owned(), key=lambda owned: owned[1])]  # by owner

    def gather(self, flat: Tensor) -> list[Tensor]:
        """Return the whole matrices that this rank owns, out of a vector laid out like the partition."""
        if not self.is_cut:
            return [self._piece(flat, matrix).view(matrix.shape) for matrix in self.mine]
        received = flat.new_empty(sum(self.received))
        outgoing = torch.cat([self._piece(flat, matrix) for matrix in self.travelling])
        dist.all_to_all_single(received, outgoing, self.received, self.sent, group=self.layout.group)
        pieces = [
            torch.split(block, [matrix.share(rank) for matrix in self.mine])
            for rank, block in enumerate(torch.split(received, self.received))
        ]
        return [torch.cat(parts).view(m.shape) for m, parts in zip(self.mine, zip(*pieces, strict=True), strict=True)]

    def scatter(self, matrices: Sequence[Tensor], flat: Tensor) -> None:
        """Write matrices, in the order of `gather`, back to where their pieces lie in the vector of each rank."""
        if not self.is_cut:
            for matrix, cut in zip(matrices, self.mine, strict=True):
                self._piece(flat, cut).copy_(matrix.reshape(-1))
            return
        parts: list[list[Tensor]] = [[] for _ in range(self.layout.world)]
        for matrix, cut in zip(matrices, self.mine, strict=True):
            for rank, (start, stop) in enumerate(pairwise(cut.bounds)):
                parts[rank].append(matrix.reshape(-1)[start:stop])
        outgoing = torch.cat([part for rank in parts for part in rank]) if matrices else flat.new_empty(0)
        incoming = flat.new_empty(sum(self.sent))
        dist.all_to_all_single(incoming, outgoing, self.sent, self.received, group=self.layout.group)
        shares = [matrix.share(self.layout.rank) for matrix in self.travelling]
        for cut, piece in zip(self.travelling, torch.split(incoming, shares), strict=True):
            self._piece(flat, cut).copy_(piece)

    def _owned(self) -> Iterator[tuple[Cut, int]]:
        return zip(self.matrices, self.owners, strict=True)

    def _piece(self, flat: Tensor, matrix: Cut) -> Tensor:
        return flat.narrow(0, matrix.offset, matrix.share(self.layout.rank))


def owners(matrices: Sequence[Cut]) -> list[int]:
    """Return the rank that owns each matrix: who holds all of it, else the one with the least work so far.

    The work is that of a product of the matrix with itself. Every rank comes to the same answer.
    """
    work = [0] * (len(matrices[0].bounds) - 1)
    found = [next((r for r in range(len(work)) if m.share(r) == math.prod(m.shape)), None) for m in matrices]
    costs = [math.prod(matrix.shape) * min(matrix.shape) for matrix in matrices]
    for owner, cost in zip(found, costs, strict=True):
        if owner is not None:
            work[owner] += cost
    for index in sorted(range(len(matrices)), key=lambda index: -costs[index]):
        if found[index] is None:
            found[index] = work.index(min(work))
            work[work.index(min(work))] += costs[index]
    return [owner for owner in found if owner is not None]
