"""Commands about jobs: their words, and what is wrong with them in one line."""

import json

import pytest
from support import run_command

from pipeline.errors import ArtifactError, ConfigError
from pipeline.jobs.cancel import cancel
from pipeline.jobs.logs import BLOCK_BYTES, Reader, logs
from pipeline.jobs.retry import retry
from pipeline.jobs.status import status
from pipeline.jobs.words import find, parse
from pipeline.launch.output import newest_try

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


def test_the_words_of_other_programs_are_answered_with_ours():
    flags = {"--follow": bool, "--lines": int}
    with pytest.raises(ConfigError) as wrong:
        parse("logs", ["a.b", "--tail", "3", "-f"], "JOB.TASK", flags)
    assert wrong.value.problems == (
        "logs: no word is called '--tail'; did you mean '--lines'?",
        "logs: no word is called '-f'; did you mean '--follow'?",
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
        ("zebra", "no job of this name was started in .*; there is night; root=DIR says where$"),
        ("night.clean.x", "night.clean: wanted a job, and this is a task of one; say 'night'"),
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
    assert "gone" not in table  # it never had a directory
    assert "night" in run_command("status", f"root={root}").stdout
    over = run_command("wait", "night", f"root={root}", status=4).stdout
    again = f"continue with the same settings: python -m pipeline retry night root={root}"
    assert over.endswith(f"{again}\nnight: never started\n")
    run_command("cancel", "night", f"root={root}")
    missing = run_command("logs", "night.clean", f"root={root}", status=3).stderr
    assert "night.clean: rank 0 has printed nothing; the task never started" in missing
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
    for lines, shown in ((2, b"299999\nunfinished"), (0, b""), (400_000, log.read_bytes()), (None, log.read_bytes())):
        Reader(log, lines).print_new()
        assert capfdbinary.readouterr().out == shown


@pytest.mark.parametrize("before", [0, 5, BLOCK_BYTES - 3, BLOCK_BYTES + 7])
@pytest.mark.parametrize("after", [0, 5, BLOCK_BYTES - 20, 2 * BLOCK_BYTES])
def test_only_what_the_newest_try_has_printed_is_read(tmp_path, capfdbinary, before, after):
    log = tmp_path / "rank-00000.log"
    newest = b"--- try 2, SLURM job 7 on n1 ---\n" + b"y" * after
    log.write_bytes(b"--- try 1 ---\n" + b"x" * before + b"\n" + newest)
    Reader(log).print_new()
    assert capfdbinary.readouterr().out == newest
    assert bool(newest_try(log)) == (after > 0)


def test_a_log_is_followed_through_growth_and_a_new_beginning(tmp_path, capfdbinary):
    log = tmp_path / "rank-00000.log"
    reader = Reader(log)
    reader.print_new()  # not there yet
    log.write_bytes(b"one\n")
    reader.print_new()
    with open(log, "ab") as file:
        file.write(b"two\n")
    for _ in range(2):
        reader.print_new()
    log.write_bytes(b"new\n")
    reader.print_new()
    assert capfdbinary.readouterr().out == b"one\ntwo\nnew\n"


class Failed:
    """The job `night` after its array has failed, as its files tell it."""

    def __init__(self, root):
        self.root, self.directory = root, root / "corpus/clean-0"
        record = json.loads((root / "jobs/night/job.json").read_text())
        record["tasks"][0] |= {"is_array": True}
        (root / "jobs/night/job.json").write_text(json.dumps(record))
        self.leave("work/attempt-00001", "1")
        result = {"status": 3, "problems": ["part 7 is damaged"], "where": "n1", "job": "8_1", "time": ""}
        self.leave("work/result-00001.json", json.dumps(result))

    def leave(self, name, text):
        (self.directory / name).parent.mkdir(parents=True, exist_ok=True)
        (self.directory / name).write_text(text)

    def logs(self, capfd, *words):
        assert logs(["night.clean", *words, f"root={self.root}"]) == 0
        return capfd.readouterr()


def test_logs_of_a_failed_array_are_those_of_the_element_that_failed(root, capfd):
    failed = Failed(root)
    failed.leave("logs/rank-00000.log", "well done\n")
    failed.leave("logs/rank-00001.log", "--- try 1 ---\nold\n--- try 2 ---\nreads part 7\n")
    failed.leave("logs/job-00001.log", "one\nerror: part 7 is damaged\n")
    printed = failed.logs(capfd)
    assert printed.out == "--- try 2 ---\nreads part 7\n"
    assert printed.err == "night.clean failed: element 1: part 7 is damaged\n"
    assert failed.logs(capfd, "--lines=4").out.startswith("--- try 1 ---\nold\n")
    assert failed.logs(capfd, "--rank=0").out == "well done\n"
    assert failed.logs(capfd, "--job").out == "one\nerror: part 7 is damaged\n"


def test_a_rank_that_has_printed_nothing_in_this_try_gives_way_to_the_log_of_its_job(root, capfd):
    failed = Failed(root)
    failed.leave("logs/rank-00001.log", "--- try 1 ---\nold\n--- try 2 ---\n")
    failed.leave("logs/job-00001.log", "one\ntwo\nerror: part 7 is damaged\n")
    printed = failed.logs(capfd)
    assert printed.out == "--- try 2 ---\none\ntwo\nerror: part 7 is damaged\n"
    nothing = "night.clean: rank 1 has printed nothing in this try; "
    assert printed.err.startswith(f"{nothing}{failed.directory}/logs/job-00001.log:\n")
    assert failed.logs(capfd, "--lines=1").out == "--- try 2 ---\nerror: part 7 is damaged\n"
    (failed.directory / "logs/job-00001.log").unlink()
    failed_so = "night.clean failed: element 1: part 7 is damaged\n"
    assert failed.logs(capfd).err == f"{nothing.removesuffix('; ')}\n{failed_so}"
    assert failed.logs(capfd, "--job").err == f"{failed.directory}/logs/job-00001.log is not there\n{failed_so}"
    (failed.directory / "logs/rank-00001.log").unlink()
    assert failed.logs(capfd).err == f"{failed.directory}/logs/rank-00001.log is not there\n{failed_so}"


def test_logs_of_a_task_whose_nodes_were_refused_are_those_of_the_preflight(root, capfd):
    record = json.loads((root / "jobs/night/job.json").read_text())
    record["tasks"][0] |= {"preflight": "6"}
    (root / "jobs/night/job.json").write_text(json.dumps(record))
    (root / "corpus/clean-0/logs").mkdir(parents=True)
    (root / "corpus/clean-0/logs/preflight.log").write_text("torch 2\nerror: n2: no GPU\n")
    assert logs(["night.clean", f"root={root}"]) == 0
    printed = capfd.readouterr()
    assert printed.out == "torch 2\nerror: n2: no GPU\n"
    assert printed.err.endswith("never started: its nodes were tried first, by SLURM job 6: n2: no GPU\n")
