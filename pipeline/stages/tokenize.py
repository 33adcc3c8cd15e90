"""A corpus as tokens: memory-mapped streams of ids, one row a document."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import xxhash

from pipeline.errors import ArtifactError
from pipeline.settings import Input, nearest
from pipeline.stage import Context, Run, Stage, Stats, Unit
from pipeline.stages.train_tokenizer import TrainTokenizer
from pipeline.text.arrow import Document, read_corpus, write_tokens
from pipeline.text.corpus import check_books
from pipeline.text.tokenizers import END_OF_TEXT, TOKENIZER, Tokenizer, load

BATCH_CHARS = 1 << 20


class Tokenize(Stage):
    """Encodes every document and ends it with the end-of-text token. The tokenizer is copied beside the tokens.

    Attributes:
        end_of_text: The token that ends a document; an id that no text is encoded to.
    """

    version: ClassVar[int] = 1
    produces: ClassVar[str] = "tokens"
    ranks: ClassVar[Literal["one", "units", "group"]] = "units"

    kind: Literal["tokenize"] = "tokenize"
    corpus: Annotated[str, Input("corpus")]
    tokenizer: Annotated[str, Input("tokenizer", "export")]
    end_of_text: str = END_OF_TEXT

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return the number of tokens, and bytes per token."""
        return f"{stats['tokens']:,} tokens", f"{stats['bytes_per_token']:.2f} bytes a token"

    def check(self, upstream: Mapping[str, Stage], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse an end-of-text token that the tokenizer will not have."""
        maker = upstream["tokenizer"]
        if isinstance(maker, TrainTokenizer) and self.end_of_text not in maker.special_tokens:
            known = nearest(self.end_of_text, maker.special_tokens)
            yield "end_of_text", f"the tokenizer has no special token '{self.end_of_text}'{known}"

    def run(self, ctx: Context) -> None:
        """Encode this rank's parts."""
        corpus, source = ctx.inputs["corpus"], ctx.inputs["tokenizer"].file(TOKENIZER)
        tokenizer = load(source)
        end = self._end_id(tokenizer, source)
        if ctx.rank == 0:
            with ctx.output.write(TOKENIZER) as path:
                shutil.copyfile(source, path)
        for unit in ctx.units(corpus.parts(), "parts"):
            _encode(corpus.file(unit.name), tokenizer, end, unit)

    def finish(self, ctx: Context, stats: Stats) -> Stats:
        """Check that every document is there, and say what the tokens are."""
        check_books(ctx, stats, ctx.inputs["corpus"].stats["documents"])
        source = ctx.inputs["tokenizer"].file(TOKENIZER)
        tokenizer = load(source)
        return stats | {
            "vocab_size": tokenizer.vocab_size,
            "end_of_text_id": self._end_id(tokenizer, source),
            "bytes_per_token": stats["bytes"] / stats["tokens"],
            "dtype": tokenizer.dtype,
        }

    def _end_id(self, tokenizer: Tokenizer, path: Path) -> int:
        number = tokenizer.token_id(self.end_of_text)
        if number is None:
            known = nearest(self.end_of_text, list(tokenizer.special_tokens))
            raise ArtifactError(f"end_of_text: {path} has no token '{self.end_of_text}'{known}")
        return number


def _encode(part: Path, tokenizer: Tokenizer, end: int, unit: Unit) -> None:
    """Write the tokens of a corpus part, in memory but for its text."""
    import numpy as np

    ids, sizes, hashes, values, lengths = [], [], [], [], []
    for batch in _batches(read_corpus(part)):
        encoded, counts = tokenizer.encode_batch([document.text for document in batch], end)
        values.append(encoded)
        lengths.append(counts)
        for document in batch:
            text = document.text.encode()
            ids.append(document.id)
            sizes.append(len(text))
            hashes.append(xxhash.xxh3_64_intdigest(text))
    tokens = np.concatenate(values)
    with unit.write(unit.name) as path:
        write_tokens(path, ids, tokens, np.concatenate(lengths), np.array(sizes), np.array(hashes, np.uint64))
    unit.stats |= {"documents_in": len(ids), "documents": len(ids), "tokens": len(tokens), "bytes": sum(sizes)}


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Yield documents in lists of about `BATCH_CHARS` of text."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
