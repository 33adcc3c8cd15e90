import io
import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from pipeline.env import Share
from pipeline.errors import ConfigError, LaunchError
from pipeline.launch.failures import guessed_reason, leave_reason, left_reason
from pipeline.launch.local import _first, _pump
from pipeline.launch.lock import locked
from pipeline.launch.silence import Silence


def test_a_directory_is_locked_against_a_second_run(tmp_path):
    owner = rf"process {os.getpid()} on .* is working in it"
    with locked(tmp_path), pytest.raises(LaunchError, match=owner), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_the_lock_lives_as_long_as_a_rank_that_inherited_it(tmp_path):
    with locked(tmp_path) as descriptor:
        inherited = os.dup(descriptor)  # what a rank holds after its launcher was killed
    with pytest.raises(LaunchError, match="is working in it"), locked(tmp_path):
        pass
    os.close(inherited)
    with locked(tmp_path):
        pass


def test_of_a_redrawn_line_only_the_end_is_logged(tmp_path):
    reader, writer = os.pipe()
    log = (tmp_path / "log").open("ab")
    stream = io.FileIO(reader)
    pump = threading.Thread(target=_pump, args=(stream, log, False))
    pump.start()
    os.write(writer, b"first\n\r\x1b[2K1/3\r\x1b[2K2/3")
    os.write(writer, b"\r\x1b[2Klast\nno end of line")
    os.close(writer)
    pump.join()
    stream.close()
    assert (tmp_path / "log").read_bytes() == b"first\nlast\nno end of line\n"


@pytest.mark.parametrize(
    ("statuses", "rank"),
    [([0, 1], 1), ([1, -9], 1), ([1, 1], 0), ([None, 5], 1), ([75, None], 0)],
)
def test_a_rank_that_a_signal_ended_is_to_blame_before_those_that_lost_it(statuses, rank):
    assert _first(statuses) == rank


def test_the_reason_of_a_rank_keeps_its_class_and_its_lines(tmp_path):
    (tmp_path / "work").mkdir()
    leave_reason(tmp_path, 1, ConfigError("a: b", "c: d"))
    error = left_reason(tmp_path, 1)
    assert isinstance(error, ConfigError)
    assert error.problems == ("a: b", "c: d")


def test_a_rank_without_a_reason_shows_the_end_of_its_log(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-00002.log").write_text("".join(f"line {i}\n" for i in range(100)))
    error = guessed_reason(tmp_path, 2, -11)
    assert isinstance(error, LaunchError)
    assert "rank 2 was ended by SIGSEGV" in str(error)
    assert "line 99" in str(error)
    assert "line 50" not in str(error)
    assert "rank 2 exited with status 7" in str(guessed_reason(tmp_path, 2, 7))


def test_a_reason_cut_by_a_full_disk_is_none(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/failure-00000.json").write_text("")
    assert left_reason(tmp_path, 0) is None
    assert left_reason(tmp_path, 1) is None


def test_a_rank_never_waits_for_a_terminal_that_is_gone(tmp_path, monkeypatch):
    gone, other = os.pipe()
    os.close(gone)
    terminal = io.FileIO(other, "w")
    monkeypatch.setattr("sys.stdout", SimpleNamespace(buffer=terminal))
    reader, writer = os.pipe()
    stream, log = io.FileIO(reader), (tmp_path / "log").open("ab")
    pump = threading.Thread(target=_pump, args=(stream, log, True))
    pump.start()
    for _ in range(100):  # more than a pipe holds
        os.write(writer, b"x" * 1000 + b"\n")
    os.close(writer)
    pump.join(timeout=10)
    assert not pump.is_alive()
    stream.close()
    terminal.close()
    assert (tmp_path / "log").stat().st_size == 100 * 1001


def test_what_a_rank_prints_on_a_full_disk_changes_no_exit_status():
    program = "import sys; from pipeline.launch.local import _show; sys.exit(75 if not _show(b'x') else 0)"
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", program], stdout=full).returncode == 75


@pytest.mark.parametrize(
    ("beats", "is_too_long"),
    [
        ([100.0, 200.0], True),
        ([100.0, 10.0], False),
        ([100.0], False),
        ([100.0, "end"], False),
    ],
)
def test_ranks_that_are_all_silent_are_ended_and_those_at_their_end_are_not(tmp_path, beats, is_too_long):
    hearts = tmp_path / "work/heartbeats"
    hearts.mkdir(parents=True)
    for rank, beat in enumerate(beats):
        path = hearts / f"{rank:05d}"
        path.write_text(json.dumps(["end" if beat == "end" else "feed", 0, 1, 1, 0.0]))
        silent_s = 100.0 if beat == "end" else beat
        os.utime(path, (time.time() - silent_s,) * 2)
    silence = Silence(tmp_path, Share(world=2, first=0, count=2), timeout_s=10.0)
    assert silence.is_too_long() == is_too_long
    if is_too_long:
        assert str(silence.error()) == (
            f"{tmp_path}: no rank gave a sign of life for 50 s, so they were ended; the same command continues"
        )
