import itertools

import datasets
import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifact import record_file
from pipeline.errors import ArtifactError
from pipeline.text.token_parts import TokenWriter, open_tokens

BATCHES = [  # ids, sources, tokens, how many each document has, bytes, hashes
    (["a", "b", "c"], ["s", "s", "t"], [5, 6, 0, 0, 7, 0], [3, 1, 2], [10, 0, 3], [1, 2**64 - 1, 3]),
    (["d"], ["s"], [9, 0], [2], [4], [4]),
    (["e", "f"], ["t", "t"], [1, 2, 3, 0, 8, 0], [4, 2], [7, 2], [5, 6]),
]
TOKENS = [token for batch in BATCHES for token in batch[2]]
OFFSETS = [[0, 3, 4, 6], [6, 8], [8, 12, 14]]


def write(path, batches=BATCHES, dtype="uint16", **options):
    with TokenWriter(path, dtype, **options) as writer:
        for batch in batches:
            writer.add(*batch)
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "part.arrow")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_part_comes_back_as_written(tmp_path, dtype):
    part = open_tokens(write(tmp_path / "part.arrow", dtype=dtype))
    assert (part.num_batches, part.num_documents, part.num_tokens) == (3, 6, 14)
    assert part.starts.tolist() == [0, 6, 8, 14]
    assert part.first_documents.tolist() == [0, 3, 4, 6]
    assert part.flat.dtype == dtype
    for number, (ids, sources, tokens, lengths, num_bytes, hashes) in enumerate(BATCHES):
        place = part.places[number]
        assert part.flat[place : place + len(tokens)].tolist() == tokens
        offsets = part.offsets(number)
        assert (offsets.dtype, offsets.tolist()) == (np.int64, OFFSETS[number])
        assert np.diff(offsets).tolist() == lengths
        found = part.rows(number)
        assert (*found[:2], found[2].tolist(), found[3].tolist()) == (ids, sources, num_bytes, hashes)


def test_any_stretch_of_tokens_can_be_read(path):
    part = open_tokens(path)
    for start in range(len(TOKENS) + 1):
        for stop in range(start, len(TOKENS) + 1):
            assert part.tokens(start, stop).tolist() == TOKENS[start:stop]


def test_tokens_within_a_batch_are_a_view_of_the_file(path):
    part = open_tokens(path)
    assert np.shares_memory(part.tokens(8, 14), part.flat)
    assert not part.flat.flags.writeable
    assert part.flat.nbytes == path.stat().st_size


def test_opening_a_large_part_reads_nothing_of_it(tmp_path):
    path, count = tmp_path / "part.arrow", 4_000_000
    write(path, [(["a"], ["s"], np.zeros(count, np.uint16), [count], [count], [1])])
    before = pa.total_allocated_bytes()
    part = open_tokens(path)
    assert pa.total_allocated_bytes() - before < 100_000
    assert part.num_tokens == count


def test_a_part_is_what_arrow_itself_writes_and_reads(tmp_path, path):
    with pa.ipc.open_stream(path) as stream:
        schema, batches = stream.schema, list(stream)
    kinds = {field.name: str(field.type) for field in schema}
    assert kinds == {
        "id": "string",
        "source": "string",
        "input_ids": "list<item: uint16>",
        "num_bytes": "int64",
        "text_hash": "uint64",
    }
    assert [batch.num_rows for batch in batches] == [3, 1, 2]
    with pa.OSFile(str(tmp_path / "other.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    assert (tmp_path / "other.arrow").read_bytes() == path.read_bytes()


def test_datasets_opens_a_part(path):
    rows = datasets.Dataset.from_file(str(path))
    assert rows["input_ids"][:] == [[5, 6, 0], [0], [7, 0], [9, 0], [1, 2, 3, 0], [8, 0]]
    assert rows["id"][:] == list("abcdef")


@pytest.mark.parametrize("chosen", [[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 1, 0]])
def test_only_chosen_documents_are_written(tmp_path, chosen):
    columns = [pa.array(column) if isinstance(column[0], str) else column for column in BATCHES[0]]
    path = tmp_path / "part.arrow"
    with TokenWriter(path, "uint16") as writer:
        writer.add(*columns, np.array(chosen, bool))
        writer.add(*columns, np.zeros(3, bool))  # leaves no batch behind
    part = open_tokens(path)
    rows = [row for row, wanted in enumerate(chosen) if wanted]
    offsets = part.offsets(0).tolist()
    documents = [[5, 6, 0], [0], [7, 0]]
    stored = [part.tokens(a, b).tolist() for a, b in itertools.pairwise(offsets)]
    assert stored == [documents[row] for row in rows]
    ids, sources, num_bytes, hashes = part.rows(0)
    assert ids == [BATCHES[0][0][row] for row in rows]
    assert sources == [BATCHES[0][1][row] for row in rows]
    assert num_bytes.tolist() == [BATCHES[0][4][row] for row in rows]
    assert hashes.tolist() == [BATCHES[0][5][row] for row in rows]
    assert part.num_batches == 1


@pytest.mark.parametrize("done", [0, 1, 2, 3])
@pytest.mark.parametrize("torn", [b"", b"half a batch"])
def test_a_part_is_gone_on_with_behind_what_was_durable(tmp_path, path, done, torn):
    other = tmp_path / "other.arrow"
    with pytest.raises(KeyboardInterrupt), TokenWriter(other, "uint16") as writer:
        for batch in BATCHES[:done]:
            writer.add(*batch)
        record = writer.sync()
        assert record == record_file(other)
        for batch in BATCHES[done:]:
            writer.add(*batch)
        raise KeyboardInterrupt
    other.write_bytes(other.read_bytes() + torn)
    write(other, BATCHES[done:], at=record)
    assert other.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_beginning_is_not_gone_on_with(path, damage):
    data = bytearray(path.read_bytes())
    record = record_file(path)
    data[100] ^= 1
    path.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(ArtifactError, match=rf"part\.arrow: does not begin with the {record.bytes} bytes"):
        TokenWriter(path, "uint16", at=record)


@pytest.mark.parametrize("content", [b"", b"not arrow at all, but long enough to look at"])
def test_a_file_that_is_not_arrow_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "part.arrow"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"part\.arrow: cannot be read as tokens"):
        open_tokens(path)


def test_a_part_that_is_cut_off_is_an_error_that_names_it(path):
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match=r"part\.arrow: cannot be read as tokens"):
        open_tokens(path)


def test_other_columns_are_an_error_that_names_them(tmp_path):
    path = tmp_path / "part.arrow"
    schema = pa.schema([("id", pa.string()), ("input_ids", pa.list_(pa.int32()))])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema):
        pass
    with pytest.raises(ArtifactError, match=r"part\.arrow: wanted the columns id, source, .*, found id: string, input"):
        open_tokens(path)


def test_a_part_without_documents_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match=r"part\.arrow: holds no documents"):
        open_tokens(write(tmp_path / "part.arrow", []))
