"""One prompt of a batch while it is continued."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from pipeline.models.generation.text import Text


@dataclass
class Row:
    """What becomes of one prompt.

    Attributes:
        room: How many ids may follow.
        end_id: The id that ends a text, and is not part of it.
        text: The same as text, if there is somebody to read it or to stop it.
        draws: All that is drawn for this row.
    """

    room: int
    end_id: int | None
    text: Text | None
    draws: random.Random
    new_ids: list[int] = field(default_factory=list)
    closed: bool = False

    def take(self, new_id: int) -> None:
        """Take the next id, which may be the last; a row that is closed takes none."""
        if self.closed:
            return
        ended = new_id == self.end_id
        if not ended:
            self.new_ids.append(new_id)
            ended = self.text is not None and self.text.add(new_id)
        if ended or len(self.new_ids) == self.room:
            self.close()

    def close(self) -> None:
        """Say that nothing follows."""
        self.closed = True
        if self.text is not None:
            self.text.close()
