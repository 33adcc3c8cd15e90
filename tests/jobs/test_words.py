"""Commands about jobs: their words, and what is wrong with them in one line."""

import json

import pytest
from support import run_command

from pipeline.errors import ArtifactError, ConfigError
from pipeline.jobs.cancel import cancel
from pipeline.jobs.logs import Reader
from pipeline.jobs.retry import retry
from pipeline.jobs.status import status
from pipeline.jobs.words import find, parse

COMMANDS = ("status", "wait", "logs", "cancel", "retry")


def test_a_flag_takes_its_number_either_way():
    flags = {"--rank": int, "--follow": bool}
    for words in (["a.b", "--rank", "3", "--follow"], ["--follow", "--rank=3", "a.b", "root=x"]):
        found = parse("logs", words, "JOB.TASK", flags)
        assert (found.names, found.flags) == (["a.b"], {"--rank": 3, "--follow": True})
    assert str(found.root) == "x"


def test_all_wrong_words_are_told_at_once_with_the_nearest():
    with pytest.raises(ConfigError) as wrong:
        parse("logs", ["a.b", "c", "--folow", "rot=x", "--rank", "two"], "JOB.TASK", {"--rank": int, "--follow": bool})
    assert wrong.value.problems == (
        "logs: no word is called '--folow'; did you mean '--follow'?",
        "logs: no word is called 'rot'; did you mean 'root'?",
        "logs: --rank: wanted a number, found 'two'",
        "logs: 'c' is one name too many",
    )


@pytest.fixture
def root(tmp_path):
    task = {"name": "clean", "kind": "clean", "directory": str(tmp_path / "corpus/clean-0"), "fingerprint": "0"}
    data = {"name": "night", "launcher": "local", "command": [], "directory": "/", "commit": None, "submitted": "now"}
    (tmp_path / "jobs/night").mkdir(parents=True)
    text = json.dumps({**data, "tasks": [{**task, "needs": [], "ranks": 2}]})
    (tmp_path / "jobs/night/job.json").write_text(text)
    return tmp_path


def test_a_job_and_a_task_are_found_by_their_names(root):
    assert find(root, "night")[1] is None
    assert find(root, "night.clean")[1].name == "clean"
    for name, words in (
        ("nigth", "no job of this name was started in .*; did you mean 'night'?"),
        ("night.cleen", "job 'night' has no task called 'cleen'; did you mean 'clean'?"),
    ):
        with pytest.raises(ArtifactError, match=words):
            find(root, name)


def test_every_command_answers_help_and_refuses_a_job_that_is_not_there(root, capsys, monkeypatch):
    from pipeline.__main__ import main

    def said(*words):
        monkeypatch.setattr("sys.argv", ["pipeline", *words])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr()

    for command in COMMANDS:
        status, printed = said(command, "--help")
        assert (status, printed.err) == (0, "")
        assert printed.out.startswith(f"python -m pipeline {command} ")
        assert len(printed.out.splitlines()) > 3
        status, printed = said(command, "nigth.clean" if command == "logs" else "nigth", f"root={root}")
        assert status == 3
        assert printed.err.endswith("did you mean 'night'?\n")
        if command != "status":
            status, printed = said(command, f"root={root}")
            assert status == 2
            assert "say which: python -m pipeline " in printed.err


def test_a_job_that_never_ran_is_shown_as_such(root):
    plain = json.loads(run_command("status", "night", "--json", f"root={root}").stdout)
    assert (plain["state"], plain["exit_status"], plain["tasks"][0]["ranks"]) == ("never started", 4, 2)
    table = run_command("status", "night", f"root={root}").stdout
    assert "retry night" in table
    assert "its directory is gone" in table
    assert "night" in run_command("status", f"root={root}").stdout
    assert run_command("wait", "night", f"root={root}", status=4).stdout.endswith("night: never started\n")
    run_command("cancel", "night", f"root={root}")
    missing = run_command("logs", "night.clean", f"root={root}", status=3).stderr
    assert "there is no log of rank 0: the task is never started" in missing
    refused = run_command("logs", "night.clean", "--rank=2", f"root={root}", status=2).stderr
    assert "night.clean has 2 ranks, from 0 on" in refused
    assert "start the job again" in run_command("retry", "night", f"root={root}", status=3).stderr


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"format": 1}', '{"format": 2}', "\0"])
def test_a_damaged_record_is_shown_beside_the_other_jobs(root, text, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (root / "jobs/broken").mkdir()
    (root / "jobs/broken/job.json").write_text(text)
    assert status([f"root={root}"]) == 3
    printed = capsys.readouterr()
    assert [line.split()[:2] for line in printed.out.splitlines()[1:]] == [["night", "never"], ["broken", "damaged"]]
    assert f"error: {root}/jobs/broken/job.json: damaged (" in printed.err
    assert "delete or move the file" in printed.err
    assert ("another version of the pipeline wrote it" in printed.err) == ("2" in text)
    assert status([f"root={root}", "--json"]) == 3
    night, broken = json.loads(capsys.readouterr().out)
    assert (night["job"], broken["job"], broken["state"], broken["exit_status"]) == ("night", "broken", "damaged", 3)
    assert night.keys() == broken.keys()
    for command in (status, cancel, retry):
        with pytest.raises(ArtifactError, match="damaged"):
            command(["broken", f"root={root}"])
    (root / "jobs/night/job.json").unlink()
    assert status([f"root={root}"]) == 3
    assert "no job was started here" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[]", "null", '{"tasks": null}', '{"tasks": []}', '{"tasks": [5]}', "{"])
def test_a_retry_of_tasks_that_cannot_be_read_is_refused(root, text):
    (root / "jobs/night/tasks.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"tasks.json: .*start the job again$"):
        retry(["night", f"root={root}"])


def test_only_the_last_lines_are_read(tmp_path, capfdbinary):
    log = tmp_path / "rank-00000.log"
    log.write_bytes(b"".join(b"%d\n" % n for n in range(300_000)) + b"unfinished")
    for lines, shown in ((2, b"299999\nunfinished"), (0, b""), (400_000, log.read_bytes())):
        reader = Reader(log)
        reader.skip_to_last(lines)
        reader.print_new()
        assert capfdbinary.readouterr().out == shown


def test_a_log_is_followed_through_growth_and_a_new_beginning(tmp_path, capfdbinary):
    log = tmp_path / "rank-00000.log"
    reader = Reader(log)
    assert not reader.print_new()  # not there yet
    log.write_bytes(b"one\n")
    assert reader.print_new()
    with open(log, "ab") as file:
        file.write(b"two\n")
    assert reader.print_new()
    assert not reader.print_new()
    log.write_bytes(b"new\n")
    assert reader.print_new()
    assert capfdbinary.readouterr().out == b"one\ntwo\nnew\n"
