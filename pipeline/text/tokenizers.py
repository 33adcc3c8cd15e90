"""Tokenizers in the Hugging Face format: built, loaded, and run over batches of text.

Only this module and `trainers` import `tokenizers`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ArtifactError
from pipeline.settings import fingerprint

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

END_OF_TEXT = "<|endoftext|>"
TOKENIZER = "tokenizer.json"
NUM_BYTES = 256  # the alphabet of byte-level tokenizers, always in the vocabulary

_SHOWN_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN_BYTES = [byte for byte in range(NUM_BYTES) if byte not in _SHOWN_BYTES]
# The character that stands for each byte in a byte-level vocabulary (Radford et al. 2019): its own where that can be
# seen, else one from U+0100 on. In the order of the characters, which is also how GPT-2 numbers the bytes.
BYTE_CHARACTERS = {byte: chr(byte) for byte in _SHOWN_BYTES} | {
    byte: chr(NUM_BYTES + number) for number, byte in enumerate(_HIDDEN_BYTES)
}


class Tokenizer:
    """A tokenizer in the Hugging Face format.

    Note: the text of a special token in a document is encoded as ordinary text, so that no document can forge an end
    of text, and nothing is added, padded or cut off.
    """

    def __init__(self, inner: Any) -> None:
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(map(int, self._inner.get_vocab(with_added_tokens=True).values()))

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by their text, in the order of the ids."""
        return self._added(special=True)

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Ids of the ordinary added tokens by their text: those that are found in a text before the model sees it."""
        return self._added(special=False)

    @cached_property
    def unknown_token(self) -> str | None:
        """The token that stands for what the vocabulary cannot express, or null where it can express everything."""
        model = self.data["model"]
        if model.get("unk_id") is not None:
            return str(model["vocab"][model["unk_id"]][0])
        token: str | None = model.get("unk_token")
        return token

    @property
    def data(self) -> dict[str, Any]:
        """What `tokenizer.json` holds; made anew at every call."""
        data: dict[str, Any] = json.loads(self._inner.to_str())
        return data

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the tokenizer, whatever its file is formatted like."""
        return fingerprint(self.data)

    @property
    def dtype(self) -> str:
        """The smallest type that holds every id, uint16 or uint32."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, or null if the vocabulary lacks it."""
        number: int | None = self._inner.token_to_id(token)
        return number

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(
        self, texts: Sequence[str], end: int | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Return (the ids of all texts one after another, of `dtype`; how many each text has).

        Args:
            end: An id to put after each text, counted with it.
        """
        import numpy as np

        closing = [] if end is None else [end]
        rows = [e.ids + closing for e in self._inner.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        values = np.fromiter(itertools.chain.from_iterable(rows), self.dtype, int(lengths.sum()))
        return values, lengths

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        text: str = self._inner.decode(ids, skip_special_tokens=False)
        return text

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self._inner.save(str(path), pretty=True)

    def train(self, texts: Iterable[str], trainer: Any) -> None:
        """Train the model with a trainer of the library."""
        self._inner.train_from_iterator(texts, trainer)
        self._forget()

    def extend(self, special_tokens: Sequence[str], added_tokens: Sequence[str]) -> None:
        """Make tokens special or added ones: those of the vocabulary keep their ids, the others get the next.

        Text is split where the model would otherwise make a special token out of it (a Unigram model holds its special
        tokens among its pieces), so that only the text that spells one is encoded differently.

        Raises:
            ArtifactError: If an added token is special already, or ordinary text can become a special token.
        """
        from tokenizers import AddedToken

        if demoted := [token for token in added_tokens if token in {*special_tokens, *self.special_tokens}]:
            raise ArtifactError(f"added_tokens: '{demoted[0]}' is a special token of this tokenizer, and stays one")
        self._inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special_tokens])
        self._inner.add_tokens([AddedToken(t, special=False, normalized=False) for t in added_tokens])
        self._forget()
        if forged := self._forged():
            self._split([token for token in forged if len(token) > 1])
        if forged := self._forged():
            raise ArtifactError(
                f"special_tokens: ordinary text is encoded to the special token '{forged[0]}'; a special token must be "
                "one that no text contains, such as '<|im_start|>'"
            )

    def _forget(self) -> None:
        """Forget what was cached."""
        for name in ("vocab_size", "special_tokens", "added_tokens", "unknown_token", "fingerprint"):
            self.__dict__.pop(name, None)

    def _added(self, special: bool) -> dict[str, int]:
        added = sorted(self._inner.get_added_tokens_decoder().items())
        return {token.content: number for number, token in added if token.special == special}

    def _forged(self) -> list[str]:
        """Return the special tokens that their own text, alone or inside other text, is encoded to."""
        numbers = {token: number for token, number in self.special_tokens.items() if token != self.unknown_token}
        try:
            return [
                token
                for token, number in numbers.items()
                if any(
                    number in self.encode(text) for text in (token, f"a {token} a", f"a{token}a", f"0{token}{token}")
                )
            ]
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(
                f"this tokenizer cannot encode every text ({error}); take one that has all bytes, or an unknown token"
            ) from None

    def _split(self, tokens: Sequence[str]) -> None:
        """Split texts after the first character of every special token, so that no pre-token holds a whole one."""
        from tokenizers import Regex, pre_tokenizers

        between = [f"(?<={_escape(token[0])})(?={_escape(token[1:])})" for token in tokens]
        steps = [pre_tokenizers.Split(Regex("|".join(between)), "isolated")]
        if self._inner.pre_tokenizer is not None:
            steps.append(self._inner.pre_tokenizer)
        self._inner.pre_tokenizer = pre_tokenizers.Sequence(steps)


def load(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`.

    Raises:
        ArtifactError: If it is not one.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ArtifactError(
            f"{path}: not a tokenizer in the Hugging Face format ({error}); name a tokenizer.json, or another kind of "
            "vocabulary"
        ) from None


def from_json(text: str) -> Tokenizer:
    """Return the tokenizer that the content of a `tokenizer.json` describes, or raise what the library raises."""
    import tokenizers

    return Tokenizer(tokenizers.Tokenizer.from_str(text))


def byte_level(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    pattern: str | None = None,
    *,
    split: bool = True,
    ignore_merges: bool = False,
) -> Tokenizer:
    """Return a byte-level BPE tokenizer (Radford et al. 2019); decoding gives back every text.

    Args:
        vocab: Ids of the tokens, written with `BYTE_CHARACTERS`.
        merges: The pairs that become one token, the first of them first.
        pattern: Regular expression whose matches are encoded by themselves; null is GPT-2's.
        split: Whether to split texts by a pattern at all.
        ignore_merges: Whether a match that is a token needs no merges.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    inner = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges), ignore_merges=ignore_merges))
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split and pattern is None)
    if pattern is None or not split:
        inner.pre_tokenizer = bytes_alone
    else:
        by_pattern = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([by_pattern, bytes_alone])
    inner.decoder = decoders.ByteLevel()
    return Tokenizer(inner)


def word_piece(vocab: Mapping[str, int], unknown_token: str, lowercase: bool) -> Tokenizer:
    """Return a WordPiece tokenizer as BERT has it (Devlin et al. 2019); what it cannot express becomes one token."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    inner = tokenizers.Tokenizer(models.WordPiece(vocab=dict(vocab), unk_token=unknown_token))
    inner.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return Tokenizer(inner)


def _escape(text: str) -> str:
    """Return a regular expression that matches exactly `text`."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)
