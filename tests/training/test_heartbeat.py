import json
import re
import threading
import time

import pytest

from pipeline.errors import Lost
from pipeline.training.heartbeat import BEAT_BYTES, END, Heart, Pulse, blame, read_pulse

NOW, TIMEOUT = 1000.0, 30.0


class Ends:
    """Takes the place of what ends a process: holds the watcher's thread for ever."""

    def __init__(self):
        self.status, self.came = None, threading.Event()

    def __call__(self, status):
        self.status = status
        self.came.set()
        threading.Event().wait()


def pulse(rank, place=(0, 7, 2), phase="forward", since=NOW - 31, alive=NOW - 1, **more):
    return Pulse(rank, place, phase, since, alive, **more)


def test_a_beat_says_where_the_rank_is(tmp_path):
    with Heart(tmp_path, 3, 4, 60.0, 5, leave=lambda error: None) as heart:
        assert read_pulse(tmp_path, 3, 5).phase == "start"
        heart.beat("feed", 1)
        heart.beat("forward")
        seen = read_pulse(tmp_path, 3, 5)
        assert (seen.rank, seen.place, seen.phase) == (3, (0, 1, 2), "forward")
        assert seen.since == pytest.approx(time.time(), abs=5)
        assert seen.alive == pytest.approx(time.time(), abs=5)
        heart.beat("feed", 2)
        assert read_pulse(tmp_path, 3, 5).place == (0, 2, 1)
        heart.beat("restore", 1)  # gone back: further than before
        assert read_pulse(tmp_path, 3, 5).place == (1, 1, 1)
    assert read_pulse(tmp_path, 3, 5).phase == END


def test_what_an_earlier_try_left_is_not_believed(tmp_path):
    with Heart(tmp_path, 0, 1, 60.0, 5, leave=lambda error: None) as heart:
        heart.beat("feed", 9)
    assert read_pulse(tmp_path, 0, 6) == Pulse(0)
    assert read_pulse(tmp_path, 1, 5) == Pulse(1)
    (tmp_path / "00001").write_text("")
    assert read_pulse(tmp_path, 1, 5) == Pulse(1)


@pytest.mark.parametrize(
    ("pulses", "words"),
    [
        (
            [pulse(0), pulse(1, (0, 7, 1), "feed")],
            "rank 1 of 2 has been in phase 'feed' of step 7 for 31 s; run.stall_timeout_s is 30",
        ),
        (
            [pulse(0, (0, 7, 9)), pulse(1, (0, 6, 20), "save")],
            "rank 1 of 2 has been in phase 'save' of step 6 for 31 s",
        ),
        ([pulse(0, (1, 3, 1), "feed"), pulse(1)], "rank 1 of 2 has been in phase 'forward' of step 7"),  # 0 went back
        ([pulse(0), pulse(1)], "ranks 0, 1 of 2 have been in phase 'forward' of step 7 for 31 s"),
        ([pulse(0, waits=True), pulse(1, waits=False)], "rank 1 of 2 has been in phase 'forward' of step 7"),
        ([pulse(0, waits=True), pulse(1, waits=True)], "ranks 0, 1 of 2 have been"),
        ([pulse(0, waits=False), pulse(1, (0, 7, 1), "feed", waits=True)], "rank 1 of 2 has been in phase 'feed'"),
        (
            [pulse(0, (0, 7, 1), alive=NOW - 1), pulse(1, since=NOW - 40, alive=NOW - 40)],
            "rank 1 of 2 has come to a halt (stopped, ended, or cut off): last seen 40 s ago in phase 'forward' of",
        ),
        ([pulse(0), Pulse(1)], "rank 1 of 2 has not begun; run.stall_timeout_s is 30"),
        ([pulse(0, (2**62, 9, 1), END, alive=0.0), pulse(1)], "rank 1 of 2 has been in phase 'forward' of step 7"),
        ([pulse(rank) for rank in range(64)], "ranks 0, 1, 2, 3, 4, 5, 6, 7, … of 64 have been"),
    ],
)
def test_who_is_to_blame(pulses, words):
    assert blame(pulses, NOW, TIMEOUT).startswith(words)


def stall(tmp_path, ends, world=1, timeout_s=0.4):
    left = []
    heart = Heart(tmp_path, 0, world, timeout_s, 1, leave=left.append, end=ends)
    heart.beat("feed", 4)
    return heart, left


def test_a_rank_that_does_not_move_leaves_the_reason_and_ends(tmp_path, capfd):
    ends = Ends()
    began = time.monotonic()
    _, left = stall(tmp_path, ends)
    assert ends.came.wait(20)
    assert time.monotonic() - began >= 0.4
    assert ends.status == Lost.exit_status == 4
    assert re.match(
        r"rank 0 of 1 has been in phase 'feed' of step 4 for \d s; .* the same command continues", str(left[0])
    )
    written = capfd.readouterr().err
    assert "rank 0: the run has stalled; its Python stacks:" in written
    assert "in test_a_rank_that_does_not_move_leaves_the_reason_and_ends" in written


def test_a_rank_that_cannot_leave_its_reason_ends_all_the_same(tmp_path, capfd):
    ends = Ends()
    heart = Heart(tmp_path, 0, 1, 0.2, 1, leave=lambda error: 1 / 0, end=ends)
    heart.beat("feed", 1)
    assert ends.came.wait(20)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_rank_that_moves_is_left_alone(tmp_path):
    ends = Ends()
    heart, left = stall(tmp_path, ends)
    for step in range(40):
        heart.beat("forward", step)
        time.sleep(0.03)
    heart.close()
    assert (ends.status, left) == (None, [])


def test_a_rank_follows_the_one_that_found_the_stall_first(tmp_path):
    ends = Ends()
    heart, left = stall(tmp_path, ends, world=2, timeout_s=2.0)
    (tmp_path / "stalled-1").write_text("rank 1 of 2 sleeps")
    for step in range(200):
        heart.beat("forward", step)
        if ends.came.wait(0.02):
            break
    assert ends.status == Lost.exit_status
    assert str(left[0]).startswith("rank 1 of 2 sleeps; ")


@pytest.mark.parametrize("attempt", [0, 1])
def test_the_verdict_of_an_earlier_try_ends_nobody(tmp_path, attempt):
    (tmp_path / "stalled-0").write_text("rank 1 of 2 sleeps")
    ends = Ends()
    with Heart(tmp_path, 0, 1, 1.0, attempt, leave=lambda error: None, end=ends) as heart:
        for step in range(20):
            heart.beat("forward", step)
            assert not ends.came.wait(0.02)
    assert not (tmp_path / "stalled-0").exists()


def test_a_file_holds_the_beat_and_what_the_watcher_says(tmp_path):
    with Heart(tmp_path, 0, 1, 60.0, 1, leave=lambda error: None) as heart:
        heart.beat("a phase of the longest name there", 10**12)
        text = (tmp_path / "00000").read_bytes()
    assert json.loads(text[:BEAT_BYTES])[2] == 10**12
    assert json.loads(text[BEAT_BYTES:])["attempt"] == 1
    assert (tmp_path / "00000").stat().st_size == 512
