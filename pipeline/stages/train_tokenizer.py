"""A tokenizer, trained on a corpus."""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from pipeline.artifact import Artifact
from pipeline.settings import Input
from pipeline.stage import Context, Run, Stage, Stats
from pipeline.text.arrow import read_corpus
from pipeline.text.tokenizers import END_OF_TEXT, TOKENIZER, Tokenizer
from pipeline.text.trainers import AnyAlgorithm, Bpe, Job, WordPiece

LONGEST_RUN = 1 << 14
LONG_RUN = re.compile(rf"((?:\S{{{LONGEST_RUN}}}|\s{{{LONGEST_RUN}}}))")
SAMPLE_BYTES = 1 << 20  # text on which bytes per token are measured
RANGE = re.compile(r"\{(\d{1,6})\.\.(\d{1,6})\}")


class TrainTokenizer(Stage):
    """Trains a tokenizer: byte-level BPE, WordPiece or Unigram.

    Attributes:
        vocab_size: Size of the vocabulary, special tokens, added tokens and the 256 bytes included; a small corpus may
            give less. A model may be made larger, but its tokenizer never is.
        special_tokens: Tokens that no text contains, from id 0; the first ends every document. Chat markers are such,
            for example [<|endoftext|>, <|im_start|>, <|im_end|>]. "<extra_id_{0..99}>" is short for a hundred.
        added_tokens: Ordinary tokens that are found in a text before anything else; they have the last ids.
    """

    version: ClassVar[int] = 2
    produces: ClassVar[str] = "tokenizer"

    kind: Literal["train_tokenizer"] = "train_tokenizer"
    corpus: Annotated[str, Input("corpus")]
    algorithm: AnyAlgorithm = Bpe()
    vocab_size: int = Field(default=32768, ge=1)
    special_tokens: list[str] = [END_OF_TEXT]
    added_tokens: list[str] = []

    @field_validator("special_tokens")
    @classmethod
    def _end_of_text_first(cls, tokens: list[str]) -> list[str]:
        tokens = expand_ranges(tokens)
        if tokens[:1] != [END_OF_TEXT]:
            raise ValueError(f"wanted '{END_OF_TEXT}' as the first, found {tokens[:1]}")
        return refuse_bad_tokens(tokens)

    @field_validator("added_tokens")
    @classmethod
    def _no_token_twice(cls, tokens: list[str]) -> list[str]:
        return refuse_bad_tokens(tokens)

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return the size of the vocabulary, and bytes per token."""
        return f"{stats['vocab_size']:,} tokens in the vocabulary", f"{stats['bytes_per_token']:.2f} bytes a token"

    def check(self, upstream: Mapping[str, Stage], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse a vocabulary with no room for the alphabet, the special and the added tokens."""
        yield from refuse_shared_tokens(self.special_tokens, self.added_tokens)
        least = self.algorithm.least() + len(self.special_tokens) + len(self.added_tokens)
        if self.vocab_size < least:
            what = "2 characters" if isinstance(self.algorithm, WordPiece) else "256 bytes"
            added = ", the added" if self.added_tokens else ""
            found = f"found {self.vocab_size}"
            yield "vocab_size", f"wanted at least {least} ({what}{added} and the special tokens), {found}"

    def disk_bytes(self, input_bytes: int, run: Run) -> int:
        """Return the size of `tokenizer.json`, which holds each token twice, and of the scratch file of texts."""
        return 100 * self.vocab_size + (input_bytes if isinstance(self.algorithm, Bpe) else 0)

    def run(self, ctx: Context) -> None:
        """Train on the whole corpus, in constant memory but for the counts of its words."""
        with ctx.scratch() as scratch:
            job = Job(lambda: _texts(ctx), self.vocab_size, self.special_tokens, self.added_tokens, scratch)
            tokenizer, trainer = self.algorithm.train(job)
        if tokenizer.vocab_size < self.vocab_size:
            ctx.log(f"the vocabulary has {tokenizer.vocab_size:,} tokens, not {self.vocab_size:,}: {self._why_fewer()}")
        with ctx.output.write(TOKENIZER) as path:
            tokenizer.save(path)
        ctx.output.stats |= describe(tokenizer, END_OF_TEXT)
        ctx.output.stats["trainer"] = trainer
        ctx.output.stats |= _measure(ctx.inputs["corpus"], tokenizer)

    def _why_fewer(self) -> str:
        if isinstance(self.algorithm, Bpe | WordPiece):
            return f"no other pair occurs {self.algorithm.min_frequency} times in the corpus"
        return "the corpus has too few pieces"


def expand_ranges(tokens: list[str]) -> list[str]:
    """Return tokens with each range written out: "<x{0..2}>" is <x0>, <x1>, <x2>, and "<x{2..0}>" the same backwards.

    Both spellings of a list make the same settings, and so the same fingerprint.
    """
    expanded = []
    for token in tokens:
        found = RANGE.search(token)
        if found is None:
            expanded.append(token)
            continue
        first, last = map(int, found.groups())
        numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        expanded += [f"{token[: found.start()]}{number}{token[found.end() :]}" for number in numbers]
    return expanded


def refuse_bad_tokens(tokens: list[str]) -> list[str]:
    """Return the tokens, or raise ValueError if one is empty or there twice."""
    if len(set(tokens)) < len(tokens) or "" in tokens:
        bad = next(token for number, token in enumerate(tokens) if not token or token in tokens[:number])
        found = f"'{bad}' twice" if bad else "an empty one"
        raise ValueError(f"wanted different tokens, none of them empty, found {found}")
    return tokens


def refuse_shared_tokens(special_tokens: list[str], added_tokens: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the problem of a token that is both special and an ordinary added one."""
    for token in added_tokens:
        if token in special_tokens:
            yield "added_tokens", f"'{token}' is a special token too; no text contains those"


def describe(tokenizer: Tokenizer, end_of_text: str) -> Stats:
    """Return the numbers of a tokenizer that go into its manifest."""
    special = {f"special.{token}": number for token, number in tokenizer.special_tokens.items()}
    return {"vocab_size": tokenizer.vocab_size, "end_of_text": end_of_text, **special}


def _texts(ctx: Context) -> Iterator[str]:
    """Yield all texts of the corpus, showing progress; what has no space for `LONGEST_RUN` characters comes in pieces.

    Trainers take time that is quadratic in the length of a word, and hours for one of a million letters.
    """
    corpus = ctx.inputs["corpus"]
    progress = ctx.progress(len(corpus.parts()), "parts read")
    for name in corpus.parts():
        for document in read_corpus(corpus.file(name)):
            yield from LONG_RUN.split(document.text) if LONG_RUN.search(document.text) else [document.text]
        progress.advance()
    progress.close()
    ctx.log("all texts are read; counting and merging, which shows no progress")


def _measure(corpus: Artifact, tokenizer: Tokenizer) -> Stats:
    """Return bytes and unknown tokens per token, of every n-th document: about `SAMPLE_BYTES` in all."""
    step = 1 + corpus.stats["bytes"] // SAMPLE_BYTES
    documents = itertools.chain.from_iterable(read_corpus(corpus.file(name)) for name in corpus.parts())
    unknown = None if tokenizer.unknown_token is None else tokenizer.token_id(tokenizer.unknown_token)
    num_bytes = num_tokens = num_unknown = 0
    for document in itertools.islice(documents, 0, None, step):
        ids = tokenizer.encode(document.text)
        num_bytes += len(document.text.encode())
        num_tokens += len(ids)
        num_unknown += 0 if unknown is None else ids.count(unknown)
    stats: Stats = {"bytes_per_token": num_bytes / max(1, num_tokens)}
    return stats if unknown is None else stats | {"unknown_fraction": num_unknown / max(1, num_tokens)}
