"""`sbatch slurm/stage.sbatch …` by hand: a stage or a whole job in one allocation, and the exit status for SLURM."""

import shlex
import sys

import pytest
from submitted import OVER, SHORTER, manifest, wait_until
from support import PROJECT

SCRIPT = PROJECT / "slurm/stage.sbatch"


@pytest.fixture
def run_script(cluster, tmp_path):
    """Submits the script with flags and words, waits for the end, and gives SLURM's job and what it printed."""

    def submit(flags: list[str], *words: str) -> tuple[dict[str, str], str]:
        log = tmp_path / "job.log"
        export = f"--export=ALL,PIPELINE_PYTHON={sys.executable}"
        job_id = cluster.submit(export, f"--chdir={PROJECT}", f"--output={log}", *flags, str(SCRIPT), *words)
        return cluster.wait_for(job_id, *OVER, timeout_s=240), log.read_text()

    return submit


@pytest.fixture
def by_hand(run_script, tmp_path):
    """The same for a job or a stage."""
    conf, root = str(PROJECT / "tests/conf"), f"root={tmp_path / 'artifacts'}"
    return lambda flags, *words: run_script(flags, "--config-dir", conf, *words, root)


def test_a_stage_runs_on_all_nodes_of_the_allocation(by_hand, tiny_tokens, tmp_path):
    made_here = tiny_tokens.parents[1] / "jobs/tiny"
    inputs = [f"stage.corpus={made_here / 'dedup'}", f"stage.tokenizer={made_here / 'train_tokenizer'}"]
    job, log = by_hand(["--nodes=2"], "stage=tokenize", *inputs, "stage.held_out_fraction=0.05")
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log
    made = next((tmp_path / "artifacts/tokens").iterdir())
    assert manifest(made)["files"] == manifest(tiny_tokens)["files"]
    assert manifest(made)["made"]["ranks"] == 2
    assert {path.name for path in (made / "logs").glob("rank-*")} == {"rank-00000.log", "rank-00001.log"}


def test_a_whole_job_runs_in_one_allocation(by_hand, tiny_tokens, tmp_path):
    job, log = by_hand(["--nodes=1", "--ntasks-per-node=2"], "job=tiny", *SHORTER)
    assert job["ExitCode"] == "0:0", log
    assert "report: " in log
    assert manifest(tmp_path / "artifacts/jobs/tiny/tokenize")["files"] == manifest(tiny_tokens)["files"]
    assert manifest(tmp_path / "artifacts/jobs/tiny/pretrain")["made"]["ranks"] == 2


def test_any_command_runs_by_hand(run_script, tiny_tokens):
    job, log = run_script([], "verify", str(tiny_tokens))
    assert job["ExitCode"] == "0:0", log
    assert "files as the manifest says" in log


def test_what_is_run_by_hand_in_an_element_that_was_begun_again_is_a_job_of_its_own(cluster, tmp_path):
    python, seen, id_ = tmp_path / "python", tmp_path / "seen", tmp_path / "id"
    python.write_text(f"#!/bin/bash\nenv | grep -E '^SLURM_(ARRAY_|RESTART_)' >>{seen}\necho - >>{seen}\n")
    with open(python, "a", encoding="utf-8") as script:  # which is killed once
        script.write(f"[ $(grep -c - {seen}) -gt 1 ] || kill -KILL $$\n")
    python.chmod(0o755)
    inner = f"sbatch --parsable --export=ALL,PIPELINE_PYTHON={python} --output={tmp_path}/log {SCRIPT} job=tiny >{id_}"
    outer = cluster.submit(
        "--array=3", "--output=/dev/null", "--wrap", f'[ -z "$SLURM_RESTART_COUNT" ] || {inner}; sleep 600'
    )
    cluster.wait_for(f"{outer}_3", "RUNNING")
    cluster.run("scontrol", "requeue", f"{outer}_3")
    cluster.start_now(f"{outer}_3")
    wait_until(lambda: id_.exists() and id_.read_text().endswith("\n"), 30)
    job = id_.read_text().strip()
    cluster.start_now(job)
    assert cluster.wait_for(job, *OVER)["ExitCode"] == "0:0", (tmp_path / "log").read_text()
    assert seen.read_text() == "SLURM_RESTART_COUNT=0\n-\nSLURM_RESTART_COUNT=1\n-\n"
    told = cluster.job(f"{outer}_3")
    assert (told["JobState"], told["Restarts"]) == ("RUNNING", "1")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["stage=tokenise"], 2, "did you mean 'tokenize'?"),
        (["stage=clean", "stage.corpus=nowhere"], 3, "nowhere"),
    ],
)
def test_the_exit_status_reaches_slurm(by_hand, words, status, said):
    job, log = by_hand([], *words)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", f"{status}:0"), log
    assert said in log
    assert "Traceback" not in log


@pytest.fixture
def setup(cluster, monkeypatch):
    """Sets the lines of `run.setup`."""
    return lambda *lines: monkeypatch.setitem(cluster.env, "PIPELINE_SETUP", "\n".join(lines))


def test_lines_of_setup_run_in_one_shell_that_keeps_what_the_script_needs(by_hand, setup, tmp_path):
    said = tmp_path / "said"
    setup(
        "cat",  # swallows no line after it
        "export WORD=a; read -r line; job=1 child=1 asked=TERM python=nothing line=2",
        "fail() { :; }; again() { :; }; set -eu; set -- job=none; IFS==",
        f"echo $WORD $line > {shlex.quote(str(said))}",
    )
    job, log = by_hand([], "stage=tokenise")
    assert job["ExitCode"] == "2:0", log
    assert "did you mean 'tokenize'?" in log
    assert said.read_text() == "a 2\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("exit 0", "ended the script"),
        ("exit 5", "ended the script"),
        ("false", "exited with status 1"),
        ("if true; then", "exited with status 2"),
    ],
)
def test_a_setup_that_fails_or_ends_the_script_is_no_success(by_hand, setup, line, said):
    setup("true", line, "echo not said")
    job, log = by_hand([], "stage=tokenise")
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "4:0"), log
    assert f"run.setup: '{line}' {said}" in log
    assert "not said" not in log
    assert "tokenize" not in log
