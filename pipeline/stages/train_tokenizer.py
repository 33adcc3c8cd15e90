"""A tokenizer, trained on a corpus."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from pipeline.artifact import Artifact
from pipeline.settings import Input
from pipeline.stage import Context, Run, Stage, Stats
from pipeline.text.arrow import read_corpus
from pipeline.text.tokenizers import END_OF_TEXT, NUM_BYTES, TOKENIZER, Tokenizer, train

SAMPLE_BYTES = 1 << 20  # text on which bytes per token are measured


class TrainTokenizer(Stage):
    """Trains a byte-level BPE tokenizer: any text can be encoded, and decoding gives it back byte by byte.

    Attributes:
        vocab_size: Size of the vocabulary, special tokens and the 256 bytes included; a small corpus may give less.
        special_tokens: Tokens that no text contains, from id 0; the first ends every document.
        min_frequency: How often a pair must occur to become a token.
    """

    version: ClassVar[int] = 1
    produces: ClassVar[str] = "tokenizer"

    kind: Literal["train_tokenizer"] = "train_tokenizer"
    corpus: Annotated[str, Input("corpus")]
    vocab_size: int = Field(default=32768, ge=1)
    special_tokens: list[str] = [END_OF_TEXT]
    min_frequency: int = Field(default=2, ge=1)

    @field_validator("special_tokens")
    @classmethod
    def _end_of_text_first(cls, tokens: list[str]) -> list[str]:
        if tokens[:1] != [END_OF_TEXT]:
            raise ValueError(f"wanted '{END_OF_TEXT}' as the first, found {tokens[:1]}")
        if len(set(tokens)) < len(tokens) or "" in tokens:
            raise ValueError(f"wanted different tokens, none of them empty, found {tokens}")
        return tokens

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return the size of the vocabulary, and bytes per token."""
        return f"{stats['vocab_size']:,} tokens in the vocabulary", f"{stats['bytes_per_token']:.2f} bytes a token"

    def check(self, upstream: Mapping[str, Stage], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse a vocabulary with no room for the bytes and the special tokens."""
        least = NUM_BYTES + len(self.special_tokens)
        if self.vocab_size < least:
            yield "vocab_size", f"wanted at least {least} (256 bytes and the special tokens), found {self.vocab_size}"

    def disk_bytes(self, input_bytes: int, run: Run) -> int:
        """Return the size of `tokenizer.json`, which holds each token twice."""
        return 100 * self.vocab_size

    def run(self, ctx: Context) -> None:
        """Train on the whole corpus, in constant memory but for the counts of its words."""
        tokenizer = train(_texts(ctx), self.vocab_size, self.special_tokens, self.min_frequency)
        if tokenizer.vocab_size < self.vocab_size:
            ctx.log(
                f"the vocabulary has {tokenizer.vocab_size:,} tokens, not {self.vocab_size:,}: no other pair occurs "
                f"{self.min_frequency} times in the corpus"
            )
        with ctx.output.write(TOKENIZER) as path:
            tokenizer.save(path)
        ctx.output.stats["vocab_size"] = tokenizer.vocab_size
        for token, number in tokenizer.special_tokens.items():
            ctx.output.stats[f"special.{token}"] = number
        ctx.output.stats["bytes_per_token"] = _bytes_per_token(ctx.inputs["corpus"], tokenizer)


def _texts(ctx: Context) -> Iterator[str]:
    """Yield all texts of the corpus, showing progress."""
    corpus = ctx.inputs["corpus"]
    progress = ctx.progress(len(corpus.parts()), "parts read")
    for name in corpus.parts():
        for document in read_corpus(corpus.file(name)):
            yield document.text
        progress.advance()
    progress.close()


def _bytes_per_token(corpus: Artifact, tokenizer: Tokenizer) -> float:
    """Return UTF-8 bytes per token, measured on every n-th document: about `SAMPLE_BYTES` in all."""
    step = 1 + corpus.stats["bytes"] // SAMPLE_BYTES
    documents = itertools.chain.from_iterable(read_corpus(corpus.file(name)) for name in corpus.parts())
    num_bytes = num_tokens = 0
    for document in itertools.islice(documents, 0, None, step):
        num_bytes += len(document.text.encode())
        num_tokens += len(tokenizer.encode(document.text))
    return num_bytes / num_tokens
