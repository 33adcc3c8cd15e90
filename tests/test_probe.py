"""What the nodes of a training say of themselves, where they cannot say all. (The rest: tests/slurm.)"""

import json

import pytest

from pipeline import preflight, probe
from pipeline.launch.slurm import Slurm


def test_a_disk_that_cannot_be_written_is_what_a_node_complains_of(tmp_path):
    (tmp_path / "file").touch()
    found = probe._disk(tmp_path / "file")  # where root may do nothing either
    assert found == {"disk_error": f"Not a directory: {tmp_path}/file/work/preflight"}


def test_a_node_is_measured_and_nothing_stays(tmp_path):
    assert min(probe._disk(tmp_path).values()) > 0
    assert [path.name for path in (tmp_path / probe.MARKS).iterdir()] == [probe._node()]


@pytest.mark.parametrize("rest", ['{"node": "n2", "pyt', ""])
def test_a_line_that_was_cut_off_is_no_answer(monkeypatch, tmp_path, capfd, rest):
    whole = {"node": "n1", "python": "3.11"}
    srun = tmp_path / "srun"
    srun.write_text(f"#!/bin/sh\necho '0: {probe.SAYS}{json.dumps(whole)}'\nprintf '%s' '1: {probe.SAYS}{rest}'\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert preflight._step(Slurm(nodes=2, ranks=2), "look", str(tmp_path)) == ([whole], [])
