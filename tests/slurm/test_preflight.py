"""The nodes of a training are tried first, on a real SLURM: what a node lacks is said of it, and nothing starts."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from support import PROJECT, run_pipeline

MODEL = "stage.model={kind: decoder, d_model: 32, num_layers: 2, num_heads: 4, vocab_size: 512}"


@pytest.fixture
def submit(cluster, tiny_tokens, tmp_path):
    """Submits a training; returns the directory of its task, and the ids of its preflight and of itself."""

    def submit(*words: object) -> tuple[Path, str, str]:
        words = ("stage=pretrain", f"stage.tokens={tiny_tokens}", MODEL, "stage.steps=2", "run=slurm", *words)
        run_pipeline(*words, f"root={tmp_path / 'root'}", SLURM_CONF=cluster.env["SLURM_CONF"])
        task = json.loads((tmp_path / "root/jobs/pretrain/job.json").read_text())["tasks"][0]
        return Path(task["directory"]), task["preflight"], task["slurm"]

    return submit


def result(directory: Path) -> dict:
    return json.loads((directory / "work/preflight.json").read_text())


def python_of(tmp_path: Path, cases: str) -> Path:
    """A python that is another one on some nodes: `cases` are of bash's `case`, by host name."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/bash\ncase $(hostname) in\n{cases}\nesac\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def test_nodes_that_have_all_that_a_training_needs_are_measured_and_it_starts(cluster, submit):
    directory, preflight, training = submit("run.nodes=2")
    assert f"afterok:{preflight}" in cluster.job(training)["Dependency"]
    cluster.wait_for(preflight, "COMPLETED", "FAILED")
    log = (directory / "logs/preflight.log").read_text()
    found = result(directory)
    code = json.loads((directory / "../../jobs/pretrain/job.json").read_text())["code"]
    assert (found["status"], found["problems"]) == (0, []), log
    assert [node["node"] for node in found["nodes"]] == cluster.nodes[:2]
    for node in found["nodes"]:
        assert node["python"] == sys.version.split()[0]
        assert node["code"] == Path(code).name
        assert min(node["write"], node["read"], node["free_bytes"]) > 0
        assert re.search(rf"^{node['node']} +{node['python']} +{re.escape(node['torch'])} ", log, re.MULTILINE)
    assert set(found["all_reduce"]) == {"1048576", "16777216", "67108864"}
    assert min(found["all_reduce"].values()) > 0
    assert "all-reduce over 2 ranks (gloo): 1 MiB " in log
    assert not (directory / "work/preflight").exists()
    cluster.wait_for(training, "RUNNING", "COMPLETED")
    cluster.scancel(training)


def test_what_a_node_lacks_is_said_of_it_and_the_training_does_not_start(cluster, submit, tmp_path):
    _, second, third, fourth = cluster.nodes
    broken = tmp_path / "broken/torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    other = tmp_path / "other/deepspeed"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("__version__ = '0.1'")
    python = python_of(
        tmp_path,
        f'{second}) export PYTHONPATH={broken.parent}:$PYTHONPATH ;;\n{third}) exec /no/python "$@" ;;\n'
        f"{fourth}) export PYTHONPATH={other.parent}:$PYTHONPATH ;;",
    )
    directory, preflight, training = submit("run.nodes=4", f"run.python={python}", "run.gpus_per_node=0")
    cluster.wait_for(preflight, "FAILED")
    assert cluster.job(preflight)["ExitCode"] == "4:0"
    cluster.wait_for(training, "CANCELLED")
    problems = result(directory)["problems"]
    log = (directory / "logs/preflight.log").read_text()
    assert all(f"error: {problem}\n" in log for problem in problems)
    missing, absent, version = sorted(problems, key=lambda problem: cluster.nodes.index(problem.partition(":")[0]))
    assert missing.startswith(f"{second}: cannot import torch: ImportError: libcudart.so.12: cannot open shared object")
    assert missing.endswith(f"run.setup or run.python says where it is ({sys.executable} was taken)")
    assert absent.startswith(f"{third}: Python did not start: ")
    assert "/no/python: No such file or directory; run.setup or run.python says where it is" in absent
    assert re.fullmatch(rf"{fourth}: deepspeed is 0\.1, but {cluster.nodes[0]} has [\d.]+", version)
    assert not (directory / "checkpoints").exists()


def test_a_disk_that_the_nodes_do_not_share_is_found(cluster, submit, tmp_path):
    first, second = cluster.nodes[:2]
    alone = f'mount -t tmpfs none {tmp_path}/root/model/*/work && exec {sys.executable} "$@"'
    python = python_of(tmp_path, f"{second}) exec unshare --mount bash -c '{alone}' python \"$@\" ;;")
    directory, preflight, training = submit("run.nodes=2", f"run.python={python}")
    cluster.wait_for(preflight, "FAILED")
    cluster.wait_for(training, "CANCELLED")
    elsewhere = f"wrote in {directory}; root=DIR has to be on a disk that all nodes share"
    assert result(directory)["problems"] == [
        f"{first}: does not see what {second} {elsewhere}",
        f"{second}: does not see what {first}, {second} {elsewhere}",  # each of its processes has one of its own
    ]


def test_nodes_can_be_tried_by_hand(cluster, submit, monkeypatch):
    directory, preflight, training = submit("run.nodes=2", "run.flags=[--hold]")
    cluster.scancel(preflight, training)
    log = directory / "by-hand.log"
    words = ("--nodes=2", f"--output={log}", f"--chdir={PROJECT}", str(PROJECT / "slurm/stage.sbatch"), "preflight")
    monkeypatch.setitem(cluster.env, "PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    job, wrong = cluster.submit(*words, str(directory)), cluster.submit(*words)
    cluster.wait_for(job, "COMPLETED", "FAILED")
    cluster.wait_for(wrong, "FAILED")
    assert result(directory)["job"] == job
    assert "all-reduce over 2 ranks" in log.read_text()
    assert "error: preflight: wanted the directory of one submitted training, in a job of SLURM" in log.read_text()


def test_a_python_that_lacks_what_the_pipeline_needs_is_said_in_one_line(cluster, submit, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')  # as without the environment
    python.chmod(0o755)
    directory, preflight, _ = submit("run.nodes=2", f"run.python={python}")
    cluster.wait_for(preflight, "FAILED")
    log = (directory / "logs/preflight.log").read_text()
    assert re.search(rf"^error: .* on {cluster.nodes[0]} has no '\w+', which the pipeline needs; take the Python ", log)
    assert "Traceback" not in log
