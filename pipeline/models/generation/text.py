"""Ids as they come, turned into text: whole characters only, up to a stop string. Knows no tokenizer and no torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no character are decoded to
CONTEXT_IDS = 4  # of the prompt that are decoded with the first ids


class Text:
    """What one row says so far.

    Ids are decoded together with a few before them, because what an id says can depend on these: whether a word begins
    with a space, or which character its bytes are the end of.

    Attributes:
        text: The whole characters so far, without a stop string and what follows it.
        stopped: Whether there was a stop string.
        closed: Whether nothing will follow.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        """Begin with no text.

        Args:
            decode: Gives the text of ids.
            before: The ids that the row continues; they are not part of its text.
        """
        self.text, self.stopped, self.closed = "", False, False
        self._decode, self._stop = decode, [text for text in stop if text]
        self._context = list(before)[-CONTEXT_IDS:]
        self._known = decode(self._context)  # what of the decoded text is not new
        self._fresh_ids: list[int] = []
        self._fresh = ""

    def add(self, new_id: int) -> bool:
        """Take the next id and return whether the text has a stop string now, which ends it."""
        self._fresh_ids = [*self._fresh_ids, new_id]  # not in place: copies share it
        self._fresh = self._decode([*self._context, *self._fresh_ids])[len(self._known) :]
        whole = self._fresh.rstrip(BROKEN)  # the last bytes may be the beginning of a character
        if self._find_stop(whole):
            return True
        if whole and whole == self._fresh:
            self.text += whole
            self._context, self._fresh_ids, self._fresh = self._fresh_ids, [], ""
            self._known = self._decode(self._context)
        return False

    def close(self) -> None:
        """Say that nothing follows: bytes that have waited to become a character show that they are none."""
        if not self.stopped:
            self.text += self._fresh
        self._fresh_ids, self._fresh, self.closed = [], "", True

    @property
    def certain(self) -> str:
        """The text without an end that could be the beginning of a stop string."""
        if self.closed or not self._stop:
            return self.text
        longest = max(map(len, self._stop)) - 1
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(len(stop) > size and stop.startswith(self.text[-size:]) for stop in self._stop):
                return self.text[:-size]
        return self.text

    def copy(self) -> Text:
        """Return the same text, to be continued in another way."""
        return copy.copy(self)

    def _find_stop(self, fresh: str) -> bool:
        if not self._stop:
            return False
        # a stop string may begin in the text before, but was not whole there
        whole = self.text + fresh
        start = max(0, len(self.text) - max(map(len, self._stop)) + 1)
        found = [place for stop in self._stop if (place := whole.find(stop, start)) >= 0]
        if found:
            self.text, self.stopped = whole[: min(found)], True
        return self.stopped
