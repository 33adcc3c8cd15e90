"""What a task's directory says of it; the directories are made up."""

import json
import os
import subprocess
import time

import pytest

from pipeline.jobs.evidence import is_running, read_evidence
from pipeline.jobs.record import TaskRecord
from pipeline.launch.lock import locked
from pipeline.launch.output import last_error, tail


def record(directory, ranks=1, is_array=False):
    return TaskRecord(
        name="a",
        kind="pretrain",
        directory=str(directory),
        fingerprint="0",
        needs=[],
        ranks=ranks,
        is_array=is_array,
        slurm="7",
    )


def write(path, text, age_s=0.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    os.utime(path, (time.time() - age_s,) * 2)


def result(status, *problems):
    return {"status": status, "problems": problems, "where": "n1", "job": "7", "time": "2026-01-01T00:00:00+00:00"}


def read(directory, **more):
    return read_evidence(directory, record(directory, **more))


def test_a_result_counts_only_if_nothing_was_submitted_or_begun_after_it(tmp_path):
    write(tmp_path / "work/task.json", {"stage": {}}, age_s=90)
    write(tmp_path / "work/attempt", "1", age_s=80)
    write(tmp_path / "work/result.json", result(75, "saved"), age_s=70)
    (marks,) = read(tmp_path).marks.values()
    assert (marks.status, marks.problem, marks.began) == (75, "saved", True)
    write(tmp_path / "work/attempt", "2", age_s=60)
    (marks,) = read(tmp_path).marks.values()
    assert (marks.status, marks.problem) == (None, "")
    (tmp_path / "work/result.json").rename(tmp_path / "work/previous.json")  # as a try begins
    (marks,) = read(tmp_path).marks.values()
    assert (marks.status, marks.problem) == (None, "saved")  # how the try before this one ended
    write(tmp_path / "work/task.json", {"stage": {}}, age_s=50)
    (marks,) = read(tmp_path).marks.values()
    assert (marks.status, marks.problem, marks.began) == (None, "", False)


def test_tries_of_each_element_are_numbered_as_in_its_log(tmp_path):
    write(tmp_path / "work/attempt-00000", "1")
    write(tmp_path / "work/attempt-00001", "7")
    write(tmp_path / "work/attempt-00002", "3", age_s=100)
    write(tmp_path / "work/attempt-00003", "")  # damaged
    write(tmp_path / "work/task.json", {"stage": {}}, age_s=50)
    write(tmp_path / "work/ranks/00000.json", {})
    first, second, third, fourth = read(tmp_path, ranks=4, is_array=True).marks.values()
    assert (first.tries, first.has_ended) == (1, True)
    assert (second.tries, second.has_ended) == (7, False)
    assert (third.tries, third.began) == (0, False)  # not since it was submitted
    assert (fourth.tries, fourth.began) == (0, True)


def test_progress_of_a_training_comes_from_the_end_of_its_metrics(tmp_path):
    write(tmp_path / "work/task.json", {"stage": {"steps": 6000}})
    write(tmp_path / "work/attempt", "1", age_s=1000)
    now = time.time()
    rows = [{"step": s, "time": now - 500 + s / 10, "loss": s / 1000, "tokens_per_s": 7.0} for s in range(1, 5001)]
    write(tmp_path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 50')
    assert (tmp_path / "metrics.jsonl").stat().st_size > 4 * len(tail(tmp_path / "metrics.jsonl"))
    pace = read(tmp_path).pace
    assert (pace.done, pace.total, pace.noun, pace.loss, pace.tokens_per_s) == (5000, 6000, "steps", 5.0, 7.0)
    assert pace.left_s == pytest.approx(100, abs=5)  # 1000 steps at ten a second


def test_time_left_leaves_out_what_an_earlier_try_took(tmp_path):
    write(tmp_path / "work/task.json", {"stage": {"steps": 30}})
    write(tmp_path / "work/attempt", "2", age_s=100)
    now = time.time()
    rows = [{"step": s, "time": now - 9000 + s} for s in range(1, 11)]
    rows += [{"step": s, "time": now - 20 + 2 * (s - 10)} for s in range(11, 21)]
    write(tmp_path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path).pace.left_s == pytest.approx(20, abs=2)


def test_parts_of_a_training_have_numbers_of_their_own_names(tmp_path):
    write(tmp_path / "metrics.jsonl", json.dumps({"step": 3, "time": 1.0, "finetune/loss": 0.5}) + "\n")
    assert (read(tmp_path).pace.loss, read(tmp_path).pace.total, read(tmp_path).pace.left_s) == (0.5, None, None)


def note(directory, rank, done, total, noun="parts cleaned", left_s=None, age_s=0.0):
    told = {"done": done, "total": total, "noun": noun, "left_s": left_s, "time": time.time() - age_s}
    write(directory / f"work/progress/{rank:05d}.json", told)


def test_progress_of_an_array_is_that_of_all_its_elements_once_all_have_begun(tmp_path):
    write(tmp_path / "work/ranks/00000.json", {})
    note(tmp_path, 0, 5, 5, left_s=0.0, age_s=100)
    note(tmp_path, 1, 2, 6, left_s=50.0, age_s=10)
    pace = read(tmp_path, ranks=3, is_array=True).pace
    assert (pace.done, pace.total, pace.noun, pace.ranks, pace.left_s) == (7, None, "parts cleaned", 1, None)
    note(tmp_path, 2, 1, 5, left_s=80.0, age_s=10)
    pace = read(tmp_path, ranks=3, is_array=True).pace
    assert (pace.done, pace.total) == (8, 16)
    assert pace.left_s == pytest.approx(70, abs=2)
    note(tmp_path, 1, 2, 6, left_s=50.0, age_s=100)
    note(tmp_path, 2, 1, 5, left_s=80.0, age_s=100)
    assert read(tmp_path, ranks=3, is_array=True).pace.left_s == 0
    note(tmp_path, 0, 5, 5, left_s=None)  # one that has ended
    assert read(tmp_path, ranks=3, is_array=True).pace.left_s == 0
    note(tmp_path, 2, 0, 5)
    assert read(tmp_path, ranks=3, is_array=True).pace.left_s is None
    (tmp_path / "work/progress/00002.json").write_text('{"done": 1')  # is being written
    assert read(tmp_path, ranks=3, is_array=True).pace.total is None


def test_a_training_of_several_parts_says_how_far_the_part_is(tmp_path):
    write(tmp_path / "metrics.jsonl", json.dumps({"step": 3, "time": 1.0, "baseline/loss": 0.5}) + "\n")
    note(tmp_path, 0, 3, 10, "baseline (1 of 2) steps", left_s=7.0)
    pace = read(tmp_path, ranks=2).pace
    assert (pace.done, pace.total, pace.noun, pace.loss, pace.ranks) == (3, 10, "baseline (1 of 2) steps", 0.5, 0)
    assert pace.left_s == pytest.approx(7, abs=2)


def test_a_training_of_several_parts_that_is_done_has_the_steps_of_its_result(tmp_path):
    rows = [{"step": step, "time": 1.0} for step in (1, 500)]
    write(tmp_path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "manifest.json", {"stats": {"steps": 250}})
    assert (read(tmp_path).pace.done, read(tmp_path).pace.total) == (250, None)
    write(tmp_path / "manifest.json", {"stats": {}})
    assert read(tmp_path).pace.done == 500


def test_a_lock_that_its_owner_holds_says_who_works_here(tmp_path):
    with locked(tmp_path):
        (marks,) = read(tmp_path).marks.values()
        assert marks.owner.startswith(f"process {os.getpid()} on ")
    assert read(tmp_path).marks[""].owner is None


@pytest.mark.parametrize(("age_s", "is_alive"), [(5, True), (90, False)])
def test_a_lock_of_another_machine_lives_as_long_as_its_heartbeat(tmp_path, age_s, is_alive):
    owner = {"words": "process 1 on n9", "host": "n9", "pid": 1, "job": None}
    write(tmp_path / "work/lock", owner, age_s=age_s)
    assert (read(tmp_path).marks[""].owner is not None) == is_alive


def test_a_process_that_ended_and_one_that_got_its_number_since_are_not_it():
    process = subprocess.Popen(["sleep", "60"])
    try:
        assert is_running(process.pid, time.time())
        assert not is_running(process.pid, time.time() - 3600)
    finally:
        process.kill()
    deadline = time.monotonic() + 10
    while is_running(process.pid, time.time()):  # until it is a zombie, which nobody has waited for
        assert time.monotonic() < deadline
    process.wait()
    assert not is_running(process.pid, time.time())


def test_a_training_whose_last_step_is_long_ago_is_silent(tmp_path):
    write(tmp_path / "work/task.json", {"stage": {"steps": 1000}})
    for ago_s, silent in ((20, False), (50, True)):
        times = [time.time() - ago_s - 10 + step for step in range(11)]
        rows = [{"step": step, "time": when, "loss": 1.0} for step, when in enumerate(times, 1)]
        write(tmp_path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        assert (read(tmp_path).pace.silent_s is not None) == silent
    assert read(tmp_path).pace.silent_s == pytest.approx(50, abs=5)
    slow = [{"step": step, "time": time.time() - 50 - 6 * (3 - step), "loss": 1.0} for step in range(1, 4)]
    write(tmp_path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in slow))
    assert read(tmp_path).pace.silent_s is None  # its steps take six seconds


def test_the_last_error_of_a_log_is_found(tmp_path):
    log = tmp_path / "job.log"
    write(log, "one\nerror: n1: first\nTraceback (most recent call last):\nValueError: second\nbye\n")
    assert last_error(log) == "ValueError: second"
    write(
        log,
        "srun: error: Node failure on n2\nslurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED DUE TO NODE FAILURE ***\n",
    )
    assert last_error(log) == "node n2 failed"
    write(log, "nothing wrong\nan error: in the middle of words\n")
    assert last_error(log) == ""
    assert last_error(tmp_path / "none") == ""
    write(log, "error: of another try\n--- try 2, SLURM job 7 on n1 ---\nbegun\n")
    assert last_error(log) == ""
    write(log, "error: of another try\n--- try 2, SLURM job 7 on n1 ---\nerror: n1: no python\n")
    assert last_error(log) == "n1: no python"


def test_a_directory_that_is_damaged_is_no_error(tmp_path):
    for name in ("task.json", "result.json", "claim.json", "lock", "attempt"):
        write(tmp_path / f"work/{name}", "{")
    write(tmp_path / "metrics.jsonl", "\0\0\n[1]\n{}")
    found = read(tmp_path)
    assert (found.is_done, found.claim, found.pace.done) == (False, None, None)


@pytest.mark.parametrize("text", ["[]", "null", "5", '"x"', "[1]", "{}", "true", "\\xff"])
def test_json_of_another_type_counts_as_not_there(tmp_path, text):
    for name in ("task.json", "result.json", "claim.json", "lock", "attempt"):
        write(tmp_path / f"work/{name}", text.encode().decode("unicode_escape"))
    write(tmp_path / "metrics.jsonl", f"{text}\n")
    found = read(tmp_path)
    assert (found.is_done, found.claim, found.pace.done) == (False, None, None)
    assert (found.marks[""].status, found.marks[""].owner) == (None, None)
    assert found.marks[""].tries == (5 if text == "5" else 0)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("claim.json", {"slurm": 5, "job": "x"}),
        ("claim.json", {"slurm": "x", "job": "x"}),
        ("result.json", {"status": "4", "problems": [], "time": ""}),
        ("result.json", {"status": 4, "problems": [5], "time": ""}),
        ("lock", {"words": "x", "host": os.uname().nodename, "pid": "x", "job": None}),
        ("lock", {"words": "x", "host": os.uname().nodename, "pid": 1, "job": None, "since": "x"}),
    ],
)
def test_fields_of_another_type_count_as_not_there(tmp_path, name, data):
    write(tmp_path / f"work/{name}", data)
    found = read(tmp_path)
    assert (found.claim, found.marks[""].status, found.marks[""].owner) == (None, None, None)


def test_rows_of_steps_without_numbers_are_left_out(tmp_path):
    write(tmp_path / "work/task.json", {"stage": [1]})
    rows = [{"step": 4, "time": 2.0, "loss": 0.5}, {"step": "a", "time": 1}, {"step": 5, "time": None}]
    rows.append({"step": 6, "time": 3.0, "loss": "x"})
    write(tmp_path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pace = read(tmp_path).pace
    assert (pace.done, pace.total, pace.loss) == (6, None, 0.5)
