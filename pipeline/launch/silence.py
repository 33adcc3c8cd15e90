"""Notices ranks of which none gives a sign of life any more."""

import time
from pathlib import Path

from pipeline.artifact import WORK
from pipeline.env import Share
from pipeline.errors import Lost
from pipeline.stage import HEARTBEATS


class Silence:
    """Looks now and then whether the ranks of a group still run at all; what one of them waits for they see themselves.

    Where all of them are halted nobody else would notice.
    """

    def __init__(self, directory: Path, share: Share, timeout_s: float) -> None:
        ranks = range(share.first, share.first + share.count)
        self._directory = directory
        self._files = [directory / WORK / HEARTBEATS / f"{rank:05d}" for rank in ranks]
        self.limit_s, self.was_too_long = 2 * timeout_s + 30, False
        self._next = 0.0

    def is_too_long(self) -> bool:
        """Return whether no rank's heartbeat has been written for too long, though none has come to its end."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + 5
        try:
            if any(b'"end"' in path.read_bytes()[:128] for path in self._files):
                return False
            newest = max(path.stat().st_mtime for path in self._files)
        except OSError:
            return False
        self.was_too_long = time.time() - newest > self.limit_s
        return self.was_too_long

    def error(self) -> Lost:
        """Return what is said of ranks that were ended for it."""
        return Lost(
            f"{self._directory}: no rank gave a sign of life for {self.limit_s:g} s, so they were ended; the same "
            "command continues"
        )
