"""How far the tasks of a job are, judged from what their directories say and what SLURM says.

Success is the manifest, and failure what a task has left in `work/result.json`. SLURM is believed about what waits and
runs, and about what ended without a word.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.errors import Interrupted, LaunchError, Preempted
from pipeline.jobs.evidence import Evidence, Marks, Pace, parts_of
from pipeline.jobs.record import JobRecord, TaskRecord
from pipeline.launch.scheduler import Seen, array_of

DONE, RUNNING, WAITING, UNKNOWN = "done", "running", "waiting", "unknown"
FAILED, LOST, CANCELLED, STOPPED, NEVER = "failed", "lost", "cancelled", "stopped", "never started"
UNDER_WAY = (RUNNING, WAITING, UNKNOWN)
GRAVEST = (RUNNING, WAITING, UNKNOWN, FAILED, LOST, CANCELLED, STOPPED, NEVER, DONE)  # what stands for several
WAITS = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
REMOVING = (FAILED, LOST, CANCELLED, STOPPED)  # of what waits for such a task SLURM removes the job
WAITED, SAVED = "waited for ", "state saved"
STOPS = (Preempted.exit_status, Interrupted.exit_status)
NEVER_SATISFIED = "DependencyNeverSatisfied"
BY_SOMEBODY = re.compile(r"CANCELLED AT \S+ \*\*\*")  # in SLURM's words, which else go on "DUE TO …"
DIED = {  # of SLURM's states
    "TIMEOUT": "its time was over",
    "OUT_OF_MEMORY": "out of memory",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not start",
    "DEADLINE": "its deadline has passed",
}


@dataclass(frozen=True)
class TaskStatus:
    """How far a task is. `status --json` prints these fields.

    Attributes:
        state: "done", "running", "waiting" (in the queue, or for its turn); of what is over without being done
            "failed", "lost" (ended without a word), "cancelled", "stopped" (its state is saved; retry continues it),
            "never started"; "unknown" where SLURM had to be asked and does not answer.
        reason: Why it waits, as SLURM says it (Resources, Priority, Dependency, BeginTime after a requeue), or in
            which state of SLURM it ended.
        waits_for: The tasks that have to be done before it, or the preflight, while it waits.
        job_id: Of SLURM.
        shared_with: The job that submitted it, where another one did.
        nodes: Where it runs or ran.
        begins: When SLURM is to begin it, as "2026-01-31T19:39:00", while it waits and SLURM knows.
        tries: How often it has begun, as its logs count; 0 if it has not since it was submitted.
        elements: Of an array: how many of its elements are in which state.
        element: The first of them that failed or was lost.
        done: Steps of a training, or units of other work, of `total` `noun`; null where nothing says so.
        ranks_done: Processes of a data task that have ended well, of `ranks`.
        loss, tokens_per_s: Of the last step.
        left_s: Seconds that the rest will take, while it runs.
        silent_s: Seconds since the last step of a training that runs, where that is long for its pace.
        error: The last error, or why it never started; while it waits or runs, how an earlier try ended.
        exit_status: That of a failed or stopped task; 0 once it is done; null before.
    """

    name: str
    kind: str
    state: str
    reason: str = ""
    waits_for: list[str] = field(default_factory=list)
    job_id: str | None = None
    shared_with: str | None = None
    nodes: str = ""
    begins: str = ""
    tries: int = 0
    elements: dict[str, int] = field(default_factory=dict)
    element: int | None = None
    done: int | None = None
    total: int | None = None
    noun: str = ""
    ranks_done: int = 0
    ranks: int = 1
    loss: float | None = None
    tokens_per_s: float | None = None
    left_s: float | None = None
    silent_s: float | None = None
    error: str = ""
    exit_status: int | None = None
    directory: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens to it by itself."""
        return self.state not in UNDER_WAY


@dataclass(frozen=True)
class JobStatus:
    """How far a job is.

    Attributes:
        problem: Why SLURM could not be asked, though it had to be.
    """

    record: JobRecord
    tasks: list[TaskStatus]
    problem: str = ""

    @property
    def state(self) -> str:
        """The state that stands for all tasks."""
        return _gravest([task.state for task in self.tasks])

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens to any task by itself."""
        return all(task.is_over for task in self.tasks)

    @property
    def exit_status(self) -> int | None:
        """0 if the job is done, else that of the first task that failed, else was lost or stopped; null before that."""
        if not self.is_over:
            return None
        for state in (FAILED, LOST, CANCELLED, STOPPED, NEVER):
            for task in self.tasks:
                if task.state == state:
                    return task.exit_status or LaunchError.exit_status
        return 0

    def plain(self) -> dict[str, Any]:
        """Return what `status --json` prints."""
        return {
            "job": self.record.name,
            "state": self.state,
            "exit_status": self.exit_status,
            "launcher": self.record.launcher,
            "submitted": self.record.submitted,
            "command": self.record.command,
            "problem": self.problem,
            "tasks": [asdict(task) for task in self.tasks],
        }


@dataclass(frozen=True)
class _Judgement:
    """The state of one part of a task, and why."""

    state: str
    reason: str = ""
    error: str = ""
    exit_status: int | None = None


def judge(
    record: JobRecord, evidence: Mapping[str, Evidence], seen: Mapping[str, Seen] | None, launcher_runs: bool = False
) -> list[TaskStatus]:
    """Return the state of every task of a job.

    Args:
        evidence: What the directory of each task says, by the task's name.
        seen: What SLURM says of its jobs and of the elements of its arrays, by id; null if it does not answer.
        launcher_runs: Whether the process that runs the job on a machine lives.
    """
    judged: dict[str, TaskStatus] = {}
    for task in record.tasks:
        needs = [judged[name] for name in task.needs if name in judged]
        status = _judge_task(task, evidence[task.name], seen, launcher_runs, needs)
        is_cancelled = task.cancelled is not None and task.cancelled > record.submitted
        judged[task.name] = _cancelled(status) if is_cancelled else status
    return list(judged.values())


def _cancelled(status: TaskStatus) -> TaskStatus:
    """Return how far a task is that `cancel` ended: SLURM forgets that, and others may go on with what is shared."""
    if status.state in (LOST, STOPPED, NEVER) or (status.shared_with and not status.is_over):
        error = status.error if status.error.endswith(SAVED) else ""
        return replace(status, state=CANCELLED, error=error, exit_status=Preempted.exit_status, left_s=None)
    return status


def _judge_task(
    task: TaskRecord,
    evidence: Evidence,
    seen: Mapping[str, Seen] | None,
    launcher_runs: bool,
    needs: Sequence[TaskStatus],
) -> TaskStatus:
    job_id, shared = _job_of(task, evidence, seen)
    here = {} if seen is None or job_id is None else {id: s for id, s in seen.items() if array_of(id) == job_id}
    status = TaskStatus(
        name=task.name,
        kind=task.kind,
        state=DONE,
        job_id=job_id,
        shared_with=shared,
        begins=min((s.begins for s in here.values() if s.state in WAITS and s.begins[:1].isdigit()), default=""),
        nodes=",".join(dict.fromkeys(one.nodes for one in here.values() if one.nodes)),
        tries=max((marks.tries for marks in evidence.marks.values()), default=0),
        ranks=task.ranks,
        exit_status=0,
        directory=task.directory,
    )
    pace = evidence.pace
    if evidence.is_done:
        return _with_pace(
            replace(status, ranks_done=task.ranks), replace(pace, left_s=None, silent_s=None, ranks=task.ranks)
        )
    asked = seen is not None or job_id is None
    parts = _judge_parts(task, evidence, here, f"{job_id}", asked, launcher_runs, needs)
    whole = _explained(_combine(parts), task, evidence, needs)
    if whole.state != RUNNING:
        pace = replace(pace, left_s=None, silent_s=None)
    elif pace.silent_s is not None:
        pace = replace(pace, left_s=None, tokens_per_s=None)
    hosts = ",".join(dict.fromkeys(marks.host for marks in evidence.marks.values() if marks.host))
    status = replace(
        status,
        state=whole.state,
        reason=whole.reason,
        waits_for=_waits_for(task, needs, whole),
        error=whole.error,
        exit_status=whole.exit_status,
        nodes=status.nodes or ("" if whole.state == WAITING else hosts),  # of a try that is over nothing has to be said
        elements=dict(Counter(part.state for part in parts.values())) if task.is_array else {},
        element=_first_bad(parts) if task.is_array else None,
    )
    return _with_pace(status, pace)


def _judge_parts(
    task: TaskRecord,
    evidence: Evidence,
    here: Mapping[str, Seen],
    job_id: str,
    asked: bool,
    launcher_runs: bool,
    needs: Sequence[TaskStatus],
) -> dict[str, _Judgement]:
    """Judge each part of a task: the elements of an array, or the one that it is."""
    is_blocked = any(need.state != DONE for need in needs)
    is_removed = task.slurm is not None and any(need.state in REMOVING for need in needs)
    parts = {}
    for part in parts_of(task):
        marks = evidence.marks.get(part, Marks())
        one = here.get(f"{job_id}_{int(part[1:])}" if part else job_id)
        parts[part] = _judge_part(marks, one, asked, launcher_runs, is_blocked)
        # of an array of which an element was cancelled before it could begin, SLURM shows only the others
        if parts[part].state == NEVER and (is_removed or (here and one is None and not marks.log_error)):
            parts[part] = replace(parts[part], state=CANCELLED, exit_status=Preempted.exit_status)
    return parts


def _explained(whole: _Judgement, task: TaskRecord, evidence: Evidence, needs: Sequence[TaskStatus]) -> _Judgement:
    """Return a judgement with the reason that lies outside of the task: its directory, what it needs, its nodes."""
    if evidence.is_gone and whole.state not in UNDER_WAY:
        whole = replace(whole, error=f"its directory is gone: {task.directory}")
    if whole.state in (NEVER, CANCELLED) and not any(marks.began for marks in evidence.marks.values()):
        why = _why_never(needs) or (_why_refused(task, evidence) if whole.state == NEVER else "")
        return replace(whole, error=why or whole.error)
    return whole


def _waits_for(task: TaskRecord, needs: Sequence[TaskStatus], whole: _Judgement) -> list[str]:
    if whole.state != WAITING:
        return []
    names = [need.name for need in needs if need.state != DONE]
    return names or ([f"preflight {task.preflight}"] if task.preflight and whole.reason == "Dependency" else [])


def _job_of(task: TaskRecord, evidence: Evidence, seen: Mapping[str, Seen] | None) -> tuple[str | None, str | None]:
    """Return the SLURM job that makes a task, and which other job submitted that; it may have been submitted anew."""
    claim = evidence.claim
    if task.slurm is not None and claim is not None and claim.slurm not in (None, task.slurm) and seen is not None:
        mine = [one for id, one in seen.items() if array_of(id) == task.slurm]
        theirs = [one for id, one in seen.items() if array_of(id) == claim.slurm]
        if any(not one.is_over for one in theirs) and all(one.is_over for one in mine):
            return claim.slurm, claim.job
    return task.slurm, task.shared_with


def _judge_part(marks: Marks, seen: Seen | None, asked: bool, launcher_runs: bool, is_blocked: bool) -> _Judgement:
    """Judge a task that is no array, or one element.

    Args:
        seen: What SLURM says of it; null if nothing.
        asked: Whether SLURM was asked, or need not be.
        is_blocked: Whether a task that it needs is not done.
    """
    if seen is not None and not seen.is_over:  # the last element of an array publishes after its rank has ended
        return _judge_queued(marks, seen)
    if seen is None and marks.owner is not None and not marks.status:  # it may have to publish yet
        return _Judgement(RUNNING, "" if asked else "by its lock")
    if marks.has_ended and marks.status in (None, 0):
        return _Judgement(DONE, exit_status=0) if asked else _Judgement(UNKNOWN)
    if seen is not None and seen.state == CANCELLED.upper():
        if seen.reason == NEVER_SATISFIED or (is_blocked and not marks.began and seen.reason == ""):
            return _Judgement(NEVER, seen.reason, exit_status=LaunchError.exit_status)
        saved = marks.problem if marks.status in STOPS and marks.problem.endswith(SAVED) else ""
        return _Judgement(CANCELLED, seen.state, saved, Preempted.exit_status)
    is_forgotten = seen is None and asked and not launcher_runs
    if is_forgotten and marks.status in (None, *STOPS) and BY_SOMEBODY.search(marks.log_error):
        return _Judgement(CANCELLED, exit_status=Preempted.exit_status)
    if marks.status:
        state = STOPPED if marks.status in STOPS else FAILED
        return _Judgement(state, "" if seen is None else seen.state, marks.problem, marks.status)
    if seen is not None:
        return _judge_silent(marks, seen)
    return _judge_forgotten(marks, asked, launcher_runs)


def _judge_queued(marks: Marks, seen: Seen) -> _Judgement:
    """Judge what SLURM says waits or runs; of an earlier try it tells how that ended."""
    before = _before(marks, seen.state in WAITS)
    if seen.state not in WAITS:
        return _Judgement(RUNNING, "" if seen.state == RUNNING.upper() else seen.state, before)
    if seen.reason == NEVER_SATISFIED:
        return _Judgement(NEVER, seen.reason, exit_status=LaunchError.exit_status)
    return _Judgement(WAITING, seen.reason if seen.reason != "None" else "", before)


def _before(marks: Marks, waits: bool) -> str:
    """Return how the last try that has ended did so.

    Args:
        waits: Whether none runs now; else one without a result is that which does.
    """
    if waits and marks.status is None and marks.tries:
        return f"try {marks.tries}: {marks.log_error or 'it ended without a word'}"
    if not marks.problem:
        return ""
    number = marks.tries if marks.status is not None else marks.tries - 1
    return f"try {max(number, 1)}: {marks.problem}"


def _judge_forgotten(marks: Marks, asked: bool, launcher_runs: bool) -> _Judgement:
    """Judge what SLURM knows nothing of, and what has left no word of its end."""
    if not asked:
        return _Judgement(UNKNOWN)
    if launcher_runs:
        return _Judgement(RUNNING if marks.began else WAITING)
    if not marks.began and marks.status is None:
        return _Judgement(NEVER, exit_status=LaunchError.exit_status)
    return _Judgement(LOST, "", marks.log_error or "it ended without a word", LaunchError.exit_status)


def _judge_silent(marks: Marks, seen: Seen) -> _Judgement:
    """Judge what SLURM says is over, though it left no result."""
    if seen.state == "PREEMPTED":
        return _Judgement(STOPPED, seen.state, exit_status=Preempted.exit_status)
    if seen.state == "COMPLETED":
        return _Judgement(LOST, seen.state, "it left neither a result nor an artifact", LaunchError.exit_status)
    how = DIED.get(seen.state, "")
    if seen.reason == "JobLaunchFailure" and not marks.log_error:
        how = f"SLURM could not begin it there ({seen.reason}): root has to be on a disk that all nodes see"
    error = ": ".join(filter(None, [how, marks.log_error])) or "it left no reason; see its logs"
    return _Judgement(FAILED, seen.state, error, LaunchError.exit_status)


def _gravest(states: Sequence[str]) -> str:
    return min(states, key=GRAVEST.index, default=DONE)


def _combine(parts: Mapping[str, _Judgement]) -> _Judgement:
    """Return the state of an array: that of an element that is under way, or of the first that did not end well."""
    if list(parts) == [""]:
        return parts[""]
    state = _gravest([part.state for part in parts.values()])
    if state == DONE:  # and yet nobody has published
        return _Judgement(LOST, "", "all elements have ended, but nothing was published", LaunchError.exit_status)
    of_state = {int(name[1:]): part for name, part in parts.items() if part.state == state}
    bad = _first_bad(parts)
    number = next((number for number, part in of_state.items() if part.error), None) if bad is None else bad
    wrong = None if number is None else parts[f"-{number:05d}"]
    error = f"element {number}: {wrong.error or wrong.reason}" if wrong else ""
    if state == CANCELLED:  # of which element is no matter
        error = next((part.error for part in of_state.values() if part.error), "")
    reasons = Counter(part.reason for part in of_state.values() if part.reason)
    first = next(iter(of_state.values()))
    return _Judgement(state, next(iter(reasons), ""), error, first.exit_status)


def _first_bad(parts: Mapping[str, _Judgement]) -> int | None:
    return next((int(name[1:]) for name, part in parts.items() if part.state in (FAILED, LOST)), None)


def _why_never(needs: Sequence[TaskStatus]) -> str:
    """Return which task one that never started has waited for, and why that was not made."""
    blamed = [task for task in needs if task.state not in (DONE, *UNDER_WAY)]
    if not blamed:
        return ""
    first = next((task for task in blamed if not task.error.startswith(WAITED)), blamed[0])
    if first.error.startswith(WAITED):
        return first.error
    why = f": {first.error}" if first.error and first.state not in (CANCELLED, NEVER) else ""
    return f"{WAITED}{first.name}, which {predicate(first.state)}{why}"


def predicate(state: str) -> str:
    """Return the words that say of a task that it is, or ended, in a state: "failed", "was lost", "is running"."""
    if state in (FAILED, NEVER):
        return state
    return f"{'was' if state in (LOST, CANCELLED, STOPPED) else 'is'} {state}"


def _why_refused(task: TaskRecord, evidence: Evidence) -> str:
    """Return what was wrong with the nodes of a task that were tried before it."""
    if task.preflight is None:
        return ""
    return f"its nodes were tried first, by SLURM job {task.preflight}: {evidence.preflight_error or 'it did not pass'}"


def _with_pace(status: TaskStatus, pace: Pace) -> TaskStatus:
    return replace(
        status,
        done=pace.done,
        total=pace.total,
        noun=pace.noun,
        ranks_done=pace.ranks,
        loss=pace.loss,
        tokens_per_s=pace.tokens_per_s,
        left_s=None if pace.left_s is None else round(pace.left_s, 1),
        silent_s=None if pace.silent_s is None else round(pace.silent_s, 1),
    )
