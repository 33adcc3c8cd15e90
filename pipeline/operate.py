"""What a person sees of a job: the plan before it, the table after it."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.plan import Command, Task


def print_plan(tasks: list[Task], command: Command, job: str | None) -> None:
    """Print what is done, what would run, where, with how many ranks, and why."""
    table = Table(box=None, pad_edge=False)
    for heading in ("task", "state", "why", "runs on", "directory"):
        table.add_column(heading, overflow="fold")
    for task in tasks:
        ranks = 1 if task.stage.ranks == "one" else command.run.ranks
        where = "" if task.done else f"{command.run.kind}, {ranks} rank{'s' if ranks > 1 else ''}"
        table.add_row(task.name, "done" if task.done else "to run", task.why, where, str(task.directory))
    _console().print(table)
    waiting = sum(task.done is None for task in tasks)
    _console().print(f"{waiting} of {len(tasks)} tasks would run; nothing was started.")


def print_end(tasks: list[Task], ran: list[str], command: Command, job: str | None, overrides: list[str]) -> None:
    """Print what every finished task made, and where the results that people open are."""
    console = _console()
    table = Table(box=None, pad_edge=False)
    for heading in ("task", "made", "seconds", "result", ""):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    results = []
    for task in tasks:
        if task.done is None:
            table.add_row(task.name, "", "", "", "not done")
            continue
        amount, number = task.stage.headline(task.done.stats)
        state = "" if task.name in ran else "done before"
        table.add_row(task.name, amount, f"{task.done.manifest.made.seconds:.1f}", number, state)
        if task.stage.result is not None:
            path = Path(command.root) / "jobs" / job / task.name if job else task.done.path
            results.append((task.name, path / task.stage.result))
    console.print(table)
    if job is None and tasks[0].done is not None:
        for line in tasks[0].stage.show(tasks[0].done):
            console.print(line, markup=False, highlight=False)
        results = results or [(tasks[0].name, tasks[0].done.path)]
    for name, path in results:
        console.print(f"{name}: {path}", soft_wrap=True, highlight=False)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False)
