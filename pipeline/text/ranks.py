"""Files of vocabularies as text, and the ranks of tiktoken turned into merges."""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import ArtifactError
from pipeline.text.sources import reading, regular_file
from pipeline.text.tokenizers import BYTE_CHARACTERS, NUM_BYTES


def read_text(path: Path) -> str:
    """Return the text of a file of a tokenizer.

    Raises:
        ArtifactError: If it cannot be read, is no UTF-8, or empty.
    """
    with reading(str(path)):
        text = regular_file(path).read_text("utf-8")
    if not text.strip():
        raise ArtifactError(f"{path}: this file is empty; wanted the vocabulary of a tokenizer")
    return text


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file of a tokenizer; raises what `read_text` raises."""
    return [line.removesuffix("\r") for line in read_text(path).removesuffix("\n").split("\n")]


def shown(token: bytes) -> str:
    """Return a token as byte-level vocabularies write it."""
    return "".join(BYTE_CHARACTERS[byte] for byte in token)


def recover_merges(ranks: Mapping[bytes, int]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """Return merges that give the ids of tiktoken's algorithm, and whether they alone do.

    tiktoken joins the neighbours whose bytes together have the lowest rank. If the tokens of lower rank bring every
    token's own bytes down to two parts, then no text can make it of other parts, and these merges say all: true.
    Otherwise every pair of tokens that together are one is a merge, and a pre-token that is a token must be taken
    whole, as tiktoken takes it: false.
    """
    longer = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    parts = [_parts(token, ranks) for token in longer]
    if all(len(found) == 2 for found in parts):
        return [(a, b) for a, b in parts], True
    return [pair for token in longer for pair in _pairs(token, ranks)], False


def _parts(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Return what byte-pair encoding makes of a token with the tokens of lower rank."""
    parts = [token[at : at + 1] for at in range(len(token))]
    limit = ranks[token]
    while len(parts) > 2:
        found = [ranks.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        lowest = min(found)
        if lowest >= limit:
            break
        at = found.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _pairs(token: bytes, ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return all pairs of tokens that together are `token`, the lowest ranks first."""
    cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
    pairs = [(a, b) for a, b in cuts if a in ranks and b in ranks]
    return sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def read_ranks(path: Path, others: set[int]) -> dict[bytes, int]:
    """Return the ranks of a tiktoken file; `others` are ids that it leaves free."""
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    for number, line in enumerate(read_lines(path), 1):
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            raise ArtifactError(
                f"{path}, line {number}: wanted a token in base64 and its rank, found {line[:60]!r}; "
                "it is damaged, or not a file of tiktoken"
            ) from None
        if token in ranks or rank in seen or not token:
            raise ArtifactError(
                f"{path}, line {number}: the token {token!r} or the rank {rank} is there twice; it is damaged"
            )
        ranks[token] = rank
        seen.add(rank)
    used = seen | others
    gap = next((rank for rank in range(max(seen)) if rank not in used), None)
    if gap is not None:
        raise ArtifactError(
            f"{path}: no token has rank {gap}, though {max(seen)} is the last; it is damaged, or special_ids should "
            "name the token that has this id"
        )
    missing = [byte for byte in range(NUM_BYTES) if bytes([byte]) not in ranks]
    if missing:
        raise ArtifactError(
            f"{path}: {len(missing)} of the 256 bytes are no tokens, the first {missing[0]:#04x}, so "
            "not every text could be encoded"
        )
    return ranks
