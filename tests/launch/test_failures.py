"""What is said of a rank that left no reason."""

import json
import signal

import pytest

from pipeline.env import Share
from pipeline.errors import LaunchError, Lost
from pipeline.launch.failures import forget_ranks, guessed_reason, short_of_memory
from pipeline.launch.output import begin_try, heading


@pytest.fixture
def freeze(tmp_path):
    """Writes what of a frozen task is looked at."""

    def freeze(**data) -> None:
        (tmp_path / "work").mkdir(exist_ok=True)
        (tmp_path / "work/task.json").write_text(json.dumps(data))

    return freeze


def test_a_rank_that_was_killed_may_have_run_out_of_memory(tmp_path, freeze):
    freeze(run={"kind": "local"}, memory_bytes=3 * 10**9)
    killed = guessed_reason(tmp_path, 1, -signal.SIGKILL)
    assert isinstance(killed, Lost)
    assert (
        "rank 1 was ended by SIGKILL; the same command continues; if nobody sent that, memory has run out: the model's "
        "states alone need about 3.0 GB a rank, activations come on top; spread the model"
    ) in str(killed)
    assert "memory" not in str(guessed_reason(tmp_path, 1, -signal.SIGSEGV))
    failed = guessed_reason(tmp_path, 1, 7)
    assert isinstance(failed, LaunchError)
    assert not isinstance(failed, Lost)


def test_what_is_not_known_of_memory_is_not_said(tmp_path, freeze):
    assert short_of_memory(tmp_path) == "give it more, or run fewer ranks on a machine"
    freeze(run={"kind": "local"}, memory_bytes=None)
    assert short_of_memory(tmp_path) == "run fewer ranks on a machine"
    freeze(run={"kind": "slurm", "memory_per_node": None}, memory_bytes=None)
    asked = "the job asked for no memory_per_node; raise run.memory_per_node, or run fewer ranks on a machine"
    assert short_of_memory(tmp_path) == asked
    freeze(run={"kind": "slurm", "memory_per_node": "2G"}, memory_bytes=5 * 10**6)
    assert "memory_per_node=2G; the model's states alone need about 5.0 MB a rank" in short_of_memory(tmp_path)


def test_of_a_log_only_what_the_last_try_printed_is_shown(tmp_path):
    log = tmp_path / "logs/rank-00000.log"
    log.parent.mkdir()
    for number, text in enumerate(("of the first try\ncut in the middle", "of the second try\n", "\n"), 1):
        begin_try(log, heading(number, "SLURM job 7 on n[1-2]"))
        with open(log, "a") as file:
            file.write(text)
        said = str(guessed_reason(tmp_path, 0, 1))
        assert said.endswith(f"; the end of {log}:\n{text.strip()}" if text.strip() else "; the same command continues")
    first, *_, second, _, third, _ = log.read_text().splitlines()
    assert first.startswith("--- try 1, SLURM job 7 on n[1-2], 20")
    assert first.endswith(" UTC ---")
    assert second.startswith("--- try 2, SLURM")
    assert third.startswith("--- try 3, SLURM")
    assert heading(2).startswith("--- try 2, 20")


def test_a_rank_that_only_lost_another_one_says_so(tmp_path):
    log = tmp_path / "logs/rank-00000.log"
    log.parent.mkdir()
    log.write_text("RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:55013.\n")
    said = str(guessed_reason(tmp_path, 0, 1))
    assert (
        "rank 0 exited with status 1 (Connection closed by peer: another rank was gone first); the same command "
        "continues; the end of "
    ) in said


def test_signs_of_life_of_an_earlier_try_are_forgotten(tmp_path):
    hearts = tmp_path / "work/heartbeats"
    hearts.mkdir(parents=True)
    for name in ("work/heartbeats/00000", "work/heartbeats/00001", "work/failure-00001.json"):
        (tmp_path / name).touch()
    forget_ranks(tmp_path, Share(world=2, first=1, count=1))
    assert [path.name for path in hearts.iterdir()] == ["00000"]
    assert not list((tmp_path / "work").glob("failure*"))
