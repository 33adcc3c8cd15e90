"""What a person sees of a job: the plan before it, the table after it."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.plan import Command, Task
from pipeline.stage import clock


def print_plan(tasks: list[Task], command: Command) -> None:
    """Print what is done, what would run, where, with how many ranks, and why."""
    table = _table("task", "state", "runs on", "directory", "why")
    for task in tasks:
        ranks = 1 if task.stage.ranks == "one" else command.run.ranks
        where = "" if task.done else f"{command.run.kind}, {ranks} rank{'s' if ranks > 1 else ''}"
        table.add_row(task.name, "done" if task.done else "to run", where, str(task.directory), task.why)
    _print(table)
    waiting = sum(task.done is None for task in tasks)
    _print(f"{waiting} of {len(tasks)} tasks would run; nothing was started.")


def print_task(task: Task) -> None:
    """Print one line for a task that has just ended."""
    if task.done is not None:
        seconds = clock(task.done.manifest.made.seconds)
        _print("  ".join([f"{task.name} done in {seconds}", *filter(None, task.stage.headline(task.done.stats))]))


def print_end(tasks: list[Task], ran: list[str], command: Command, job: str | None) -> None:
    """Print what every finished task made, and where the results that people open are."""
    table = _table("task", "made", "seconds", "result", "")
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
    _print(table)
    if job is None and tasks[0].done is not None:
        for line in tasks[0].stage.show(tasks[0].done):
            _print(line)
        results = results or [(tasks[0].name, tasks[0].done.path)]
    for name, path in results:
        _print(f"{name}: {path}")


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right" if heading == "seconds" else "left", no_wrap=True)
    return table


def _print(what: Table | str) -> None:
    """Print without folding lines: paths and tables can be copied, and a narrow terminal wraps them itself."""
    Console(width=1000, highlight=False).print(what, crop=False, soft_wrap=isinstance(what, str), markup=False)
