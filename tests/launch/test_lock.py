"""Owners on other machines are played by their signature in the lock's file, as a shared file system shows it."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from pipeline.errors import LaunchError
from pipeline.launch import lock
from pipeline.launch.lock import age_s, locked, read_owner

ELSEWHERE = {"words": "process 7 on another-host", "host": "another-host", "pid": 7, "job": None}


def sign(directory, owner, seconds_ago):
    path = directory / "work/lock"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(owner))
    then = time.time() - seconds_ago
    os.utime(path, (then, then))
    return path


def take(directory, **patience):
    with locked(directory, **patience):
        return read_owner(directory)


@pytest.fixture
def no_flock(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    for name in (
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_RESTART_COUNT",
        "SLURM_CLUSTER_NAME",
    ):
        monkeypatch.delenv(name, raising=False)


def test_the_owner_signs_and_leaves_nothing_behind(tmp_path):
    owner = take(tmp_path)
    assert (owner["pid"], owner["host"], owner["job"]) == (os.getpid(), os.uname().nodename, None)
    assert owner["words"] == f"process {os.getpid()} on {os.uname().nodename}"
    assert (tmp_path / "work/lock").read_bytes() == b""
    assert read_owner(tmp_path) is None
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["lock"]


def test_an_owner_in_slurm_says_which_job_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert take(tmp_path)["words"].startswith("SLURM job 12 (process ")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert take(tmp_path)["job"] == "9_3"


def test_an_owner_on_another_host_without_a_sign_of_life_is_taken_over(tmp_path):
    sign(tmp_path, ELSEWHERE, lock.STALE_S + 10)
    assert take(tmp_path)["pid"] == os.getpid()


def test_an_owner_on_another_host_that_lives_is_named_with_its_age(tmp_path):
    path = sign(tmp_path, ELSEWHERE, 20)
    with pytest.raises(LaunchError) as caught:
        take(tmp_path)
    words = str(caught.value)
    assert words.startswith(f"{tmp_path}: process 7 on another-host, whose last sign of life came 2")
    assert words.endswith(" s ago, is working in it; wait for it or end it")
    assert json.loads(path.read_text()) == ELSEWHERE
    assert age_s(path) > 19  # asking is no sign of life


def test_whoever_has_patience_takes_over_once_the_owner_was_silent_for_long_enough(tmp_path, monkeypatch):
    sign(tmp_path, ELSEWHERE, 0)
    with pytest.raises(LaunchError, match="another-host"):
        take(tmp_path)
    monkeypatch.setattr(lock.time, "sleep", lambda _: sign(tmp_path, ELSEWHERE, lock.STALE_S + 10))
    assert take(tmp_path, patience_s=600)["pid"] == os.getpid()


@pytest.fixture
def slurm(monkeypatch):
    """Lets this process be in job 12 of a cluster, begun again once, of which no other job is known any more."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(lock.scheduler, "look", lambda ids, pauses_s: {})


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize(
    ("signature", "is_gone"),
    [
        ({"job": "12"}, True),  # as they once were
        ({"job": "12", "cluster": "here", "restarts": 0}, True),
        ({"job": "12", "cluster": "here", "restarts": 1}, False),  # the same run, on another node of this job
        ({"job": "12", "cluster": "there", "restarts": 0}, False),
        ({"job": "11"}, True),
        ({"job": "11", "cluster": "here", "restarts": 0}, True),
        ({"job": "11", "cluster": "there", "restarts": 0}, False),  # whom SLURM does not know here
        ({"job": None, "cluster": None, "restarts": 0}, False),
    ],
)
def test_an_owner_in_a_slurm_job_is_gone_once_that_was_begun_again_or_is_over(tmp_path, signature, is_gone):
    sign(tmp_path, {**ELSEWHERE, **signature}, 0)
    if is_gone:
        taken = take(tmp_path)
        assert (taken["job"], taken["cluster"], taken["restarts"]) == ("12", "here", 1)
    else:
        with pytest.raises(LaunchError, match="another-host"):
            take(tmp_path)


def test_an_owner_on_this_host_that_was_killed_is_gone_at_once(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from pipeline.launch.lock import locked\n"
        "with locked(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert done.returncode == -9
    assert read_owner(tmp_path)["host"] == os.uname().nodename
    assert take(tmp_path)["pid"] == os.getpid()


def test_the_heart_beats_while_the_lock_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    path = tmp_path / "work/lock"
    with locked(tmp_path):
        for _ in range(3):  # each time it is set back, the next beat brings it to now
            os.utime(path, (1, 1))
            deadline = time.monotonic() + 10
            while path.stat().st_mtime == 1:
                assert time.monotonic() < deadline, "no beat came"
                time.sleep(0.005)
            assert age_s(path) < 10
    assert not hearts()


def test_who_was_taken_over_neither_beats_for_the_new_owner_nor_erases_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    with locked(tmp_path):
        (heart,) = hearts()
        sign(tmp_path, ELSEWHERE, lock.STALE_S + 10)
        heart.join(60)
        assert not heart.is_alive()
    assert read_owner(tmp_path) == ELSEWHERE


def hearts():
    return [thread for thread in threading.enumerate() if thread.name == "lock"]


@pytest.mark.usefixtures("no_flock")
def test_without_locks_of_the_kernel_the_heartbeat_decides(tmp_path):
    sign(tmp_path, ELSEWHERE, 5)
    with pytest.raises(LaunchError, match="another-host, whose last sign of life came"):
        take(tmp_path)
    sign(tmp_path, ELSEWHERE, lock.STALE_S + 10)
    assert take(tmp_path)["pid"] == os.getpid()


@pytest.mark.usefixtures("no_flock")
def test_without_locks_of_the_kernel_two_on_one_host_do_not_share_a_directory(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(LaunchError, match=rf"process {os.getpid()} on .* s ago, is working in it"),
        locked(tmp_path),
    ):
        pass
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    sign(tmp_path, {**ELSEWHERE, "host": os.uname().nodename, "pid": gone.pid}, 0)
    assert take(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("locks", ["no_flock", "slurm"])  # "slurm": each node may have locks of its own
def test_of_two_on_two_hosts_at_the_same_moment_one_has_it(tmp_path, monkeypatch, request, locks):
    request.getfixturevalue(locks)

    def sleep(_):  # another host signs while this one waits to see whether it is alone
        sign(tmp_path, ELSEWHERE, 0)

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with pytest.raises(LaunchError, match="is working in it"):
        take(tmp_path)
    assert read_owner(tmp_path) == ELSEWHERE


def test_a_damaged_signature_holds_nobody_up(tmp_path):
    for text in ('{"words": "process', "[1]", "7", json.dumps({**ELSEWHERE, "pid": "x"})):
        sign(tmp_path, ELSEWHERE, 0).write_text(text)
        assert take(tmp_path)["pid"] == os.getpid()


def test_locks_of_other_names_do_not_exclude_one_another(tmp_path):
    with locked(tmp_path), locked(tmp_path, "lock-00003"):
        assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["lock", "lock-00003"]
