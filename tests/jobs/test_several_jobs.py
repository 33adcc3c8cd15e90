"""Commands about several jobs, or a sweep under its name; and what done jobs have made."""

import json
import re
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.artifact import Made, Manifest, write_manifest
from pipeline.errors import ArtifactError, ConfigError, LaunchError
from pipeline.jobs import notes
from pipeline.jobs import retry as retrying
from pipeline.jobs import wait as waiting
from pipeline.jobs.cancel import cancel
from pipeline.jobs.logs import logs
from pipeline.jobs.record import JobRecord, TaskRecord, read_record, write_record
from pipeline.jobs.retry import retry
from pipeline.jobs.states import JobStatus, TaskStatus
from pipeline.jobs.status import status
from pipeline.jobs.wait import wait
from pipeline.jobs.words import expand, say_again

STATS = {"documents": 9, "tokens": 70, "bits_per_byte": 3.2671, "byte_unigram_bits_per_byte": 4.1}
RESULT = "3.267 bits per byte (byte unigram 4.100)"


def record(name, words, directory, tasks=()):
    submitted = "2026-01-31T19:39:05+00:00"
    said = {"command": words, "directory": directory, "commit": None, "submitted": submitted}
    return JobRecord(name=name, launcher="local", **said, tasks=list(tasks))


class Root:
    """A root with jobs of one task each, as their files tell of them."""

    def __init__(self, path):
        self.path, self.word = path, f"root={path}"
        for number, name in enumerate(("sw-0", "sw-1", "sw-10", "sw-2", "other")):
            task = TaskRecord(
                name="evaluate",
                kind="evaluate",
                directory=str(path / f"report/evaluate-{number}"),
                fingerprint=str(number),
                needs=[],
                ranks=1,
            )
            words = ["job=x", f"tasks.evaluate.seed={number}", "tasks.clean.seed=7"]
            write_record(path, record(name, words, "/", [task]), [])

    def work(self, name):
        """The folder with what a try of a job's task has left."""
        work = Path(read_record(self.path, name).tasks[0].directory) / "work"
        work.mkdir(parents=True, exist_ok=True)
        return work

    def fail(self, name, exit_status):
        (self.work(name) / "attempt").write_text("1")
        result = {"status": exit_status, "problems": ["why"], "where": "n1", "job": None, "time": ""}
        (self.work(name) / "result.json").write_text(json.dumps(result))

    def finish(self, name, stats=STATS):
        made = Made(version="0", commit=None, python="3", host="n1", time="", seconds=16.25, ranks=1)
        stage = {"kind": "evaluate"}
        manifest = Manifest(
            kind="report", name="evaluate", fingerprint="0", stage=stage, inputs={}, files={}, stats=stats, made=made
        )
        write_manifest(self.work(name).parent, manifest)


@pytest.fixture
def root(tmp_path):
    return Root(tmp_path)


def test_the_name_of_a_sweep_stands_for_its_points(root):
    points = ["sw-0", "sw-1", "sw-2", "sw-10"]
    assert expand(root.path, ["sw"]) == points
    assert expand(root.path, ["sw-1", "sw", "other", "sw-1"]) == ["sw-1", "sw-0", "sw-2", "sw-10", "other"]
    assert expand(root.path, ["sw.evaluate"]) == [f"{point}.evaluate" for point in points]
    for name in ("sw-1", "other.evaluate", "s", "swing", "/sw", "sw-", "*", ""):
        assert expand(root.path, [name]) == [name]
    (root.path / "jobs/sw").mkdir()
    (root.path / "jobs/sw/job.json").write_text("{")
    assert expand(root.path, ["sw", "sw.evaluate"]) == ["sw", "sw.evaluate"]


def test_the_status_of_several_jobs_is_a_table_of_them(root, capsys):
    assert status(["sw", root.word]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["job", "sw-0", "sw-1", "sw-2", "sw-10"]
    assert [line.split()[-1] for line in lines[1:3]] == ["tasks.evaluate.seed=0", "tasks.evaluate.seed=1"]
    assert "clean.seed" not in "".join(lines)  # which all of them have
    status(["other", "sw-1", "--json", root.word])
    assert [job["job"] for job in json.loads(capsys.readouterr().out)] == ["other", "sw-1"]
    status(["sw-1", "--json", root.word])
    assert json.loads(capsys.readouterr().out)["job"] == "sw-1"
    with pytest.raises(ArtifactError, match="no job of this name"):
        status(["sw", "nothing", root.word])


def test_a_wait_for_several_jobs_ends_with_the_status_of_the_gravest(root, capsys):
    for name, exit_status in (("sw-0", 75), ("sw-1", 5), ("sw-2", 3)):
        root.fail(name, exit_status)
    root.finish("sw-10")
    assert wait(["sw", root.word]) == 5
    out = capsys.readouterr().out
    assert re.search(r"^\d\d:\d\d:\d\d  sw-1.evaluate  failed: why$", out, re.MULTILINE)
    ends = re.findall(r"^(sw-\d+): (\w+)$", out, re.MULTILINE)
    assert ends == [("sw-0", "stopped"), ("sw-1", "failed"), ("sw-2", "failed"), ("sw-10", "done")]
    assert wait(["sw-10", "sw-0", root.word]) == 75
    assert wait(["sw-10", "sw-2", "sw-1", root.word]) == 3
    assert wait(["sw-10", root.word]) == 0


def test_what_is_wrong_with_one_of_several_leaves_the_others_as_they_are(root, capsys):
    root.finish("sw-1")
    assert retry(["sw-0", "sw-2", root.word]) == 3
    said = capsys.readouterr().err
    assert re.findall("error: .*/jobs/(.*)/tasks.json", said) == ["sw-0", "sw-2"]
    assert cancel(["sw", root.word]) == 0
    assert capsys.readouterr().out.count("nothing of it waits or runs") == 4
    assert cancel(["nothing", "sw-1", root.word]) == 3
    assert capsys.readouterr().out == "sw-1: nothing of it waits or runs\n"


def test_logs_are_of_one_task(root):
    with pytest.raises(ConfigError, match=r"sw.evaluate: there are several; say which: sw-0.evaluate, sw-1"):
        logs(["sw.evaluate", root.word])


def test_a_root_that_is_not_there_is_no_empty_one(root):
    for words in ([], ["--json"], ["sw"], ["--watch"]):
        with pytest.raises(ArtifactError, match=r"nope: no such directory, .*; root=DIR says where"):
            status([*words, f"{root.word}/nope"])


def test_what_a_done_task_made_is_told_everywhere(root, capfd):
    root.finish("other")
    root.fail("sw-0", 5)
    status(["other", root.word])
    assert capfd.readouterr().out.splitlines()[1].endswith(f"  {RESULT}")
    status(["other", "sw-0", "--json", root.word])
    done, failed = [job["tasks"][0] for job in json.loads(capfd.readouterr().out)]
    assert (done["made"], done["result"]) == ("9 documents, 70 tokens", RESULT)
    assert (failed["made"], failed["result"]) == (None, None)
    assert wait(["other", root.word]) == 0
    heading, row, end = capfd.readouterr().out.splitlines()
    assert heading.split() == ["task", "made", "seconds", "result"]
    assert re.split("   *", row) == ["evaluate", "9 documents, 70 tokens", "16.2", RESULT]
    assert end == "other: done"
    logs(["other.evaluate", root.word])
    assert capfd.readouterr().err.endswith(f"logs/rank-00000.log is not there\nother.evaluate is done: {RESULT}\n")


def test_numbers_of_another_version_give_no_result(root, capsys):
    root.finish("other", {"renamed": 1})
    assert wait(["other", root.word]) == 0
    status(["other", "--json", root.word])
    assert json.loads(capsys.readouterr().out.partition("done\n")[2])["tasks"][0]["result"] == ""


def test_the_log_of_what_waits_ends_with_why(root, capfd, monkeypatch):
    killed, place = "rank 1 was ended by SIGKILL", str(root.work("other").parent)
    task = TaskStatus(
        "evaluate", "evaluate", "waiting", "BeginTime", tries=1, error=f"try 1: {killed}", directory=place
    )
    over = replace(task, state="failed", error=killed)
    states = [task, task, over]
    (root.work("other").parent / "logs").mkdir()
    (root.work("other").parent / "logs/rank-00000.log").write_text("noise\n")
    monkeypatch.setattr("pipeline.jobs.logs.look", lambda root, records: [JobStatus(records[0], [states[0]])])
    logs(["other.evaluate", root.word])
    last = "other.evaluate is waiting (begins again within 2 min): try 1: rank 1 was ended by SIGKILL\n"
    assert capfd.readouterr() == ("noise\n", last)
    monkeypatch.setattr("pipeline.jobs.logs.look", lambda root, records: [JobStatus(records[0], [states.pop(0)])])
    monkeypatch.setattr("pipeline.jobs.logs.LOOK_S", 0.0)
    logs(["other.evaluate", "--follow", root.word])
    assert capfd.readouterr().err == f"{last}other.evaluate failed: rank 1 was ended by SIGKILL\n"


def test_the_same_event_is_told_once_though_a_day_ends(root, capsys, monkeypatch):
    task = TaskStatus("evaluate", "evaluate", "waiting", "BeginTime", tries=1, begins="2026-01-31T00:01:59")
    looks = [(30, task), (31, task), (31, replace(task, state="failed", exit_status=5))]
    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: None)

    def look(root, records):
        day, found = looks.pop(0)
        monkeypatch.setattr(notes, "date", SimpleNamespace(today=lambda: date(2026, 1, day)))
        return [JobStatus(records[0], [found])]

    monkeypatch.setattr(waiting, "look", look)
    assert wait(["other", root.word]) == 5
    assert capsys.readouterr().out.count("begins again") == 1


def test_a_retry_of_what_is_held_says_how_it_goes_on(root, monkeypatch):
    held = TaskStatus("evaluate", "evaluate", "waiting", "JobHeldUser", job_id="12")
    monkeypatch.setattr(retrying, "look", lambda root, records: [JobStatus(records[0], [held])])
    with pytest.raises(LaunchError, match=r"evaluate is waiting \(held; scontrol release 12\); say that, or end it: "):
        retry(["other", root.word])


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("sw-0", "job=books.yaml name=sw run=slurm", "job=books.yaml name=sw-0 run=slurm"),
        ("books-1", "job=books.yaml run=slurm", "job=books.yaml run=slurm name=books-1"),
        ("clean-0", "stage=clean", "stage=clean name=clean-0"),
        ("books", "job='a/books.yml'", "'job='\"'\"'a/books.yml'\"'\"''"),
        ("books", "job=books root=x tasks.a.name=y", "job=books tasks.a.name=y"),
        ("clean", "--config-dir x stage=clean", "--config-dir x stage=clean"),
        ("books-old", "job=books name=books-old", "job=books name=books-old"),
    ],
)
def test_a_job_is_started_anew_under_its_name_and_where_it_was_started(name, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = record(name, words.split(), str(tmp_path))
    here, other = tmp_path / "artifacts", tmp_path / "two words"
    assert say_again(job, here) == f"python -m pipeline {said}"
    assert say_again(job, other.relative_to(tmp_path)) == f"python -m pipeline {said} root='two words'"
    other.mkdir()
    monkeypatch.chdir(other)
    assert say_again(job, here) == f"cd {tmp_path} && python -m pipeline {said}"
    assert say_again(job, other.parent / "x") == f"cd {tmp_path} && python -m pipeline {said} root={tmp_path}/x"
