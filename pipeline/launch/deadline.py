"""When the time of a SLURM job is so nearly over that its state has to be saved now."""

import os
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from pipeline.artifact import WORK
from pipeline.errors import LaunchError
from pipeline.launch import scheduler
from pipeline.stage import SAVE_FILE

MARGIN = 2.0  # times what saving took at the most
LOOK_AGAIN_S = 300.0  # an administrator may have given the job more time


class Deadline:
    """Knows the end of this job's time, and what saving took."""

    def __init__(self, directory: Path, notice_s: float) -> None:
        """Ask SLURM for the end.

        Args:
            notice_s: What saving is taken to need until it has been measured.
        """
        self._saving, self._notice_s = directory / WORK / SAVE_FILE, notice_s
        self._look()

    def is_near(self) -> bool:
        """Return whether the state has to be saved now."""
        now = time.time()
        if now - self._looked > LOOK_AGAIN_S:
            self._look()
        if now < self._end - self._lead_s():
            return False
        if now - self._looked > 1:
            self._look()
        return now >= self._end - self._lead_s()

    def _lead_s(self) -> float:
        """Return how long before the end: never more than a third of the whole time."""
        saved = 0.0
        with suppress(OSError, ValueError):
            saved = MARGIN * float(self._saving.read_text("ascii"))
        return min(max(saved, self._notice_s), (self._end - self._start) / 3)

    def _look(self) -> None:
        self._looked, self._start, self._end = time.time(), 0.0, float("inf")
        with suppress(LaunchError, KeyError, ValueError):  # "Unknown" is a job without limit
            job = scheduler.show(os.environ["SLURM_JOB_ID"])
            self._start, self._end = (
                datetime.fromisoformat(job[name]).timestamp() for name in ("StartTime", "EndTime")
            )
