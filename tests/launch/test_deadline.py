"""When the end of a job's time is near, whatever clocks say. (With a SLURM that keeps time: tests/slurm.)"""

from datetime import UTC, datetime

import pytest

from pipeline.errors import LaunchError
from pipeline.launch import deadline
from pipeline.launch.deadline import ANSWER_S, LOOK_AGAIN_S, Deadline

NOTICE_S = 100.0


class Slurm:
    """Tells the end of a job of an hour by a clock of its own, and how often it was asked."""

    def __init__(self) -> None:
        self.passed_s, self.end_s, self.questions, self.answers = 0.0, 3600.0, 0, True

    def show(self, job: str) -> dict[str, str]:
        self.questions += 1
        if not self.answers:
            raise LaunchError("scontrol: no answer")
        return {"StartTime": time_at(0), "EndTime": "Unknown" if self.end_s is None else time_at(self.end_s)}


def time_at(seconds: float) -> str:
    return datetime.fromtimestamp(1_000_000_000 + seconds, UTC).strftime("%FT%T")


@pytest.fixture
def slurm(monkeypatch):
    played = Slurm()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr(deadline.scheduler, "show", played.show)
    monkeypatch.setattr(deadline.scheduler, "clock", lambda: 1_000_000_000 + played.passed_s)
    monkeypatch.setattr(deadline.time, "monotonic", lambda: 50.0 + played.passed_s)
    return played


@pytest.fixture
def is_near(slurm, tmp_path):
    """Tells whether the end is near after so many seconds, where a question is answered at once."""
    watched = Deadline(tmp_path, NOTICE_S)

    def look(passed_s: float) -> bool:
        watched._looking.join()
        slurm.passed_s = passed_s
        watched.is_near()
        watched._looking.join()
        return watched.is_near()

    return look


def test_the_state_is_saved_as_long_before_the_end_as_it_takes(slurm, is_near, tmp_path):
    assert not is_near(3600 - NOTICE_S - 1)
    assert is_near(3600 - NOTICE_S)
    (tmp_path / "work").mkdir()
    (tmp_path / "work/save_s").write_text("150")
    assert not is_near(3299)
    assert is_near(3300)
    (tmp_path / "work/save_s").write_text("9999")
    assert not is_near(2400)
    assert is_near(2401)  # never more than a third


def test_what_saving_took_is_not_read_before_the_last_third(slurm, is_near, monkeypatch):
    monkeypatch.setattr(Deadline, "_lead_s", lambda self: pytest.fail("a shared disk was asked, which all ranks share"))
    for passed_s in (0, 1000, 2400):
        assert not is_near(passed_s)


def test_slurm_is_asked_now_and_then_and_before_it_is_believed(slurm, is_near):
    assert not is_near(LOOK_AGAIN_S)
    assert slurm.questions == 1
    assert not is_near(LOOK_AGAIN_S + 1)
    assert slurm.questions == 2
    slurm.end_s = 7200.0  # an administrator gives it more
    assert not is_near(3590)
    slurm.end_s = None
    assert not is_near(7190)
    assert not is_near(1e6)


def test_the_end_that_is_known_stands_once_slurm_has_not_answered_for_a_while(slurm, is_near):
    assert not is_near(3400)
    slurm.answers, before = False, slurm.questions
    for tenth in range(round(10 * ANSWER_S) + 1):
        assert not is_near(3510 + tenth / 10)
    assert slurm.questions - before <= ANSWER_S + 1  # however quickly it fails
    assert is_near(3510 + ANSWER_S + 1)


def test_it_is_not_near_while_nothing_is_known(slurm, is_near):
    slurm.answers = False
    assert not is_near(3590)
