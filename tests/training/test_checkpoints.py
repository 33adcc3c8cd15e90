"""The format of checkpoints, how slices of tensors are cut and joined, which ones stay, and models made of them."""

import json
import math
import random
import shutil
from itertools import product

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.artifact import FileRecord
from pipeline.errors import ArtifactError, TrainingError
from pipeline.parallel.mesh import Place
from pipeline.stage import Checkpoints
from pipeline.training.checkpoints.format import (
    WEIGHTS,
    Index,
    Ranks,
    Scalar,
    complete_checkpoints,
    join_parts,
    read_header,
    read_index,
    write_index,
)
from pipeline.training.checkpoints.holdings import Holding
from pipeline.training.checkpoints.read import read_weights, write_weights
from pipeline.training.checkpoints.reslice import WHOLE, Lying, Source, transfer
from pipeline.training.checkpoints.retention import Summary, checkpoint_bytes, most_at_once, superseded
from pipeline.training.checkpoints.write import Snapshot, sum_of_squares, write_part

TENSORS = {  # shape, the dimension along which ranks share it, and the type
    "embedding.weight": ((12, 5), 0, torch.float32),
    "down.weight": ((6, 8), 1, torch.float32),
    "experts.down": ((3, 5, 8), 2, torch.float32),
    "norm.weight": ((7,), None, torch.float32),
    "half": ((5,), None, torch.bfloat16),
    "flags": ((3,), None, torch.bool),
    "count": ((), None, torch.int64),
    "wide": ((3, 3), None, torch.float64),
}


def whole_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=generator) * 9).to(dtype) for name, (shape, _, dtype) in TENSORS.items()
    }


def holdings(place, data_shares):
    """Yield what a rank holds: its slice of each tensor, of which data-parallel ranks have pieces, or the same."""
    for name, whole in whole_tensors().items():
        dim = TENSORS[name][1]
        mine = whole if dim is None else whole.chunk(place.tensor, dim)[place.tensor_rank]
        row, copies, copy = mine.reshape(-1), 1 if dim is not None else place.tensor, 0
        copy = place.tensor_rank if dim is None else 0
        start, stop = 0, len(row)
        if data_shares:
            piece = -(-len(row) // place.data)
            start, stop = min(place.data_rank * piece, len(row)), min((place.data_rank + 1) * piece, len(row))
        else:
            copies, copy = copies * place.data, copy * place.data + place.data_rank
        states = {WEIGHTS: row[start:stop]}
        if name == "down.weight":
            states["exp_avg"] = row[start:stop] / 2
        slice_of = 0 if dim is None else place.tensor_rank
        yield Holding(name, tuple(whole.shape), dim, slice_of, start, stop, copies, copy, states)


def write(directory, world=1, tensor=1, data_shares=True, about=None, **extras):
    """Write a checkpoint as the ranks do."""
    directory.mkdir(parents=True)
    parts, snapshot = [], Snapshot()
    for rank in range(world):
        snapshot.take(holdings(Place(rank, world, tensor), data_shares))
        parts.append(write_part(directory, snapshot, rank, world))
    files, tensors = join_parts(parts)
    for name, data in extras.items():
        (directory / name).write_bytes(data)
        files[name] = FileRecord(bytes=len(data), xxh128=xxhash.xxh3_128_hexdigest(data))
    index = Index(
        step=7,
        temporary=False,
        validation_loss=0.1 + 0.2,
        ranks=Ranks(data=world // tensor, tensor=tensor, zero=3),
        notes={"losses": [1 / 3, 1e-300], "10": {"9": None}},
        about=about or {},
        scaler={},
        scalars={"step": Scalar(dtype="float32", values={"down.weight": 7.0})},
        files=files,
        tensors=tensors,
    )
    write_index(directory, index)
    return directory


LAYOUTS = [(1, 1, True), (2, 1, True), (2, 2, True), (4, 2, False), (8, 4, True), (5, 1, True)]


@pytest.mark.parametrize(("world", "tensor", "data_shares"), LAYOUTS)
def test_what_ranks_wrote_is_whole_again(tmp_path, world, tensor, data_shares):
    found = dict(read_weights(write(tmp_path / "x", world, tensor, data_shares)))
    assert found.keys() == TENSORS.keys()
    for name, wanted in whole_tensors().items():
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name], wanted), name


@pytest.mark.parametrize(("world", "tensor", "data_shares"), LAYOUTS)
def test_any_slice_is_read_from_any_layout(tmp_path, world, tensor, data_shares):
    checkpoint = write(tmp_path / "x", world, tensor, data_shares)
    source, chance, wholes = Source(checkpoint, read_index(checkpoint)), random.Random(0), whole_tensors()
    for (name, (_, dim, dtype)), parts in product(TENSORS.items(), (1, 2, 4)):
        for part in range(parts) if dim is not None else (0,):
            mine = wholes[name] if dim is None else wholes[name].chunk(parts, dim)[part]
            row = mine.reshape(-1)
            start = chance.randrange(len(row))
            stop = chance.randrange(start, len(row)) + 1
            found = torch.zeros(stop - start, dtype=dtype)
            source.fill(name, WEIGHTS, found, (start, stop), (part, parts) if dim is not None else WHOLE, dim)
            assert torch.equal(found, row[start:stop]), (name, part, parts, start, stop)


def test_ranges_of_slices_have_in_common_what_they_have():
    chance = random.Random(1)
    for _ in range(300):
        rows, columns = chance.randint(1, 5), 12
        whole = torch.arange(rows * columns).view(rows, columns)
        ranges = []
        for parts in (chance.choice([1, 2, 3, 4]), chance.choice([1, 2, 3, 4])):
            part, size = chance.randrange(parts), rows * columns // parts
            start = chance.randrange(size)
            stop = chance.randint(start + 1, size)
            numbers = whole.chunk(parts, 1)[part].reshape(-1)[start:stop]
            ranges.append((numbers.clone(), Lying.of((rows, columns), 1, (part, parts), (start, stop))))
        (source, lies), (wanted, there) = ranges
        found = torch.full_like(wanted, -1)
        transfer(source, lies, found, there)
        common = set(source.tolist()) & set(wanted.tolist())
        assert found.tolist() == [number if number in common else -1 for number in wanted.tolist()]
        assert lies.overlaps(there) or not common


def test_files_open_with_the_library_of_safetensors(tmp_path):
    checkpoint, wanted = write(tmp_path / "x"), whole_tensors()
    found = load_file(checkpoint / "weights-00000-of-00001.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name].reshape(-1)) for name in wanted)
    with safe_open(checkpoint / "optimizer-00000-of-00001.safetensors", "pt") as file:
        assert list(file.keys()) == ["exp_avg/down.weight"]
        assert torch.equal(file.get_tensor("exp_avg/down.weight"), wanted["down.weight"].view(-1) / 2)
    tensors, begin = read_header(checkpoint / "weights-00000-of-00001.safetensors")
    assert begin % 8 == 0
    assert all(tensors[n]["data_offsets"][0] % w.dtype.itemsize == 0 for n, w in wanted.items())


def test_checksums_and_sums_are_those_of_what_was_written(tmp_path):
    checkpoint = write(tmp_path / "x", 4, 2)
    index = read_index(checkpoint)
    for name, record in index.files.items():
        data = (checkpoint / name).read_bytes()
        assert (record.bytes, record.xxh128) == (len(data), xxhash.xxh3_128_hexdigest(data))
    for name, wanted in whole_tensors().items():
        assert index.tensors[name].squares[WEIGHTS] == pytest.approx(wanted.double().square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_found_anywhere(bad):
    numbers = torch.ones(200_001)
    assert sum_of_squares(numbers) == 200_001
    for place in (0, 65_535, 65_536, 200_000):
        spoilt = numbers.clone()
        spoilt[place] = bad
        assert not math.isfinite(sum_of_squares(spoilt))
        assert not math.isfinite(sum_of_squares(spoilt.bfloat16()))


def test_what_is_not_finite_is_named(tmp_path):
    numbers = {WEIGHTS: torch.ones(3), "exp_avg": torch.tensor([0, math.nan, 0])}
    snapshot = Snapshot()
    snapshot.take([Holding("up.weight", (3,), None, 0, 0, 3, 1, 0, numbers)])
    with pytest.raises(TrainingError, match="'exp_avg' of 'up.weight' has numbers that are not finite"):
        write_part(tmp_path, snapshot, 0, 1)


def test_a_snapshot_does_not_follow_what_changes(tmp_path):
    numbers, snapshot = torch.ones(3), Snapshot()
    holding = Holding("w", (3,), None, 0, 0, 3, 1, 0, {WEIGHTS: numbers})
    snapshot.take([holding])
    numbers.fill_(2)
    write_part(tmp_path, snapshot, 0, 1)
    assert load_file(tmp_path / "weights-00000-of-00001.safetensors")["w"].tolist() == [1, 1, 1]
    snapshot.take([holding])
    write_part(tmp_path, snapshot, 0, 1)
    assert load_file(tmp_path / "weights-00000-of-00001.safetensors")["w"].tolist() == [2, 2, 2]


def test_the_index_comes_back(tmp_path):
    index = read_index(write(tmp_path / "x", 2))
    assert index.notes == {"losses": [1 / 3, 1e-300], "10": {"9": None}}
    assert index.validation_loss == 0.1 + 0.2
    assert str(index.ranks) == "2 ranks, ZeRO stage 3"
    assert str(Ranks(data=1, tensor=1, zero=0)) == "1 rank, ZeRO stage 0"


def test_no_byte_of_the_index_changes_unnoticed(tmp_path):
    checkpoint = write(tmp_path / "x")
    path, wanted = checkpoint / "checkpoint.json", read_index(checkpoint)
    data = path.read_bytes()
    noticed = 0
    for place in range(0, len(data), 5):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            found = read_index(checkpoint)
        except ArtifactError:
            noticed += 1
        else:
            assert found == wanted  # white space
    assert noticed > len(data) / 5 / 2
    path.write_text('{"step": 3}')
    with pytest.raises(ArtifactError, match="not the index of a checkpoint of this version"):
        read_index(checkpoint)


def test_only_complete_checkpoints_count(tmp_path):
    for name in ("step-00000002", "step-00000010.1.tmp", "step-00000009.damaged", "step-123456789"):
        write(tmp_path / name)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-123456789", "step-00000002"]


def going(settings, **found):
    """Return which of checkpoints go: "p" is a permanent one, "t" a temporary one, with a loss behind it perhaps."""
    steps = {int(name[1:]): Summary(how[0] == "t", float(how[1:]) if how[1:] else None) for name, how in found.items()}
    return superseded(steps, settings)


def test_which_checkpoints_go():
    assert going(Checkpoints(keep=2)) == []
    assert going(Checkpoints(keep=2), s1="p", s2="p", s3="p") == [1]
    assert going(Checkpoints(keep=1), s1="p", s2="p", s3="p") == [1, 2]
    # temporary ones count for nothing, and stay until the next one, whatever that is
    assert going(Checkpoints(keep=1), s1="p", s2="t") == []
    assert going(Checkpoints(keep=1), s1="p", s2="t", s3="t") == [2]
    assert going(Checkpoints(keep=2), s1="p", s2="t", s3="p") == [2]
    # every fourth for ever
    assert going(Checkpoints(keep=1, keep_every_steps=4), s2="p", s4="p", s6="p", s8="p", s10="p") == [2, 6]
    assert going(Checkpoints(keep=1, keep_every_steps=4), s4="t", s5="p") == [4]
    # the best, of two that are as good the first
    assert going(Checkpoints(keep=1, keep_best=True), s1="p3", s2="p1", s3="p2", s4="p") == [1, 3]
    assert going(Checkpoints(keep=1, keep_best=True), s1="p1", s2="p1", s3="p1") == [2]
    assert going(Checkpoints(keep=1, keep_best=False), s1="p1", s2="p3") == [1]


def test_how_many_are_there_at_once():
    for settings in (
        Checkpoints(every_steps=10, keep=2),
        Checkpoints(every_steps=10, keep=1, keep_every_steps=30),
        Checkpoints(every_steps=7, keep=2, keep_every_steps=14, keep_best=True),
        Checkpoints(every_steps=50, keep=3),
        Checkpoints(every_steps=1000, keep=3),
    ):
        found, most = {}, 0
        for step in range(1, 101):
            if step % settings.every_steps == 0 or step == 100:
                most = max(most, len(found) + 1)  # while it is written
                found[step] = Summary(False, 1 / step if step < 40 else 1.0)
                for gone in superseded(found, settings):
                    del found[gone]
        assert most <= most_at_once(settings, 100) <= most + 1, settings
    with_minutes = Checkpoints(every_steps=10, every_minutes=5)
    assert most_at_once(with_minutes, 100) == most_at_once(Checkpoints(every_steps=10), 100) + 1
    assert checkpoint_bytes(1000, 2) == 12000


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_alone_in_one_file(tmp_path, precision, dtype):
    checkpoint = write(tmp_path / "x", 4, 2, about={"precision": precision})
    record = write_weights(checkpoint, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    assert (record.bytes, record.xxh128) == (len(data), xxhash.xxh3_128_hexdigest(data))
    found = load_file(tmp_path / "model.safetensors")
    for name, wanted in whole_tensors().items():
        kept = wanted.to(dtype) if precision == "bf16" and wanted.is_floating_point() else wanted
        assert found[name].dtype == kept.dtype
        assert torch.equal(found[name], kept)


def test_damaged_weights_are_not_read(tmp_path):
    checkpoint = write(tmp_path / "x", 2)
    optimizer = checkpoint / "optimizer-00000-of-00002.safetensors"
    optimizer.unlink()  # nobody asks for it
    assert len(list(read_weights(checkpoint))) == len(TENSORS)
    path = checkpoint / "weights-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="weights-00001-of-00002.safetensors: damaged: it is not as it was written"):
        next(read_weights(checkpoint))
    path.unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        next(read_weights(checkpoint))
    shutil.rmtree(checkpoint)
    with pytest.raises(ArtifactError, match="wanted a checkpoint"):
        next(read_weights(checkpoint))


def test_headers_that_are_none(tmp_path):
    path = tmp_path / "x.safetensors"
    for data in (b"", b"\xff" * 100, (4).to_bytes(8, "little") + b"none"):
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match="damaged"):
            read_header(path)
    path.write_bytes((2).to_bytes(8, "little") + json.dumps({}).encode())
    assert read_header(path) == ({}, 10)
