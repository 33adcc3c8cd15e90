"""What is said of a rank that left no reason."""

import json
import signal

import pytest

from pipeline.errors import LaunchError, Lost
from pipeline.launch.failures import guessed_reason, short_of_memory


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
