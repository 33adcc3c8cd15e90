"""One part of a corpus encoded in constant memory, and gone on with after a kill where it had got to."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.artifact import Artifact, FileRecord, write_json
from pipeline.errors import ArtifactError, PipelineError, Preempted
from pipeline.settings import Settings, decode, encode
from pipeline.text.arrow import TextBatch, read_texts
from pipeline.text.corpus import HELD, part_label
from pipeline.text.engine import Engine
from pipeline.text.flat import Texts
from pipeline.text.split import held_out
from pipeline.text.token_parts import TokenWriter, open_tokens
from pipeline.text.tokenizers import Tokenizer
from pipeline.text.vocabulary import Tally

BATCH_BYTES = 4 << 20  # text that is encoded at once
FIRST_SAMPLED = 32  # documents of a part's first batch that are looked at, and one of each after it
SAVE_BYTES, SAVE_S = 256 << 20, 10.0  # text and time between two notes: what a kill can cost


class Written(Settings):
    """A file of tokens as far as it is durable."""

    file: FileRecord
    documents: int
    tokens: int
    bytes: int


class Note(Settings):
    """How far a part is; the files are by their names."""

    files: dict[str, Written]
    tally: dict[str, Any]


@dataclass(frozen=True)
class Encoder:
    """How text becomes tokens.

    Attributes:
        end: Id put after every document.
        held_out_fraction: Share of the documents that go into a file of their own.
    """

    tokenizer: Tokenizer
    engine: Engine
    end: int
    held_out_fraction: float

    def encode(self, path: Path, batch: TextBatch) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Return (the ids of all documents one after another, how many each has).

        Raises:
            ArtifactError: If an id that ends a document is anywhere else; `path` is where the documents are from.
        """
        values, lengths = self.engine.encode(batch.texts, self.end)
        ends = values[np.cumsum(lengths) - 1] == self.end
        if not ends.all() or np.count_nonzero(values == self.end) != len(lengths):
            raise ArtifactError(
                f"{path}: a document is encoded to the id {self.end} that ends documents, so nobody could tell where "
                "one ends; choose another end_of_text"
            )
        return values, lengths


class PartEncoder:
    """Encodes one part of a corpus into `part-…` and `held-…` files in `directory`, which keeps them between two runs.

    Files and notes there say how far it is: the prefix of a file that its note knows is checked and gone on with, and
    anything else begins anew.

    Args:
        source: The corpus part.
    """

    def __init__(self, encoder: Encoder, source: Path, directory: Path) -> None:
        label = part_label(source.name)
        self._encoder, self._source, self._directory = encoder, source, directory
        self._names = (f"part-{label}.arrow", f"{HELD}{label}.arrow")
        self._note = directory / f"{source.name}.json"
        self._writers: dict[str, TokenWriter] = {}
        self._counted: dict[str, tuple[int, int, int]] = {}  # documents, tokens, bytes
        self._tally = Tally(encoder.tokenizer.vocab_size)
        self._sampled = False

    def run(self, should_stop: Callable[[], bool]) -> dict[str, Written]:
        """Encode what is not yet, and return the files that are whole now.

        Raises:
            Preempted: Between two batches, when somebody asked for a stop.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as files:
            self._go_on(files)
            done = sum(counted[0] for counted in self._counted.values())
            saved_s, unsaved_bytes = time.monotonic(), 0
            for batch in read_texts(self._source, BATCH_BYTES, skip=done):
                unsaved_bytes += self._add(files, batch)
                if should_stop():
                    self._save()
                    raise Preempted(f"{self._source.name} is not done; what is stays")
                if unsaved_bytes >= SAVE_BYTES or time.monotonic() - saved_s >= SAVE_S:
                    self._save()
                    saved_s, unsaved_bytes = time.monotonic(), 0
            self._save()
        return {name: self._written(name, writer.record) for name, writer in self._writers.items()}

    def _go_on(self, files: ExitStack) -> None:
        """Open the files that a run before this one left, as far as its note says, or none."""
        try:
            note = decode(Note, json.loads(self._note.read_text("utf-8")))
            with ExitStack() as opened:
                for name, written in note.files.items():
                    writer = TokenWriter(self._directory / name, self._encoder.tokenizer.dtype, at=written.file)
                    self._writers[name] = opened.enter_context(writer)
                files.enter_context(opened.pop_all())
        except (FileNotFoundError, ValueError, PipelineError):
            self._writers = {}
            return
        self._counted = {name: (one.documents, one.tokens, one.bytes) for name, one in note.files.items()}
        self._tally = Tally.from_plain(note.tally)
        self._sampled = bool(self._counted)

    def _add(self, files: ExitStack, batch: TextBatch) -> int:
        """Encode, write and count a batch, and return the bytes of its text."""
        values, lengths = self._encoder.encode(self._source, batch)
        hashes = _hashes(batch.texts)
        held = held_out(hashes, self._encoder.held_out_fraction)
        rows = (batch.columns["id"], batch.columns["source"], values, lengths, batch.texts.sizes, hashes)
        for name, chosen in zip(self._names, (~held, held), strict=True):
            if chosen.any():
                self._open(files, name).add(*rows, chosen)
                counted = (int(chosen.sum()), int(lengths[chosen].sum()), int(batch.texts.sizes[chosen].sum()))
                known = self._counted.get(name, (0, 0, 0))
                self._counted[name] = (known[0] + counted[0], known[1] + counted[1], known[2] + counted[2])
        self._tally.add(batch, values, lengths)
        stops = np.cumsum(lengths)
        for number in np.argsort(hashes)[: 1 if self._sampled else FIRST_SAMPLED].tolist():
            ids = values[stops[number] - lengths[number] : stops[number] - 1].tolist()
            self._tally.sample(batch.texts.text(number), ids, self._encoder.tokenizer.decode)
        self._sampled = True
        return int(batch.texts.sizes.sum())

    def _open(self, files: ExitStack, name: str) -> TokenWriter:
        if name not in self._writers:
            writer = TokenWriter(self._directory / name, self._encoder.tokenizer.dtype)
            self._writers[name] = files.enter_context(writer)
        return self._writers[name]

    def _save(self) -> None:
        """Make what was written durable, and leave a note of it."""
        written = {name: self._written(name, writer.sync()) for name, writer in self._writers.items()}
        write_json(self._note, encode(Note(files=written, tally=self._tally.plain())))

    def _written(self, name: str, record: FileRecord) -> Written:
        documents, tokens, num_bytes = self._counted[name]
        return Written(file=record, documents=documents, tokens=tokens, bytes=num_bytes)


def _hashes(texts: Texts) -> npt.NDArray[np.uint64]:
    """Return the xxh3_64 of every text."""
    view, places, digest = texts.data.data, texts.starts.tolist(), xxhash.xxh3_64_intdigest
    return np.fromiter([digest(view[begin:end]) for begin, end in pairwise(places)], np.uint64, len(texts))


def read_tally(directory: Path, vocab_size: int) -> Tally:
    """Return the sum of what all parts counted."""
    total = Tally(vocab_size)
    for path in sorted(directory.glob("*.json")):
        total.merge(Tally.from_plain(decode(Note, json.loads(path.read_text("utf-8"))).tally))
    return total


def count_again(tokens: Artifact) -> dict[str, Any]:
    """Return the numbers of a tokens artifact as its files have them, by their names in the manifest."""
    found: dict[str, Any] = {"part_tokens": {}, "max_token_id": 0}
    for total in ("", "held_out."):
        found |= {f"{total}{what}": 0 for what in ("documents", "tokens", "bytes")}
    for name in [*tokens.parts(), *tokens.parts(HELD)]:
        part = open_tokens(tokens.file(name))
        found["part_tokens"][name] = part.num_tokens
        for total in ("", "held_out.") if name.startswith(HELD) else ("",):
            found[f"{total}documents"] += part.num_documents
            found[f"{total}tokens"] += part.num_tokens
            found[f"{total}bytes"] += sum(int(part.rows(batch)[2].sum()) for batch in range(part.num_batches))
        for batch in range(part.num_batches):
            largest = part.tokens(int(part.starts[batch]), int(part.starts[batch + 1])).max(initial=0)
            found["max_token_id"] = max(found["max_token_id"], int(largest))
    return found


def compare_part(
    tokens: Artifact, source: Path, tokenizer: Tokenizer, end: int, held_out_fraction: float
) -> Iterator[str]:
    """Yield what of a corpus part, encoded again with the plain library, is not what a tokens artifact holds."""
    names = [f"{side}-{part_label(source.name)}.arrow" for side in ("part", "held")]
    stored = [_documents(tokens, name) for name in names]
    for batch in read_texts(source, BATCH_BYTES):
        values, lengths = tokenizer.encode_batch([text.tobytes().decode() for text in batch.texts], end)
        wanted = np.split(values, np.cumsum(lengths)[:-1])
        hashes = _hashes(batch.texts)
        sides = held_out(hashes, held_out_fraction).astype(int).tolist()
        for identity, text, ids, text_hash, side in zip(
            batch.columns["id"].to_pylist(), batch.texts, wanted, hashes.tolist(), sides, strict=True
        ):
            found = next(stored[side], None)
            if found is None or found[0] != identity:
                there = "the file ends" if found is None else f"'{found[0]}' stands"
                yield f"{names[side]}: document '{identity}' is missing: {there} in its place"
                return
            problem = _problem(found, ids, len(text), text_hash, tokenizer.vocab_size)
            if problem:
                yield f"{names[side]}: document '{identity}': {problem}"
    for name, rest in zip(names, stored, strict=True):
        if (found := next(rest, None)) is not None:
            yield f"{name}: document '{found[0]}' is not in the corpus, or not on this side of the split"


StoredDocument = tuple[str, npt.NDArray[Any], int, int]  # id, tokens, bytes and hash of its text


def _documents(tokens: Artifact, name: str) -> Iterator[StoredDocument]:
    """Yield the documents of a file of tokens; none if there is no such file."""
    if name not in tokens.names:
        return
    part = open_tokens(tokens.file(name))
    for batch in range(part.num_batches):
        offsets = part.offsets(batch)
        ids, _, num_bytes, text_hash = part.rows(batch)
        for row, identity in enumerate(ids):
            yield identity, part.tokens(offsets[row], offsets[row + 1]), int(num_bytes[row]), int(text_hash[row])


def _problem(found: StoredDocument, ids: npt.NDArray[Any], num_bytes: int, text_hash: int, size: int) -> str | None:
    """Return what is wrong with a stored document, if anything is."""
    _, stored, stored_bytes, stored_hash = found
    if (stored_bytes, stored_hash) != (num_bytes, text_hash):
        return f"has the hash {stored_hash:016x} of another text; wanted {text_hash:016x} of {num_bytes} bytes"
    if stored.max(initial=0) >= size:
        return f"has the id {stored.max()}, but the vocabulary has {size}"
    if not np.array_equal(stored, ids):
        shorter = min(len(stored), len(ids))
        first = np.append(np.flatnonzero(stored[:shorter] != ids[:shorter]), shorter)[0]
        return f"token {first} of {len(stored)} is not what the tokenizer makes of its text (it makes {len(ids)})"
    return None
