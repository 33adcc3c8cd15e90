"""A rank that stands still is named, the others show what they were doing, and no process stays behind."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from support import PROJECT

from pipeline.env import StopRequest
from pipeline.errors import Lost
from pipeline.launch import local
from pipeline.launch.lock import locked
from pipeline.launch.tries import begin_attempt

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("stalls")]

TIMEOUT_S = 4.0  # many times what a step of these ranks takes on a busy machine
HALTED = r"come to a halt \(stopped, ended, or cut off\): last seen \d+ s ago in phase '{phase}' of step 3"
STANDS = r"been in phase '{phase}' of step 3 for \d+ s"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Starts ranks as the launcher does, and returns once they have ended."""
    package = tmp_path / "package"
    package.mkdir()
    shutil.copy(Path(__file__).parent / "stalling_rank.py", package / "rank.py")
    monkeypatch.setattr(local, "PACKAGE", package)
    monkeypatch.setattr(local, "GRACE_S", 2.0)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    directory = tmp_path / "run"
    (directory / "work").mkdir(parents=True)

    def start(world, **told):
        settings = {"timeout_s": TIMEOUT_S, "steps": 10, "rank": None, "phase": None, "way": None} | told
        (directory / "work/stall.json").write_text(json.dumps(settings))
        with locked(directory) as lock:
            local.launch(directory, local.Local(ranks=world), begin_attempt(directory), lock, StopRequest())
        return directory

    start.directory = directory
    return start


def processes(directory):
    return [int(path.read_text()) for path in directory.glob("pid-*")]


def exists(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("world", "rank", "phase", "way", "how"),
    [
        (2, 1, "feed", "sleep", STANDS),
        (4, 2, "feed", "sleep", STANDS),
        (2, 0, "forward", "sleep", STANDS),
        (2, 1, "forward", "hang", STANDS),
        (2, 1, "forward", "hold", HALTED),
        (4, 3, "update", "stop", HALTED),
        (2, 0, "feed", "stop", HALTED),
    ],
)
def test_a_rank_that_stands_still_is_named(run, world, rank, phase, way, how):
    began = time.monotonic()
    with pytest.raises(Lost) as caught:
        run(world, rank=rank, phase=phase, way=way)
    assert time.monotonic() - began < 60
    message = str(caught.value)
    wanted = rf"rank {rank} of {world} has {how.format(phase=phase)}; run.stall_timeout_s is 4; .* the same command"
    assert re.match(wanted, message), message
    directory = run.directory
    assert len(processes(directory)) == world
    assert not any(map(exists, processes(directory)))
    for other in range(world):
        log = (directory / f"logs/rank-{other:05d}.log").read_text()
        if other == rank and way in ("stop", "hold"):
            assert "Python stacks" not in log  # it cannot
        else:
            assert f"rank {other}: the run has stalled; its Python stacks:" in log
            assert "in main" in log
            assert json.loads((directory / f"work/failure-{other:05d}.json").read_text())["problems"] == [message]
    if way == "sleep":
        assert "in halt" in (directory / f"logs/rank-{rank:05d}.log").read_text()


def test_a_run_that_stalled_can_be_started_again(run):
    with pytest.raises(Lost, match="rank 1 of 2"):
        run(2, rank=1, phase="feed", way="sleep")
    run(2)
    assert not any(map(exists, processes(run.directory)))


def test_ranks_that_move_are_left_alone(run):
    directory = run(2, steps=100, timeout_s=1.0)  # a second and more of steps
    assert not list(directory.glob("work/failure-*"))
