"""Whether the SLURM job that was submitted for a task still holds. (How SLURM answers: tests/slurm.)"""

import json

import pytest

from pipeline.errors import LaunchError
from pipeline.launch import claim
from pipeline.launch.claim import live_claim, write_claim
from pipeline.launch.scheduler import Seen


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Of a task; SLURM says that every job runs."""
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(claim.scheduler, "look", lambda ids: {job: Seen(job, "RUNNING") for job in ids})
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    return tmp_path


def test_a_job_of_another_cluster_is_asked_about_there(directory, monkeypatch):
    write_claim(directory, "tiny", "12", "token")
    assert live_claim(directory).slurm == "12"
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "there")
    with pytest.raises(LaunchError) as caught:
        live_claim(directory)
    assert str(caught.value) == (
        f"{directory}: a SLURM job (12) was submitted for it, and whether it still runs cannot be asked (it is of "
        "cluster here, and this is there); ask on a login node of here, or, once it is over, delete "
        f"{directory}/work/claim.json"
    )


def test_an_older_claim_that_names_no_cluster_is_of_this_one(directory):
    (directory / "work/claim.json").write_text(json.dumps({"slurm": "12", "job": "tiny", "token": None}))
    assert live_claim(directory).slurm == "12"
