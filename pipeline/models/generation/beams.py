"""Beam search: for each prompt the best of many texts, followed side by side.

At every step each beginning is continued in all ways, and the best `num_beams` that have not ended go on. Of these a
text ends that reaches the end of a text while it is among the best `num_beams`. The search for a prompt is over when it
has `num_beams` texts and the best beginning, scored as if it ended here, is no better than the worst of them; these are
the rules of transformers, so that both find the same.

Letters of the shape suffixes: B rows, P prompts, V ids of the vocabulary, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.models.generation.reading import Reader
from pipeline.models.generation.rows import Row
from pipeline.models.generation.sampling import Repetition
from pipeline.models.generation.settings import BeamSearch
from pipeline.models.generation.text import Text


@dataclass
class Beam:
    """The beginning of a text, or a whole one.

    Attributes:
        score: The logarithm of its probability; of a whole text, with the length penalty.
        parent: Which of the beams before it continues.
    """

    ids: list[int]
    score: float
    text: Text | None
    parent: int = 0


@dataclass
class Search:
    """The search for one prompt."""

    row: Row
    settings: BeamSearch
    running: list[Beam] = field(default_factory=list)
    ended: list[Beam] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.running = [Beam([], 0.0, self.row.text)]

    def advance(self, candidates: Iterable[tuple[float, int, int]]) -> None:
        """Go one id further.

        Args:
            candidates: Twice as many as there are beams, the best first: (score, which beam goes on, with which id).
        """
        count, before = self.settings.num_beams, self.running
        self.running = []
        for rank, (score, parent, new_id) in enumerate(candidates):
            if score == -math.inf or len(self.running) == count:
                break
            beam, ended = self._continued(before[parent], score, parent, new_id)
            if not ended:
                self.running.append(beam)
            elif rank < count:
                beam.score /= (len(before[parent].ids) + 1) ** self.settings.length_penalty
                self.ended.append(beam)
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[:count]

    @property
    def done(self) -> bool:
        """Whether nothing better is to be found, by the rule of this module."""
        if not self.running:
            return True
        best = self.running[0]
        hoped = best.score / len(best.ids) ** self.settings.length_penalty
        return len(self.ended) == self.settings.num_beams and hoped <= self.ended[-1].score

    def finish(self) -> None:
        """Give the row the best text."""
        for new_id in self.ended[0].ids:
            self.row.take(new_id)
        if not self.row.closed:
            self.row.close()

    def _continued(self, beam: Beam, score: float, parent: int, new_id: int) -> tuple[Beam, bool]:
        """Return a beam with one more id, and whether it ends there."""
        if new_id == self.row.end_id:
            return Beam(beam.ids, score, beam.text, parent), True
        text = None if beam.text is None else beam.text.copy()
        stopped = text is not None and text.add(new_id)
        longer = Beam([*beam.ids, new_id], score, text, parent)
        return longer, stopped or len(longer.ids) == self.row.room


def search(
    reader: Reader, rows: list[Row], repetition: Repetition, settings: BeamSearch, watch: Callable[[], None]
) -> None:
    """Give every row the best text that is found, until all are closed."""
    searches, width, new_ids = [Search(row, settings) for row in rows], 1, None
    while True:
        logp_BV = repetition.apply(reader.read(new_ids)).log_softmax(-1)
        for found, candidates in zip(searches, _candidates(logp_BV, searches, width, settings.num_beams), strict=True):
            found.advance(candidates)
        kept: list[int] = []  # the rows that go on, by their number now
        new_ids = []
        for number, found in enumerate(searches):
            if found.done:
                found.finish()
                continue
            # where fewer go on, the first stands in for them and has no chance
            beams = found.running + found.running[:1] * (settings.num_beams - len(found.running))
            kept += [number * width + beam.parent for beam in beams]
            new_ids += [beam.ids[-1] for beam in beams]
        watch()
        searches = [found for found in searches if not found.row.closed]
        if not searches:
            return
        reader.select(kept)
        repetition.select(kept)
        repetition.add(new_ids)
        width = settings.num_beams


def _candidates(
    logp_BV: Tensor, searches: list[Search], width: int, num_beams: int
) -> list[list[tuple[float, int, int]]]:
    """Return for each search the best continuations of its beams; see `Search.advance`."""
    scores = [[b.score for b in s.running] + [-math.inf] * (width - len(s.running)) for s in searches]
    total_BV = logp_BV + torch.tensor(scores, device=logp_BV.device).view(-1, 1)
    vocab_size = logp_BV.shape[-1]
    best_PC = total_BV.view(len(searches), -1).topk(min(2 * num_beams, width * vocab_size), dim=-1)
    return [
        [(score, place // vocab_size, place % vocab_size) for score, place in zip(*pair, strict=True)]
        for pair in zip(best_PC.values.tolist(), best_PC.indices.tolist(), strict=True)
    ]
