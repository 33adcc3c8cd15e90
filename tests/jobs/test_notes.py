"""How a task is and why, in the few words that a table has room for."""

import pytest
from rich.console import Console

from pipeline.jobs import status
from pipeline.jobs.notes import describe, note, reason, way_out
from pipeline.jobs.states import JobStatus, TaskStatus

HERE = "/root/model/pretrain-0123"
KILLED = (
    "rank 1 was ended by SIGKILL; the same command continues; if nobody sent that, memory has run out: the job asked "
    "for no memory_per_node; the model's states alone need about 0.4 MB a rank, activations come on top; raise "
    "run.memory_per_node, or run fewer ranks on a machine"
)
DOWN = "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions"


def task(state, **more):
    return TaskStatus("pretrain", "pretrain", state, job_id="7", directory=HERE, **more)


@pytest.mark.parametrize("place", [HERE, "artifacts/model/pretrain-0123", "../a root/model/pretrain-0123"])
def test_a_note_is_without_the_place_of_its_task_and_what_does_not_fit(place):
    assert note(task("failed", error=f"{place}: lost n2; the same command continues")) == "lost n2"
    assert note(task("waiting", error=f"try 1: {place}: lost n2")) == "try 1: lost n2"
    again = f"{place}: begun 3 times without any progress; the last time: {place}: {KILLED}"
    short = "begun 3 times without any progress; the last time: rank 1 was ended by SIGKILL; if nobody sent that, "
    assert note(task("failed", error=again)) == f"{short}memory has run out"
    full = reason(task("failed", error=again))  # that of `logs` says what helps
    assert full.startswith(f"{short}memory has run out: the job asked for no memory_per_node; ")
    assert full.endswith("; raise run.memory_per_node, or run fewer ranks on a machine")


def test_a_note_says_what_memory_was_asked_for_and_needed():
    asked = (
        "rank 0 on n1 ran out of memory: the job asked for memory_per_node=200M; the model's states need 1.2 GB a rank"
    )
    said = f"{HERE}: {asked}; spread the model (run.parallel.zero), or feed less at once"
    assert note(task("failed", error=said)) == asked


def test_a_note_has_the_last_line_of_a_rank_that_exited():
    end = (
        f"; the same command continues; the end of {HERE}/logs/rank-00001.log:\nTraceback:\n  x\nImportError: broken\n"
    )
    assert note(task("failed", error=f"{HERE}: rank 1 exited with status 1{end}")) == (
        "rank 1 exited with status 1: ImportError: broken"
    )
    assert note(task("failed", error=f"{HERE}: rank 1 was ended by SIGSEGV{end}")) == "rank 1 was ended by SIGSEGV"


def test_a_long_reason_of_slurm_is_a_note():
    waiting = task("waiting", reason=DOWN, error="try 1: lost n2")
    assert describe(waiting) == "waiting"
    assert note(waiting) == f"{DOWN}; try 1: lost n2"


def test_what_is_halted_says_how_it_goes_on():
    assert describe(task("running", reason="SUSPENDED")) == "running (suspended; scontrol resume 7)"
    assert describe(task("waiting", reason="JobHeldAdmin")) == "waiting (held; scontrol release 7)"
    again = task("waiting", reason="launch failed requeued held")
    assert describe(again) == "waiting (launch failed requeued held; scontrol release 7)"
    assert describe(task("waiting", reason="Priority", tries=2)) == "waiting (Priority)"
    assert way_out(task("waiting", reason="Priority")) == way_out(task("failed", reason="SUSPENDED")) == ""


def test_a_state_of_which_slurm_says_nothing_is_told_so():
    assert describe(task("running", reason="by its lock")) == "running (no word from SLURM)"
    assert describe(task("unknown")) == "unknown (no word from SLURM)"


def test_a_training_that_stands_still_says_how_long():
    assert describe(task("running", silent_s=125.0, tries=2)) == "running (no step for 2:05), try 2"


def test_a_narrow_terminal_shows_the_state_in_full():
    halted = task("running", reason="SUSPENDED", done=1495, total=60000, noun="steps", loss=3.2, left_s=3600.0)
    job = JobStatus(None, [halted, TaskStatus("train_tokenizer", "train_tokenizer", "done")])
    assert Console(width=1000).measure(status._tasks(job, status._left_out(job, 80))).maximum <= 80


@pytest.mark.parametrize(("width", "left_out"), [(100, ["progress", "tokens/s", "left"]), (40, ["note", "node"])])
def test_a_terminal_shows_no_empty_column_and_notes_where_there_is_room(width, left_out):
    job = JobStatus(None, [task("failed", error="lost n2", loss=2.5, nodes="n[1-4]"), task("cancelled")])
    assert {*left_out} <= {*status._left_out(job, width)}
    assert ("note" in status._left_out(job, width)) == ("note" in left_out)
    assert Console(width=1000).measure(status._tasks(job, status._left_out(job, width))).maximum <= width
    assert status._left_out(job, None) == []
