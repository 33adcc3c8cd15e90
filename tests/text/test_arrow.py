import datasets
import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import ArtifactError
from pipeline.text import arrow
from pipeline.text.arrow import (
    REJECTS,
    Document,
    Reject,
    RowWriter,
    open_tokens,
    read_corpus,
    read_ids,
    read_rejects,
    write_corpus,
    write_tokens,
)

DOCUMENTS = [Document(f"d{n}", f"text {n} é漢😀" * (n + 1), "test", '{"n": 1}') for n in range(600)]


def write_three(path, dtype="uint16"):
    write_tokens(
        path,
        ["a", "b", "c"],
        np.array([5, 6, 0, 0, 7, 0], dtype),
        np.array([3, 1, 2]),
        np.array([10, 0, 3]),
        np.array([1, 2**64 - 1, 3], np.uint64),
    )


def test_a_corpus_part_comes_back_as_written_in_small_batches(tmp_path):
    path = tmp_path / "part.arrow"
    write_corpus(path, iter(DOCUMENTS))
    assert list(read_corpus(path)) == DOCUMENTS
    assert list(read_ids(path)) == [document.id for document in DOCUMENTS]
    with pa.ipc.open_stream(path) as stream:
        batches = list(stream)
    assert len(batches) > 1
    assert max(batch.nbytes for batch in batches) < 3 * arrow.BATCH_BYTES


def test_a_corpus_part_has_the_schema_of_the_design(tmp_path):
    path = tmp_path / "part.arrow"
    write_corpus(path, DOCUMENTS[:1])
    with pa.ipc.open_stream(path) as stream:
        kinds = {field.name: str(field.type) for field in stream.schema}
    assert kinds == {"id": "string", "text": "large_string", "source": "string", "meta": "string"}


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_corpus(tmp_path / name, DOCUMENTS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_rejects_come_back_with_or_without_text(tmp_path):
    rejects = [Reject("a", "empty", "nothing"), Reject("b", "too_long", "12", "text")]
    writer = RowWriter(tmp_path / "rejects.arrow", REJECTS)
    for reject in rejects:
        writer.add((reject.id, reject.reason, reject.detail, reject.text), 0)
    writer.close()
    assert list(read_rejects(tmp_path / "rejects.arrow")) == rejects


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_tokens_are_views_of_the_file(tmp_path, dtype):
    path = tmp_path / "part.arrow"
    write_three(path, dtype)
    part = open_tokens(path)
    assert part.values.dtype == dtype
    assert part.values.tolist() == [5, 6, 0, 0, 7, 0]
    assert part.offsets.tolist() == [0, 3, 4, 6]
    assert part.num_bytes.tolist() == [10, 0, 3]
    assert part.text_hash.tolist() == [1, 2**64 - 1, 3]
    assert (part.ids, len(part)) == (["a", "b", "c"], 3)
    assert not part.values.flags.owndata
    assert not part.values.flags.writeable


def test_opening_a_large_tokens_part_reads_nothing_of_it(tmp_path):
    path = tmp_path / "part.arrow"
    count = 4_000_000
    one = np.array([count])
    write_tokens(path, ["a"], np.zeros(count, np.uint16), one, one, one.astype(np.uint64))
    before = pa.total_allocated_bytes()
    part = open_tokens(path)
    assert pa.total_allocated_bytes() - before < 100_000
    assert len(part.values) == count


def test_datasets_opens_both_kinds(tmp_path):
    write_corpus(tmp_path / "corpus.arrow", DOCUMENTS[:5])
    write_three(tmp_path / "tokens.arrow")
    corpus = datasets.Dataset.from_file(str(tmp_path / "corpus.arrow"))
    tokens = datasets.Dataset.from_file(str(tmp_path / "tokens.arrow"))
    assert corpus["text"][:] == [document.text for document in DOCUMENTS[:5]]
    assert tokens["input_ids"][:] == [[5, 6, 0], [0], [7, 0]]
    assert tokens.column_names == ["id", "input_ids", "num_bytes", "text_hash"]


@pytest.mark.parametrize("content", [b"", b"not arrow at all, but long enough to look at"])
def test_a_file_that_is_not_arrow_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "part.arrow"
    path.write_bytes(content)
    for read in (lambda: list(read_corpus(path)), lambda: open_tokens(path)):
        with pytest.raises(ArtifactError, match=r"part\.arrow: cannot be read as arrow"):
            read()
