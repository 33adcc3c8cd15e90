"""Normalization and filters of documents. A filter says why a text is dropped, in one counted word and in detail."""

import re
import unicodedata
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from pipeline.settings import Choice

Form = Literal["NFC", "NFKC"]
Verdict = tuple[str, str] | None  # (reason, detail), or null: keep
Fraction = Annotated[float, Field(ge=0, le=1)]
Limits = dict[Annotated[int, Field(ge=1)], Fraction]

# Each character of a script without spaces by itself (kana and CJK ideographs), else runs of letters and digits.
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
_ASCII_WORDS = re.compile(r"[A-Za-z0-9]+")


def normalize(text: str, form: Form | None) -> str:
    r"""Return `text` in a Unicode normal form, with \r\n as \n; unchanged if the form is null."""
    if form is None:
        return text
    if "\r\n" in text:
        text = text.replace("\r\n", "\n")
    return text if text.isascii() else unicodedata.normalize(form, text)


class Filter(Choice):
    """Decides which documents stay."""

    @abstractmethod
    def check(self, text: str) -> Verdict:
        """Return (reason, detail) if the text is to be dropped, else null."""


class Length(Filter):
    """Drops texts of too few or too many characters, as `too_short` and `too_long`."""

    kind: Literal["length"] = "length"
    min_chars: int = Field(default=1, ge=0)
    max_chars: int | None = Field(default=None, ge=1)

    def check(self, text: str) -> Verdict:
        """Count characters."""
        if len(text) < self.min_chars:
            return "too_short", f"{len(text)} characters, wanted at least {self.min_chars}"
        if self.max_chars is not None and len(text) > self.max_chars:
            return "too_long", f"{len(text)} characters, wanted at most {self.max_chars}"
        return None


class Repetition(Filter):
    """Drops texts that repeat themselves, as `repeated_lines` and `repeated_ngrams`.

    The measures are those of Rae et al. 2021 (Gopher), appendix A.1.1, table A1. What differs, so that verse, tables
    and technical prose stay: a repeat is any occurrence but the first; only letters and digits count, not the rules
    of tables; short texts, in which one refrain is a large fraction, are not measured; the limits for lines (0.30 and
    0.20 there) and for duplicate n-grams (0.15 to 0.10 there) are higher, for a third of the lines of a play are the
    names of its speakers, and manuals repeat their phrases. Null switches a measure off.

    Attributes:
        min_words: Texts of fewer words are kept. In scripts without spaces two characters count as a word.
        max_duplicate_line_fraction: Repeated lines, of all lines.
        max_duplicate_line_char_fraction: Characters in repeated lines, of all characters.
        max_duplicate_paragraph_fraction: The same for paragraphs, which empty lines part.
        max_duplicate_paragraph_char_fraction: Their characters.
        max_top_ngram_char_fraction: Characters in repeats of one n-gram, by n, of those in all words.
        max_duplicate_ngram_char_fraction: Characters in repeats of any n-gram, by n, each counted once.
    """

    kind: Literal["repetition"] = "repetition"
    min_words: int = Field(default=100, ge=1)
    max_duplicate_line_fraction: Fraction | None = 0.50
    max_duplicate_line_char_fraction: Fraction | None = 0.30
    max_duplicate_paragraph_fraction: Fraction | None = 0.30
    max_duplicate_paragraph_char_fraction: Fraction | None = 0.20
    max_top_ngram_char_fraction: Limits | None = {2: 0.20, 3: 0.18, 4: 0.16}
    max_duplicate_ngram_char_fraction: Limits | None = {5: 0.30, 6: 0.28, 7: 0.26, 8: 0.24, 9: 0.22, 10: 0.20}

    def check(self, text: str) -> Verdict:
        """Measure lines, paragraphs and n-grams of words."""
        words = (_ASCII_WORDS if text.isascii() else _WORDS).findall(text)
        scale = 2 if sum(map(len, words)) < 2 * len(words) else 1
        if len(words) < self.min_words * scale:
            return None
        return self._check_lines(text) or self._check_ngrams(words, scale)

    def _check_lines(self, text: str) -> Verdict:
        for noun, separator, most, most_chars in (
            ("lines", "\n", self.max_duplicate_line_fraction, self.max_duplicate_line_char_fraction),
            ("paragraphs", "\n\n", self.max_duplicate_paragraph_fraction, self.max_duplicate_paragraph_char_fraction),
        ):
            if most is None and most_chars is None:
                continue
            repeated, repeated_chars = duplicate_fractions(text.split(separator))
            if most is not None and repeated > most:
                return "repeated_lines", f"{repeated:.0%} of the {noun} are repeats, wanted at most {most:.0%}"
            if most_chars is not None and repeated_chars > most_chars:
                return "repeated_lines", (
                    f"{repeated_chars:.0%} of the characters are in repeated {noun}, wanted at most {most_chars:.0%}"
                )
        return None

    def _check_ngrams(self, words: list[str], scale: int) -> Verdict:
        for n, most in sorted((self.max_top_ngram_char_fraction or {}).items()):
            found = top_ngram_fraction(words, n * scale, most)
            if found > most:
                return "repeated_ngrams", f"repeats of one {n}-gram are {found:.0%} of it, wanted at most {most:.0%}"
        limits = sorted((self.max_duplicate_ngram_char_fraction or {}).items())
        for n, most in limits:
            found = duplicate_ngram_fraction(words, n * scale)
            if found > most:
                return "repeated_ngrams", f"{found:.0%} of it are repeats of {n}-grams, wanted at most {most:.0%}"
            if found <= min(limit for _, limit in limits):
                break  # a repeat of more words is made of repeats of fewer, so the fractions only fall
        return None


AnyFilter = Annotated[Length | Repetition, Field(discriminator="kind")]


def duplicate_fractions(pieces: Sequence[str]) -> tuple[float, float]:
    """Return the fractions (of the pieces, of their characters) that are in pieces that were there before.

    Pieces without a letter or digit are left out, and so is white space around a piece.
    """
    counts = Counter(map(str.strip, pieces))
    if len(counts) == len(pieces):
        return 0.0, 0.0
    said = {piece: count for piece, count in counts.items() if any(map(str.isalnum, piece))}
    num_pieces, num_chars = sum(said.values()), sum(len(piece) * count for piece, count in said.items())
    repeats = {piece: count - 1 for piece, count in said.items() if count > 1}
    chars = sum(len(piece) * count for piece, count in repeats.items())
    return (sum(repeats.values()) / num_pieces, chars / num_chars) if said else (0.0, 0.0)


def top_ngram_fraction(words: Sequence[str], n: int, limit: float = 0.0) -> float:
    """Return the largest fraction of the words' characters that the repeats of one n-gram take up.

    Zero may also mean "not above `limit`", found without counting n-grams.
    """
    num_chars = sum(map(len, words))
    # an n-gram is there at most as often as each of its words, so it takes up at most n times what one word does
    if n * max((len(word) * count for word, count in Counter(words).items()), default=0) <= limit * num_chars:
        return 0.0
    counts = Counter(_ngrams(words, n))
    return max(((count - 1) * sum(map(len, gram)) for gram, count in counts.items()), default=0) / num_chars


def duplicate_ngram_fraction(words: Sequence[str], n: int) -> float:
    """Return the fraction of the words' characters that lie in n-grams that were there before."""
    seen: set[tuple[str, ...]] = set()
    covered_to, chars = 0, 0
    for start, gram in enumerate(_ngrams(words, n)):
        if gram in seen:
            chars += sum(map(len, words[max(covered_to, start) : start + n]))
            covered_to = start + n
        else:
            seen.add(gram)
    return chars / sum(map(len, words)) if chars else 0.0


def _ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)
