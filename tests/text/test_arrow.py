import datasets
import pyarrow as pa
import pytest

from pipeline.errors import ArtifactError
from pipeline.text import arrow
from pipeline.text.arrow import (
    REJECTS,
    Document,
    Reject,
    RowWriter,
    read_corpus,
    read_ids,
    read_rejects,
    read_texts,
    sample_texts,
    write_corpus,
)

DOCUMENTS = [Document(f"d{n}", f"text {n} é漢😀" * (n + 1), "test", '{"n": 1}') for n in range(600)]


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


@pytest.mark.parametrize("num_bytes", [1, 3 << 20, 1 << 40])
def test_texts_come_in_batches_of_at_least_so_many_bytes(tmp_path, num_bytes):
    path = tmp_path / "part.arrow"
    write_corpus(path, DOCUMENTS)
    batches = list(read_texts(path, num_bytes))
    assert [bytes(text).decode() for batch in batches for text in batch.texts] == [
        document.text for document in DOCUMENTS
    ]
    for name in ("id", "source", "meta"):
        found = [value for batch in batches for value in batch.columns[name].to_pylist()]
        assert found == [getattr(document, name) for document in DOCUMENTS]
    assert all(len(batch.texts.data) >= num_bytes for batch in batches[:-1])
    sizes = [len(batch.texts) for batch in batches]
    for number in range(len(batches) + 1):
        rest = read_texts(path, num_bytes, skip=sum(sizes[:number]))
        assert [list(batch.texts) for batch in rest] == [list(batch.texts) for batch in batches[number:]]


def test_texts_are_skipped_within_a_batch_too(tmp_path):
    path = tmp_path / "part.arrow"
    write_corpus(path, DOCUMENTS)
    (batch,) = read_texts(path, 1 << 40, skip=7)
    assert [bytes(text).decode() for text in batch.texts] == [document.text for document in DOCUMENTS[7:]]
    assert list(read_texts(path, 1, skip=len(DOCUMENTS))) == []


def test_distinct_values_are_numbered(tmp_path):
    path = tmp_path / "part.arrow"
    write_corpus(path, [Document(f"d{n}", "text", source) for n, source in enumerate("abca")])
    (batch,) = read_texts(path, 1 << 20)
    names, numbers = batch.distinct("source")
    assert (names, numbers.tolist()) == (["a", "b", "c"], [0, 1, 2, 0])


@pytest.mark.parametrize(("count", "wanted"), [(3, [0, 200, 400]), (1, [0]), (1000, range(600))])
def test_a_sample_is_spread_over_a_part(tmp_path, count, wanted):
    path = tmp_path / "part.arrow"
    write_corpus(path, DOCUMENTS)
    assert sample_texts(path, count) == [DOCUMENTS[row].text for row in wanted]


def test_datasets_opens_a_corpus(tmp_path):
    write_corpus(tmp_path / "corpus.arrow", DOCUMENTS[:5])
    corpus = datasets.Dataset.from_file(str(tmp_path / "corpus.arrow"))
    assert corpus["text"][:] == [document.text for document in DOCUMENTS[:5]]


@pytest.mark.parametrize("content", [b"", b"not arrow at all, but long enough to look at"])
def test_a_file_that_is_not_arrow_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "part.arrow"
    path.write_bytes(content)
    for read in (lambda: list(read_corpus(path)), lambda: list(read_texts(path, 1)), lambda: sample_texts(path, 1)):
        with pytest.raises(ArtifactError, match=r"part\.arrow: cannot be read as arrow"):
            read()
