"""Training of tokenizers: byte-level BPE, WordPiece and Unigram."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.errors import ArtifactError
from pipeline.settings import Choice
from pipeline.text.ranks import shown
from pipeline.text.tokenizers import BYTE_CHARACTERS, NUM_BYTES, Tokenizer, byte_level, from_json, word_piece

WORTH_BYTES = 16 << 20  # of text: below, `tokenizers` takes seconds, and gigatoken longer where pairs are rare
SEPARATOR = b"\xff"  # ends a document in a scratch file; no UTF-8 holds it
SCORE_DIGITS = 6  # of a Unigram piece; the library's last digits depend on the order of a hash table
BLOCK_BYTES = 1 << 20  # of a scratch file, read at once

Texts = Callable[[], Iterable[str]]


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes:
        texts: Gives all texts; called once or twice.
        vocab_size: Size of the vocabulary, special and added tokens included.
        scratch: An empty directory with room for the texts.
    """

    texts: Texts
    vocab_size: int
    special_tokens: Sequence[str]
    added_tokens: Sequence[str]
    scratch: Path


class Bpe(Choice):
    """Byte-level byte-pair encoding (Sennrich et al. 2016; bytes and pre-tokenization of Radford et al. 2019).

    Any text can be encoded, and decoding gives it back byte by byte. The result depends on the counts of words alone:
    not on the order of texts, nor on threads, nor on which trainer made it.

    Attributes:
        min_frequency: How often a pair must occur to become a token.
    """

    kind: Literal["bpe"] = "bpe"
    min_frequency: int = Field(default=2, ge=1, le=2**31)

    def least(self) -> int:
        """Return the size of the smallest vocabulary, without special and added tokens."""
        return NUM_BYTES

    def train(self, job: Job) -> tuple[Tokenizer, str]:
        """Return the tokenizer and the name of the library that trained it, the fastest that gives the same."""
        tokenizer = _train_fast(job, self.min_frequency)
        if tokenizer is not None:
            return tokenizer, "gigatoken"
        from tokenizers import pre_tokenizers, trainers

        tokenizer = byte_level({}, [])
        trainer = trainers.BpeTrainer(
            vocab_size=job.vocab_size - len(job.added_tokens),
            special_tokens=list(job.special_tokens),
            min_frequency=self.min_frequency,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train(job.texts(), trainer)
        tokenizer.extend(job.special_tokens, job.added_tokens)
        return tokenizer, "tokenizers"


class WordPiece(Choice):
    """WordPiece as BERT has it (Devlin et al. 2019): words split at spaces and punctuation, Chinese into characters.

    Note: decoding does not give back the text: spaces and, with `lowercase`, case and accents are lost. A word with a
    character that the vocabulary lacks, or of over 100 characters, becomes `unknown_token`.

    Attributes:
        min_frequency: How often a pair must occur to become a token.
        lowercase: Whether to fold case and take accents off.
        unknown_token: Follows the special tokens in the vocabulary.
    """

    kind: Literal["wordpiece"] = "wordpiece"
    min_frequency: int = Field(default=2, ge=1, le=2**31)
    lowercase: bool = True
    unknown_token: str = Field(default="[UNK]", min_length=1)

    def least(self) -> int:
        """Return the size of the smallest vocabulary, without special and added tokens."""
        return 2

    def train(self, job: Job) -> tuple[Tokenizer, str]:
        """Return the tokenizer and the name of the library that trained it.

        Note: the library numbers the characters inside of words in the order of a hash table, and breaks ties by these
        numbers. So it is run twice: to find those characters, and with their numbers given.
        """
        special = [*job.special_tokens, *({self.unknown_token} - set(job.special_tokens))]
        inside = sorted(token for token in self._train(job, 0, special) if token.startswith("##"))
        vocab = self._train(job, job.vocab_size - len(job.added_tokens), [*special, *inside])
        tokenizer = word_piece(vocab, self.unknown_token, self.lowercase)
        tokenizer.extend(special, job.added_tokens)
        if tokenizer.vocab_size > job.vocab_size:
            raise ArtifactError(
                f"vocab_size: the characters of the corpus alone make {tokenizer.vocab_size:,} tokens, more than the "
                f"{job.vocab_size:,} asked for; take a larger vocabulary, or drop rare characters from the texts"
            )
        return tokenizer, "tokenizers"

    def _train(self, job: Job, vocab_size: int, first: Sequence[str]) -> dict[str, int]:
        """Return a vocabulary that begins with the tokens `first`."""
        from tokenizers import trainers

        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=list(first), min_frequency=self.min_frequency, show_progress=False
        )
        tokenizer = word_piece({}, self.unknown_token, self.lowercase)
        tokenizer.train(job.texts(), trainer)
        vocab: dict[str, int] = tokenizer.data["model"]["vocab"]
        return vocab


class Unigram(Choice):
    """A Unigram language model (Kudo 2018) over bytes, with GPT-2's pre-tokenization.

    Any text can be encoded, and decoding gives it back byte by byte. Scores are rounded, and ordered, so that training
    twice gives the same, unless pieces are so close to one another that sums in another order part them.

    Attributes:
        max_piece_bytes: Length of the longest piece.
    """

    kind: Literal["unigram"] = "unigram"
    max_piece_bytes: int = Field(default=16, ge=1, le=2**16)

    def least(self) -> int:
        """Return the size of the smallest vocabulary, without special and added tokens."""
        return NUM_BYTES

    def train(self, job: Job) -> tuple[Tokenizer, str]:
        """Return the tokenizer and the name of the library that trained it."""
        from tokenizers import Tokenizer as Inner
        from tokenizers import decoders, models, pre_tokenizers, trainers

        inner = Inner(models.Unigram())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.UnigramTrainer(
            vocab_size=job.vocab_size - len(job.added_tokens),
            special_tokens=list(job.special_tokens),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_piece_length=self.max_piece_bytes,
            show_progress=False,
        )
        trained = Tokenizer(inner)
        trained.train(job.texts(), trainer)
        tokenizer = from_json(_with_tidy_scores(trained, len(job.special_tokens)))
        tokenizer.extend(job.special_tokens, job.added_tokens)
        return tokenizer, "tokenizers"


AnyAlgorithm = Annotated[Bpe | WordPiece | Unigram, Field(discriminator="kind")]


def _with_tidy_scores(tokenizer: Tokenizer, num_special: int) -> str:
    """Return the JSON of a Unigram tokenizer whose scores and order do not depend on a hash table.

    The library gives the bytes that no best split of a word uses the lowest scores, 0.0001 apart, in the order of
    its hash table; here all of them get the lowest.
    """
    data = tokenizer.data
    vocab = data["model"]["vocab"]
    special, pieces = vocab[:num_special], vocab[num_special:]
    lowest = min(score for _, score in pieces)
    alphabet, unused = set(BYTE_CHARACTERS.values()), lowest + 0.0001 * (NUM_BYTES + 1)
    tidy = [(piece, lowest if piece in alphabet and score < unused else score) for piece, score in pieces]
    rounded = [(piece, round(score, SCORE_DIGITS)) for piece, score in tidy]
    data["model"]["vocab"] = special + sorted(rounded, key=lambda entry: (-entry[1], entry[0]))
    return json.dumps(data)


def _train_fast(job: Job, min_frequency: int) -> Tokenizer | None:
    """Train byte-level BPE with gigatoken, or return null where the result may not be that of `tokenizers`.

    gigatoken breaks ties alike, but knows no least frequency: a pair's count never rises from one merge to the next, so
    it is enough that the last merge occurs often enough. Two merges that make one token, and pairs that run out, are
    left to `tokenizers`, as is text that the two libraries would split differently, and a corpus so small that pairs
    may well run out.
    """
    from pipeline.text import engine

    num_merges = job.vocab_size - NUM_BYTES - len(job.special_tokens) - len(job.added_tokens)
    path = job.scratch / "texts"
    if num_merges < 1 or not _write(path, job.texts()) or path.stat().st_size < WORTH_BYTES:
        return None
    merges = [(shown(a), shown(b)) for a, b in engine.train_merges(path, SEPARATOR, num_merges)]
    tokens = [*job.special_tokens, *BYTE_CHARACTERS.values(), *(a + b for a, b in merges)]
    if len(merges) < num_merges or len(set(tokens)) < len(tokens):
        return None
    tokenizer = byte_level({token: number for number, token in enumerate(tokens)}, merges)
    if not _occurs(tokenizer, len(tokens) - 1, min_frequency, path):
        return None
    path.unlink()
    tokenizer.extend(job.special_tokens, job.added_tokens)
    return tokenizer


def _write(path: Path, texts: Iterable[str]) -> bool:
    """Write texts to a file, each with `SEPARATOR` after it; false if gigatoken would split one differently.

    Of a text with a letter that only one of the libraries knows, the words are written, each as a text of its own.
    """
    from pipeline.text.characters import LETTERS_17, disputed
    from pipeline.text.engine import is_word
    from pipeline.text.flat import Texts

    with open(path, "wb") as file:
        for text in texts:
            raw = text.encode()
            if not disputed(Texts.of([raw]), LETTERS_17):
                file.write(raw + SEPARATOR)
            elif all(map(is_word, words := _words(text))):
                file.writelines(word + SEPARATOR for word in words)
            else:
                return False
    return True


def _words(text: str) -> list[bytes]:
    """Return a text as the pre-tokenizer of `tokenizers` splits it."""
    from tokenizers import pre_tokenizers

    value = {character: byte for byte, character in BYTE_CHARACTERS.items()}
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [bytes(value[character] for character in word) for word, _ in words]


def _occurs(tokenizer: Tokenizer, number: int, times: int, path: Path) -> bool:
    """Return whether a token occurs so often in the texts of a file."""
    import numpy as np

    from pipeline.text.engine import choose_engine
    from pipeline.text.flat import Texts

    engine, found = choose_engine(tokenizer, []), 0
    for texts in _read(path):
        found += int(np.count_nonzero(engine.encode(Texts.of(texts))[0] == number))
        if found >= times:
            return True
    return False


def _read(path: Path) -> Iterator[list[bytes]]:
    """Yield the texts of a file that `_write` wrote, some at a time."""
    rest = b""
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            *texts, rest = (rest + block).split(SEPARATOR)
            yield texts
