"""The state of a task follows from what its directory says and what SLURM says, each made up here."""

from datetime import date
from pathlib import Path

import pytest

from pipeline.jobs.evidence import Evidence, Marks, Pace
from pipeline.jobs.look import look
from pipeline.jobs.notes import describe, note
from pipeline.jobs.record import JobRecord, TaskRecord
from pipeline.jobs.states import JobStatus, judge
from pipeline.jobs.status import _Found, _page, _text, hints
from pipeline.jobs.wait import _line
from pipeline.launch.claim import Claim
from pipeline.launch.scheduler import Seen

NOTHING = Evidence(marks={"": Marks()})
DONE = Evidence(is_done=True)


def task(name, slurm="7", needs=(), ranks=1, is_array=False, kind="pretrain", **more):
    return TaskRecord(
        name=name,
        kind=kind,
        directory=f"/nowhere/model/{name}-0",
        fingerprint="0",
        needs=list(needs),
        ranks=ranks,
        is_array=is_array,
        slurm=slurm,
        **more,
    )


def record(*tasks, launcher="slurm"):
    return JobRecord(
        name="job", launcher=launcher, command=[], directory="/", commit=None, submitted="2026-01-01", tasks=list(tasks)
    )


def one(evidence, *seen, launcher_runs=False, **more):
    seen = None if seen == (None,) else {each.id: each for each in seen}
    (found,) = judge(record(task("a", **more)), {"a": evidence}, seen, launcher_runs)
    return found


def marks(**said):
    return Evidence(marks={"": Marks(**said)})


def test_a_manifest_is_success_whatever_slurm_and_the_result_say():
    assert one(DONE, Seen("7", "FAILED")).state == "done"
    assert one(DONE, None).exit_status == 0
    assert one(Evidence(is_done=True, marks={"": Marks(status=4, problem="old")})).error == ""


def test_a_job_that_slurm_calls_completed_without_a_manifest_is_no_success():
    found = one(marks(began=True, tries=1), Seen("7", "COMPLETED"))
    assert (found.state, found.exit_status) == ("lost", 4)
    assert found.error == "it left neither a result nor an artifact"


@pytest.mark.parametrize("reason", ["Resources", "Priority", "Licenses"])
def test_what_waits_says_why_in_the_words_of_slurm(reason):
    found = one(NOTHING, Seen("7", "PENDING", reason))
    assert (found.state, found.reason, found.exit_status) == ("waiting", reason, None)
    assert describe(found) == f"waiting ({reason})"


def test_a_requeued_job_tells_its_try_and_how_the_last_one_ended():
    stopped = marks(status=75, problem="after step 5, state saved", began=True, tries=1)
    found = one(stopped, Seen("7", "PENDING", "BeginTime"))
    assert (found.state, found.reason, found.error) == ("waiting", "BeginTime", "try 1: after step 5, state saved")
    assert describe(found) == "waiting (begins again within 2 min)"
    known = one(stopped, Seen("7", "PENDING", "BeginTime", begins=f"{date.today()}T19:39:05"))
    assert describe(known) == "waiting (begins again 19:39:05)"
    late = one(NOTHING, Seen("7", "PENDING", "BeginTime", begins="2001-02-03T19:39:05"))
    assert describe(late) == "waiting (begins 2001-02-03 19:39:05)"
    ending = one(stopped, Seen("7", "COMPLETING", "None", "n1"))
    assert (describe(ending), note(ending)) == ("running (COMPLETING)", "try 1: after step 5, state saved")
    killed = "rank 0 was ended by SIGKILL; the same command continues; if nobody sent that; the end of x.log:\nlast"
    again = one(marks(problem=killed, began=True, tries=2), Seen("7", "RUNNING", "None", "n1"))
    assert describe(again) == "running, try 2"
    assert (again.nodes, again.tries, again.error) == ("n1", 2, f"try 1: {killed}")
    failed = one(marks(problem=killed, status=4, began=True, tries=2), Seen("7", "FAILED"))
    assert failed.error == killed
    assert note(failed).endswith("; if nobody sent that")


@pytest.mark.parametrize(
    ("status", "state", "exit_status"),
    [(2, "failed", 2), (3, "failed", 3), (5, "failed", 5), (75, "stopped", 75), (130, "stopped", 130)],
)
@pytest.mark.parametrize("seen", [(Seen("7", "FAILED", "NonZeroExitCode"),), (), (None,)])
def test_the_result_file_says_how_it_ended_with_or_without_slurm(seen, status, state, exit_status):
    found = one(marks(status=status, problem="why", began=True, tries=1), *seen)
    assert (found.state, found.exit_status, found.error) == (state, exit_status, "why")


@pytest.mark.parametrize(
    ("state", "words"),
    [("OUT_OF_MEMORY", "out of memory"), ("TIMEOUT", "its time was over"), ("NODE_FAIL", "its node failed")],
)
def test_what_ended_without_a_word_is_told_by_slurm_and_by_the_log_of_its_job(state, words):
    found = one(marks(began=True, tries=1, log_error="error: n1: no such module"), Seen("7", state))
    assert (found.state, found.reason, found.exit_status) == ("failed", state, 4)
    assert found.error == f"{words}: error: n1: no such module"


def test_a_task_that_slurm_has_forgotten_and_that_left_no_result_is_lost():
    assert (one(marks(began=True, tries=1)).state, one(marks(began=True, tries=1)).exit_status) == ("lost", 4)


def test_where_slurm_does_not_answer_the_files_are_shown():
    assert one(marks(began=True), None).state == "unknown"
    assert one(marks(began=True, owner="process 1 on n2", host="n2"), None).state == "running"
    assert one(marks(began=True, owner="process 1 on n2", host="n2"), None).nodes == "n2"
    assert one(NOTHING, None, slurm=None).state == "never started"


def test_a_cancelled_task_is_cancelled_though_its_result_says_stopped():
    found = one(marks(status=75, problem="step 5, state saved", began=True, tries=1), Seen("7", "CANCELLED", "None"))
    assert (found.state, found.exit_status, found.error) == ("cancelled", 75, "step 5, state saved")
    unsaved = one(marks(status=75, problem="will be done again", began=True), Seen("7", "CANCELLED", "None"))
    assert (unsaved.state, unsaved.error) == ("cancelled", "")


def chain(first, *seen):
    tasks = (task("a", "7"), task("b", "8", ["a"]), task("c", "9", ["b"]))
    seen = {each.id: each for each in seen}
    return judge(record(*tasks), {"a": first, "b": NOTHING, "c": NOTHING}, seen)


@pytest.mark.parametrize(
    "after",
    [
        [Seen(id, "CANCELLED", "DependencyNeverSatisfied") for id in ("8", "9")],  # of squeue
        [Seen(id, "CANCELLED") for id in ("8", "9")],  # of sacct, which has no reasons
        [Seen("8", "PENDING", "DependencyNeverSatisfied"), Seen("9", "CANCELLED", "DependencyNeverSatisfied")],
        [],  # forgotten
    ],
)
def test_dependents_of_a_failed_task_say_which_and_why(after):
    failed = marks(status=3, problem="the disk is full", began=True, tries=1)
    a, b, c = found = chain(failed, Seen("7", "FAILED"), *after)
    assert [one.state for one in found] == ["failed", "cancelled", "cancelled"]
    assert b.error == c.error == "waited for a, which failed: the disk is full"
    assert a.error == "the disk is full"
    assert JobStatus(record(), found).exit_status == 3


@pytest.mark.parametrize("reason", ["Dependency", "DependencyNeverSatisfied", ""])
def test_dependents_of_a_cancelled_task_are_cancelled_however_that_came(reason):
    stopped = marks(status=75, problem="saved", began=True)
    a, b, c = found = chain(stopped, Seen("7", "CANCELLED"), *(Seen(id, "CANCELLED", reason) for id in "89"))
    assert [one.state for one in found] == ["cancelled"] * 3
    assert a.error == ""
    assert b.error == c.error == "waited for a, which was cancelled"
    assert JobStatus(record(), found).exit_status == 75


def test_the_table_shows_a_reason_once_and_json_everywhere():
    failed = marks(status=3, problem="the disk is full", began=True)
    job = JobStatus(record(), chain(failed, Seen("7", "FAILED"), *(Seen(id, "CANCELLED") for id in "89")))
    table = _text(_page(_Found([job]), "job", Path("artifacts")))
    assert table.count("the disk is full") == 1
    assert table.count("waited for a, which failed") == 2
    assert [one["error"].count("the disk is full") for one in job.plain()["tasks"]] == [1, 1, 1]
    assert [_line(one).count("the disk is full") for one in job.tasks] == [1, 0, 0]  # of `wait`
    assert "logs job.a" not in table  # its directory is gone


def test_dependents_of_a_task_whose_nodes_failed_never_started():
    tasks = (task("a", "7", preflight="6"), task("b", "8", ["a"]))
    seen = {id: Seen(id, "CANCELLED", "DependencyNeverSatisfied") for id in "78"}
    found = judge(record(*tasks), {"a": NOTHING, "b": NOTHING}, seen)
    assert [one.state for one in found] == ["never started"] * 2
    assert found[1].error == "waited for a, which never started"
    assert JobStatus(record(), found).exit_status == 4


def test_what_waits_says_for_what_in_plain_words():
    tasks = (task("a", "7"), task("b", "8", ["a"]), *(task(name, "9", ["a"]) for name in "cd"))
    last = task("z", "10", ["a", "b", "c", "d"])
    seen = {id: Seen(id, "PENDING", "Dependency") for id in ("8", "9", "10")}
    seen["7"] = Seen("7", "PENDING", "JobHeldUser")
    found = judge(record(*tasks, last), {one.name: NOTHING for one in (*tasks, last)}, seen)
    a, b, *_, z = [describe(one) for one in found]
    assert (a, b) == ("waiting (held; scontrol release 7)", "waiting for a")
    assert z == "waiting for a, …"
    assert (found[1].reason, found[1].waits_for) == ("Dependency", ["a"])
    assert describe(one(NOTHING, Seen("7", "PENDING", "Dependency"), preflight="6")) == "waiting for preflight 6"
    user_said = one(NOTHING, Seen("7", "PENDING", "BeginTime"))  # run.flags=[--begin=…]
    assert describe(user_said) == "waiting (BeginTime)"


def failed_job(tmp_path, why, state="FAILED", **more):
    (tmp_path / "model/a-0/logs").mkdir(parents=True, exist_ok=True)
    made = task("a", **more).model_copy(update={"directory": str(tmp_path / "model/a-0")})
    words = ["job=night", "run=slurm", "tasks.a.name=two words", "name=job", "root=elsewhere"]
    job = record(made).model_copy(update={"command": words, "directory": str(Path.cwd())})
    seen = Seen("7", state, "DependencyNeverSatisfied" if state == "CANCELLED" else "")
    return JobStatus(job, judge(job, {"a": why}, {"7": seen}))


def test_a_job_that_failed_says_how_to_go_on_with_and_without_a_change(tmp_path):
    again = f"continue with the same settings: python -m pipeline retry job root={tmp_path}"
    anew = "after changing a setting:        python -m pipeline job=night run=slurm 'tasks.a.name=two words' name=job"
    why, *rest = hints(failed_job(tmp_path, marks(status=4, problem="out of memory", began=True)), tmp_path)
    assert why == f"why: python -m pipeline logs job.a root={tmp_path}"
    assert rest == [again, f"{anew} root={tmp_path}"]
    for evidence in (
        marks(status=2, problem="steps: too many", began=True),
        marks(log_error="nu1: run.setup: 'false' exited with status 1"),
        marks(log_error="nu1: there is no 'python' here; say in run.setup or run.python where this node has it"),
    ):
        assert hints(failed_job(tmp_path, evidence), tmp_path)[1:] == [f"{anew} root={tmp_path}", again]


def test_a_preflight_that_failed_has_a_why(tmp_path):
    tried = Evidence(marks={"": Marks()}, preflight_error="n2: no GPU")
    why, anew, _ = hints(failed_job(tmp_path, tried, "CANCELLED", preflight="6"), tmp_path)
    assert why == f"why: python -m pipeline logs job.a root={tmp_path}"
    assert anew.startswith("after changing a setting: ")


def test_the_element_that_failed_is_named_in_why(tmp_path):
    failed = Marks(status=3, problem="damaged", began=True)
    evidence = Evidence(marks={"-00000": Marks(has_ended=True, status=0), "-00001": failed})
    why, *_ = hints(failed_job(tmp_path, evidence, ranks=2, is_array=True), tmp_path)
    assert why.startswith("why: python -m pipeline logs job.a --rank 1 root=")


def test_a_job_that_is_done_says_where_what_people_open_is(tmp_path):
    tasks = [task(kind, kind=kind) for kind in ("clean", "report", "export")]
    job = record(*tasks)
    found = JobStatus(job, judge(job, {one.name: DONE for one in tasks}, {}))
    assert hints(found, tmp_path) == [
        f"report: {tmp_path}/jobs/job/report/index.html",
        f"export: {tmp_path}/jobs/job/export",
    ]


def test_a_preflight_that_failed_is_named():
    found = one(
        Evidence(marks={"": Marks()}, preflight_error="error: n2: no GPU"),
        Seen("7", "CANCELLED", "DependencyNeverSatisfied"),
        preflight="6",
    )
    assert found.state == "never started"
    assert found.error == "its nodes were tried first, by SLURM job 6: error: n2: no GPU"


def array(*parts, seen=()):
    evidence = Evidence(marks={f"-{rank:05d}": part for rank, part in enumerate(parts)})
    return one(evidence, *seen, ranks=len(parts), is_array=True)


def test_an_array_counts_its_elements_and_names_the_one_that_failed():
    ended, failed = (
        Marks(has_ended=True, status=0, began=True),
        Marks(status=3, problem="line 7 is no JSON", began=True),
    )
    seen = [Seen(f"7_{i}", "COMPLETED") for i in (0, 1, 3)] + [Seen("7_2", "FAILED", "NonZeroExitCode")]
    found = array(ended, ended, failed, ended, seen=seen)
    assert (found.state, found.elements, found.exit_status) == ("failed", {"done": 3, "failed": 1}, 3)
    assert found.error == "element 2: line 7 is no JSON"
    assert describe(found) == "3/4 done, 1/4 failed"
    assert found.element == 2
    all_failed = array(failed, failed, seen=[Seen("7_0", "FAILED"), Seen("7_1", "FAILED")])
    assert (describe(all_failed), all_failed.element) == ("2/2 failed", 0)


def test_an_array_of_which_some_elements_run_is_running_and_tells_already_what_failed():
    failed = Marks(status=3, problem="why", began=True)
    found = array(failed, Marks(began=True), seen=[Seen("7_0", "FAILED"), Seen("7_1", "RUNNING", "None", "n1")])
    assert (found.state, found.error) == ("running", "element 0: why")
    waiting = array(Marks(), Marks(), seen=[Seen("7_0", "PENDING", "Priority"), Seen("7_1", "PENDING", "Priority")])
    assert describe(waiting) == "2/2 waiting (Priority)"


def test_an_element_that_was_cancelled_before_it_could_begin_is_cancelled():
    ended = Marks(has_ended=True, status=0, began=True)
    found = array(ended, Marks(), ended, seen=[Seen("7_0", "COMPLETED"), Seen("7_2", "COMPLETED")])
    assert (found.state, found.elements, found.exit_status) == ("cancelled", {"done": 2, "cancelled": 1}, 75)
    assert found.error == ""


def test_an_array_that_was_cancelled_has_no_error():
    stopped = Marks(status=75, problem="what was done will be done again", began=True)
    found = array(stopped, stopped, seen=[Seen("7_0", "CANCELLED", "None"), Seen("7_1", "CANCELLED", "None")])
    assert (found.state, found.error) == ("cancelled", "")


def test_an_array_that_is_being_published_runs():
    ended = Marks(has_ended=True, status=0, began=True)
    found = array(ended, ended, seen=[Seen("7_0", "COMPLETED"), Seen("7_1", "RUNNING")])
    assert (found.state, found.elements) == ("running", {"done": 1, "running": 1})


def test_a_try_that_left_no_word_is_told_by_its_log_and_not_by_an_older_one():
    lost = marks(began=True, tries=2, problem="after step 5, state saved", log_error="node n2 failed")
    assert one(lost, Seen("7", "PENDING", "BeginTime")).error == "try 2: node n2 failed"
    silent = marks(began=True, tries=2)
    assert one(silent, Seen("7", "PENDING", "BeginTime")).error == "try 2: it ended without a word"
    assert one(NOTHING, Seen("7", "PENDING", "Priority")).error == ""


def test_what_was_cancelled_stays_so_when_slurm_has_forgotten_it():
    stopped = marks(began=True, status=75, problem="evaluate after 3 of 90 batches; it will begin again")
    for evidence in (stopped, marks(began=True), NOTHING):
        assert one(evidence, cancelled="2026-01-02").state == "cancelled"
        assert one(evidence, cancelled="2025-12-31").state != "cancelled"  # before it was submitted anew
        assert one(evidence, cancelled="2026-01-02").error == ""
    saved = marks(began=True, status=75, problem="after step 5, state saved")
    assert one(saved, cancelled="2026-01-02").error == "after step 5, state saved"
    assert one(marks(status=3, problem="disk", began=True), cancelled="2026-01-02").state == "failed"
    assert one(DONE, cancelled="2026-01-02").state == "done"
    assert one(NOTHING, Seen("7", "RUNNING"), cancelled="2026-01-02").state == "running"  # it saves its state
    assert one(NOTHING, Seen("7", "RUNNING"), cancelled="2026-01-02", shared_with="b").state == "cancelled"


def test_what_somebody_cancelled_is_told_by_its_log_when_slurm_has_forgotten_it():
    line = "slurmstepd-n1: error: *** JOB 142 ON n1 CANCELLED AT 2026-11-23T00:01:59{} ***"
    by_hand, by_slurm = (line.format(why) for why in ("", " DUE TO TIME LIMIT"))
    for status in (None, 75):
        assert one(marks(began=True, status=status, log_error=by_hand)).state == "cancelled"
    assert one(marks(began=True, log_error=by_slurm)).state == "lost"
    assert one(marks(began=True, status=3, problem="disk", log_error=by_hand)).state == "failed"
    assert one(marks(began=True, log_error=by_hand), None).state == "unknown"


def test_a_node_that_cannot_write_the_log_is_told_from_other_failures():
    found = one(NOTHING, Seen("7", "FAILED", "JobLaunchFailure", "n1"))
    assert (found.state, found.nodes) == ("failed", "n1")
    assert "(JobLaunchFailure): root has to be on a disk that all nodes see" in found.error


def test_a_silent_training_has_neither_speed_nor_an_end():
    pace = Pace(5, 10, "steps", tokens_per_s=7.0, left_s=3.0, silent_s=50.0)
    running = one(Evidence(marks={"": Marks(began=True)}, pace=pace), Seen("7", "RUNNING"))
    assert (running.silent_s, running.tokens_per_s, running.left_s) == (50.0, None, None)
    over = one(Evidence(marks={"": Marks(began=True, status=75)}, pace=pace), Seen("7", "FAILED"))
    assert (over.silent_s, over.tokens_per_s) == (None, 7.0)


def test_what_another_machine_publishes_runs():
    working = {"began": True, "status": 0, "owner": "process 5 on n1"}
    assert one(marks(**working), slurm=None).state == "running"
    ended = Marks(has_ended=True, status=0, began=True)
    publishing = Marks(has_ended=True, **working)
    assert array(ended, publishing).state == "running"
    assert array(ended, ended).state == "lost"


def test_an_array_whose_publishing_failed_is_no_success():
    ended = Marks(has_ended=True, status=0, began=True)
    full = Marks(has_ended=True, status=3, problem="the disk is full", began=True)
    assert array(ended, ended).state == "lost"
    assert array(ended, full).error == "element 1: the disk is full"


def test_a_task_that_was_submitted_anew_is_followed_by_its_newest_job():
    evidence = Evidence(claim=Claim(slurm="12", job="other"), marks={"": Marks(began=True)})
    found = one(evidence, Seen("7", "FAILED"), Seen("12", "RUNNING", "None", "n3"))
    assert (found.state, found.job_id, found.shared_with, found.nodes) == ("running", "12", "other", "n3")
    ended = one(evidence, Seen("7", "FAILED"), Seen("12", "FAILED"))
    assert (ended.job_id, ended.shared_with) == ("7", None)


def test_a_directory_that_is_gone_is_said():
    found = one(Evidence(is_gone=True), slurm=None)
    assert found.state == "never started"
    assert found.error == "its directory is gone: /nowhere/model/a-0"
    assert one(Evidence(is_gone=True), Seen("7", "RUNNING", "None", "n1")).state == "running"


def test_only_a_directory_that_there_was_is_gone(tmp_path):
    (found,) = look(tmp_path, [record(task("a", slurm=None), launcher="local")])
    assert (found.tasks[0].state, found.tasks[0].error) == ("never started", "")
    (tmp_path / "jobs/job").mkdir(parents=True)
    (tmp_path / "jobs/job/a").symlink_to("../../model/a-0")  # it was made once
    (found,) = look(tmp_path, [record(task("a", slurm=None), launcher="local")])
    assert found.tasks[0].error == "its directory is gone: /nowhere/model/a-0"


def test_tasks_of_a_job_on_this_machine_wait_for_their_turn_while_its_launcher_lives():
    tasks = (task("a", None), task("b", None, ["a"]))
    evidence = {"a": marks(began=True, owner="process 1 on here", host="here"), "b": NOTHING}
    a, b = judge(record(*tasks, launcher="local"), evidence, {}, launcher_runs=True)
    assert (a.state, a.nodes, describe(b)) == ("running", "here", "waiting for a")
    a, b = judge(record(*tasks, launcher="local"), {**evidence, "a": marks(began=True)}, {}, launcher_runs=False)
    assert (a.state, b.state) == ("lost", "never started")
    assert b.error.startswith("waited for a, which was lost")


def test_time_left_is_told_only_while_it_runs():
    pace = Pace(10, 20, "steps", 0, 2.5, 100.0, 30.0)
    evidence = Evidence(marks={"": Marks(began=True)}, pace=pace)
    running, failed = one(evidence, Seen("7", "RUNNING")), one(evidence, Seen("7", "FAILED"))
    assert (running.left_s, running.done, running.total, running.loss) == (30.0, 10, 20, 2.5)
    assert (failed.left_s, failed.done) == (None, 10)


def test_a_job_is_over_when_nothing_of_it_waits_or_runs():
    found = JobStatus(record(), chain(DONE, Seen("8", "RUNNING"), Seen("9", "PENDING", "Dependency")))
    assert (found.state, found.is_over, found.exit_status) == ("running", False, None)
    assert JobStatus(record(), [one(DONE)]).plain()["exit_status"] == 0


def test_a_job_whose_tasks_are_all_done_is_shown_where_there_is_no_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a-0").mkdir()
    (tmp_path / "a-0/manifest.json").touch()
    done = task("a").model_copy(update={"directory": str(tmp_path / "a-0")})
    (found,) = look(tmp_path, [record(done)])
    assert (found.state, found.problem) == ("done", "")
    (found,) = look(tmp_path, [record(done, task("b", "8"))])
    assert (found.state, found.problem[:23]) == ("unknown", "SLURM does not answer: ")
