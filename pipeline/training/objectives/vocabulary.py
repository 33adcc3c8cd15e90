"""What a tokenizer's vocabulary says to an objective: special ids, and which tokens go on with a word."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from pipeline.errors import ArtifactError
from pipeline.settings import nearest
from pipeline.text.tokenizers import BYTE_CHARACTERS, Tokenizer
from pipeline.training.objectives.objective import SpecialIds

WHITESPACE = " \t\n\v\f\r"
SHOWN_SPACE = "▁"  # how vocabularies of whole characters write a space (Kudo and Richardson 2018, SentencePiece)


def special_ids(tokenizer: Tokenizer, names: Iterable[str], end_of_text: int) -> SpecialIds:
    """Return the ids of special tokens, and what is known about every other id.

    A word of a WordPiece vocabulary begins with a token without its mark, ##; of any other where a token begins with a
    space, or the one before it ends in one. So punctuation belongs to the word before it.

    Args:
        names: The tokens that an objective needs.
        end_of_text: The id that ends a document.

    Raises:
        ArtifactError: If the tokenizer lacks one of them, or has it as an ordinary token.
    """
    data, known = tokenizer.data, tokenizer.special_tokens
    numbers = {name: _special_id(tokenizer, name) for name in names}
    special, continues, breaks = (np.full(tokenizer.vocab_size, value, np.bool_) for value in (True, False, True))
    begins_word, ends_word = _word_rule(data)
    held = {*known.values(), *numbers.values(), end_of_text}
    for token, number in _vocabulary(data):
        if number not in held:
            special[number], continues[number], breaks[number] = False, not begins_word(token), ends_word(token)
    return SpecialIds(numbers, end_of_text, tokenizer.vocab_size, special, continues, breaks)


def _special_id(tokenizer: Tokenizer, name: str) -> int:
    """Return the id of a special token."""
    number = tokenizer.special_tokens.get(name)
    if number is not None:
        return number
    there = tokenizer.token_id(name) is not None
    fault = f"has '{name}' as an ordinary token, which texts may hold" if there else f"has no token '{name}'"
    raise ArtifactError(
        f"objective: the tokenizer {fault}{nearest(name, list(tokenizer.special_tokens))}; name it in special_tokens "
        "of train_tokenizer or import_tokenizer and tokenize again, or tell the objective what it is called there"
    )


def _vocabulary(data: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the tokens of a `tokenizer.json` and their ids, special ones included."""
    vocab = data["model"]["vocab"]
    tokens = dict(vocab) if isinstance(vocab, dict) else {entry[0]: number for number, entry in enumerate(vocab)}
    return list((tokens | {token["content"]: token["id"] for token in data["added_tokens"]}).items())


def _word_rule(data: dict[str, Any]) -> tuple[Callable[[str], bool], Callable[[str], bool]]:
    """Return two functions of a token: whether it begins a word, and whether what follows it does."""
    model = data["model"]
    prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    if suffix:
        return (lambda token: False), (lambda token: token.endswith(suffix))
    if prefix:
        return (lambda token: not token.startswith(prefix)), (lambda token: False)
    byte_level = any(_has_kind(data[part], "ByteLevel") for part in ("pre_tokenizer", "decoder"))
    spaces = tuple(BYTE_CHARACTERS[ord(c)] for c in WHITESPACE) if byte_level else (SHOWN_SPACE, *WHITESPACE)
    return (lambda token: token.startswith(spaces)), (lambda token: token.endswith(spaces))


def _has_kind(part: Any, kind: str) -> bool:
    """Return whether a part of a tokenizer, or one that it is a sequence of, is of a type."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_has_kind(inner, kind) for inner in part.values())
    return isinstance(part, list) and any(_has_kind(inner, kind) for inner in part)
