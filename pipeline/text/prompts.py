"""Prompts, which unlike documents may name special tokens, as ids."""

import re
from collections.abc import Collection

from pipeline.errors import ConfigError
from pipeline.settings import nearest
from pipeline.text.tokenizers import Tokenizer


def encode_prompt(tokenizer: Tokenizer, text: str, special: Collection[str] = (), mask: str | None = None) -> list[int]:
    """Return the ids of a prompt.

    Args:
        special: Texts of special tokens that stand for the tokens; that of others is ordinary text, as in a document.
        mask: The one among them that stands in the place of a token. Where words carry the space before them, a space
            before it goes with the token that it hides: in "a [MASK]" that is " cat", as in RoBERTa's tokenizer.
    """
    if not special:
        return tokenizer.encode(text)
    if mask is not None and len(tokenizer.encode(" a")) == 1:
        text = text.replace(f" {mask}", mask)
    longest_first = sorted(special, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    ids: list[int] = []
    for place, piece in enumerate(pieces):
        ids += [special_id(tokenizer, piece)] if place % 2 else tokenizer.encode(piece)
    return ids


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a special token. Raises ConfigError if the tokenizer has none of this text."""
    number = tokenizer.special_tokens.get(token)
    if number is None:
        known = nearest(token, list(tokenizer.special_tokens))
        raise ConfigError(f"'{token}' is no special token of the model's tokenizer{known}")
    return number
