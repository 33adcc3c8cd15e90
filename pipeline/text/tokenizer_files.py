"""Tokenizers from outside: Hugging Face, GPT-2, BERT and tiktoken files, and plain bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipeline.errors import ArtifactError
from pipeline.settings import Choice, Source, nearest
from pipeline.text.ranks import read_lines, read_ranks, read_text, recover_merges, shown
from pipeline.text.sources import expand_user, reading, regular_file
from pipeline.text.tokenizers import (
    BYTE_CHARACTERS,
    TOKENIZER,
    Tokenizer,
    byte_level,
    load,
    word_piece,
)

# The patterns that tiktoken's encodings of these names split text by (tiktoken_ext/openai_public.py), without the
# possessive quantifiers, which change only the speed. Null is GPT-2's.
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
PATTERNS: dict[str, str | None] = {
    "gpt2": None,
    "cl100k": rf"{_SUFFIX}|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "o200k": (
        rf"{_BEFORE}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_BEFORE}{_UPPER}+{_LOWER}*{_SUFFIX}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    ),
}
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
MERGES_FILES = tuple(merges for _, merges in GPT2_FILES)
BERT_FILE = "vocab.txt"


class HuggingFace(Choice):
    """A `tokenizer.json`, or a directory in the layout of the Hugging Face hub that has one."""

    kind: Literal["huggingface"] = "huggingface"
    path: Annotated[str, Source()]

    def read(self) -> Tokenizer:
        """Return the tokenizer as it is.

        Raises:
            ArtifactError: If there is none, or it is damaged.
        """
        path = _place(self.path)
        if path.is_dir() and not (path / TOKENIZER).exists():
            others = {"gpt2": [name for pair in GPT2_FILES for name in pair], "bert": [BERT_FILE]}
            hint = next((kind for kind, names in others.items() if any((path / name).exists() for name in names)), None)
            way_out = f"; its files are of kind '{hint}'" if hint else "; name another file or directory"
            raise ArtifactError(f"{path}: this directory has no {TOKENIZER}{way_out}")
        return load(regular_file(path / TOKENIZER if path.is_dir() else path))


class Gpt2(Choice):
    """Merges in the format of GPT-2 and its kin, and the ids beside them.

    Attributes:
        path: A directory with `vocab.json` and `merges.txt`, or `encoder.json` and `vocab.bpe`; or the merges alone,
            whose tokens are then numbered as GPT-2 does: bytes first, then merges.
    """

    kind: Literal["gpt2"] = "gpt2"
    path: Annotated[str, Source()]

    def read(self) -> Tokenizer:
        """Return a byte-level BPE tokenizer with GPT-2's pre-tokenization.

        Raises:
            ArtifactError: If the files are missing, damaged, or do not belong together.
        """
        path = _place(self.path)
        if not path.is_dir():
            merges = _read_merges(path)
            return byte_level(_numbered([*BYTE_CHARACTERS.values(), *(a + b for a, b in merges)], path), merges)
        for vocab_name, merges_name in GPT2_FILES:
            if (path / vocab_name).exists() and (path / merges_name).exists():
                vocab, merges = _read_vocab(path / vocab_name), _read_merges(path / merges_name)
                for token in [*BYTE_CHARACTERS.values(), *(token for a, b in merges for token in (a, b, a + b))]:
                    if token not in vocab:
                        raise ArtifactError(f"{path / vocab_name}: no token '{token}', which {merges_name} needs")
                return byte_level(vocab, merges)
        wanted = " or ".join(f"{vocab} with {merges}" for vocab, merges in GPT2_FILES)
        raise ArtifactError(f"{path}: this directory lacks {wanted}")


class Bert(Choice):
    """The `vocab.txt` of a BERT: one token a line, its number the id.

    Note: decoding does not give back the text: spaces and, with `lowercase`, case and accents are lost.

    Attributes:
        path: The file, or a directory that has it.
        lowercase: Whether it folds case and takes accents off, as the models called "uncased" do.
    """

    kind: Literal["bert"] = "bert"
    path: Annotated[str, Source()]
    lowercase: bool = True
    unknown_token: str = "[UNK]"

    def read(self) -> Tokenizer:
        """Return a WordPiece tokenizer with BERT's pre-tokenization; what it marks with brackets is special.

        Raises:
            ArtifactError: If the file is missing or damaged, or lacks `unknown_token`.
        """
        path = _place(self.path)
        path = path / BERT_FILE if path.is_dir() else path
        vocab = _numbered(read_lines(path), path)
        if self.unknown_token not in vocab:
            raise ArtifactError(f"{path}: no token '{self.unknown_token}'; say with unknown_token what it is called")
        tokenizer = word_piece(vocab, self.unknown_token, self.lowercase)
        known = (self.unknown_token, "[PAD]", "[CLS]", "[SEP]", "[MASK]")
        tokenizer.extend([token for token in known if token in vocab], [])
        return tokenizer


class Tiktoken(Choice):
    r"""A file of tiktoken's ranks: a token in base64 and its rank in each line.

    Attributes:
        pattern: What the file does not say: how text is split. gpt2, cl100k, o200k or a regular expression.
        special_ids: Ids of special tokens that whoever made the file has fixed, such as `{<|endoftext|>: 100257}`.
    """

    kind: Literal["tiktoken"] = "tiktoken"
    path: Annotated[str, Source()]
    pattern: str = Field(min_length=1)
    special_ids: dict[str, Annotated[int, Field(ge=0, lt=2**24)]] = {}

    @field_validator("pattern")
    @classmethod
    def _known(cls, pattern: str) -> str:
        if pattern not in PATTERNS and pattern.replace("_", "").isalnum():
            raise ValueError(f"no pattern is called '{pattern}'{nearest(pattern, list(PATTERNS))}")
        return pattern

    def read(self) -> Tokenizer:
        """Return a byte-level BPE tokenizer that gives tiktoken's ids.

        Raises:
            ArtifactError: If the file is missing or damaged, or the pattern cannot be compiled.
        """
        path = _place(self.path)
        ranks = read_ranks(path, set(self.special_ids.values()))
        merges, regular = recover_merges(ranks)
        vocab = {shown(token): rank for token, rank in ranks.items()}
        taken = set(ranks.values())
        for token, number in self.special_ids.items():
            if vocab.setdefault(token, number) != number or number in taken:
                raise ArtifactError(f"special_ids.{token}: {path} has another token or id for it than {number}")
        pairs = [(shown(a), shown(b)) for a, b in merges]
        try:
            tokenizer = byte_level(vocab, pairs, PATTERNS.get(self.pattern, self.pattern), ignore_merges=not regular)
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(f"pattern: not a regular expression ({error})") from None
        tokenizer.extend(sorted(self.special_ids, key=self.special_ids.__getitem__), [])
        return tokenizer


class Bytes(Choice):
    """Plain bytes: 256 tokens, the id of each its value. No file."""

    kind: Literal["bytes"] = "bytes"

    def read(self) -> Tokenizer:
        """Return the tokenizer."""
        return byte_level({character: byte for byte, character in BYTE_CHARACTERS.items()}, [], split=False)


AnyVocabulary = Annotated[HuggingFace | Gpt2 | Bert | Tiktoken | Bytes, Field(discriminator="kind")]


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Return the merges of a file with two tokens a line, after a line with the version."""
    lines = read_lines(path)
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if (number == 1 and line.startswith("#version")) or not line.strip():
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise ArtifactError(
                f"{path}, line {number}: wanted two tokens, found {line[:60]!r}; it is damaged, or not a file of merges"
            )
        merges.append((pair[0], pair[1]))
    known = set(BYTE_CHARACTERS.values())
    for first, second in merges:
        if first not in known or second not in known:
            raise ArtifactError(f"{path}: the merge '{first} {second}' joins a token that no merge before it makes")
        known.add(first + second)
    if not merges:
        raise ArtifactError(f"{path}: no merges; it is damaged, or not a file of merges")
    return merges


def _read_vocab(path: Path) -> dict[str, int]:
    """Return the ids of a JSON object with an id for every token."""
    try:
        vocab = json.loads(read_text(path))
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON ({error}); it is damaged") from None
    valid = isinstance(vocab, dict) and vocab and all(type(number) is int and number >= 0 for number in vocab.values())
    if not valid or len(set(vocab.values())) < len(vocab):
        raise ArtifactError(f"{path}: wanted a JSON object with a different id for every token; it is damaged")
    return dict(vocab)


def _numbered(tokens: Sequence[str], path: Path) -> dict[str, int]:
    """Return ids from 0 on."""
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) < len(tokens) or "" in vocab:
        twice = next(token for number, token in enumerate(tokens) if vocab[token] != number or not token)
        raise ArtifactError(f"{path}: the token '{twice}' is empty or there twice; it is damaged")
    return vocab


def _place(path: str) -> Path:
    """Return the file or directory that a setting names."""
    place = expand_user(path)
    with reading(path):
        place.stat()
    return place
