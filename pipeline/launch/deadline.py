"""When the time of a SLURM job is so nearly over that its state has to be saved now."""

import threading
import time
from contextlib import suppress
from pathlib import Path

from pipeline.artifact import WORK
from pipeline.errors import LaunchError
from pipeline.launch import scheduler
from pipeline.launch.lock import slurm_job
from pipeline.stage import SAVE_FILE

MARGIN = 2.0  # times what saving took at the most
LOOK_AGAIN_S = 300.0  # an administrator may have given the job more time
FRESH_S = 2.0  # age of an answer that is good enough to stop for
ANSWER_S = 10.0  # after which nobody waits for a new one
PAUSE_S = 1.0  # between two questions


class Deadline:
    """Knows the end of this job's time, and what saving took.

    SLURM is asked by a thread: where it does not answer, the end that is known stands, and nobody waits. The end is
    told by the controller's clock, as is how far away it is; from there on it is counted without any clock's time.
    """

    def __init__(self, directory: Path, notice_s: float) -> None:
        """Begin to ask SLURM for the end.

        Args:
            notice_s: What saving is taken to need until it has been measured.
        """
        self._saving, self._notice_s = directory / WORK / SAVE_FILE, notice_s
        self._whole_s = self._end = float("inf")
        self._answered = float("-inf")
        self._unanswered: float | None = None  # the first question since the last answer
        self._ask()

    def is_near(self) -> bool:
        """Return whether the state has to be saved now."""
        now, first = time.monotonic(), self._unanswered
        left_s = self._end - now
        near = left_s < self._whole_s / 3 and left_s <= self._lead_s()  # first what needs no disk
        is_old = now - self._answered > (FRESH_S if near else LOOK_AGAIN_S)
        if is_old and now - self._asked > PAUSE_S and not self._looking.is_alive():
            self._ask()
        return near and (not is_old or (first is not None and now - first > ANSWER_S))

    def _lead_s(self) -> float:
        """Return how long before the end."""
        saved = 0.0
        with suppress(OSError, ValueError):
            saved = MARGIN * float(self._saving.read_text("ascii"))
        return max(saved, self._notice_s)

    def _ask(self) -> None:
        self._asked = time.monotonic()
        if self._unanswered is None:
            self._unanswered = self._asked
        self._looking = threading.Thread(target=self._look, name="deadline", daemon=True)
        self._looking.start()

    def _look(self) -> None:
        job = slurm_job()
        assert job is not None
        with suppress(LaunchError):
            told = scheduler.show(job)
            start, end = (scheduler.time_of(told.get(name, "")) for name in ("StartTime", "EndTime"))
            left_s = float("inf") if end is None else end - scheduler.clock()
            now = time.monotonic()
            self._whole_s, self._end = (end or float("inf")) - (start or 0.0), now + left_s
            self._answered, self._unanswered = now, None
