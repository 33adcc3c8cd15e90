"""`python -m pipeline job=NAME | stage=KIND [key=value …] [--plan]`, and the other commands: see COMMANDS."""

import os
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pipeline
from pipeline.errors import ArtifactError, ConfigError, Interrupted, LaunchError, PipelineError, Preempted
from pipeline.progress import drop_unwritten, tell


class Other(NamedTuple):
    """A command that is no job: its words, what it does, and the function that takes the words and gives the status."""

    words: str
    about: str
    run: Callable[[Sequence[str]], int]


def _of(module: str) -> Callable[[Sequence[str]], int]:
    """Return the function of a module that has its name, imported when it is called: start-up loads no other one."""

    def run(arguments: Sequence[str]) -> int:
        status: int = getattr(import_module(f"pipeline.{module}"), module.rpartition(".")[2])(arguments)
        return status

    return run


def _task(arguments: Sequence[str]) -> int:
    from pipeline.env import STOP_SIGNALS, StopRequest

    with StopRequest().listening(*STOP_SIGNALS) as stop:  # from the first moment: a signal may not end it unsaved
        from pipeline.allocation import run_task

        return run_task(arguments, stop)


COMMANDS = {
    "status": Other("[JOB ...] [--watch] [--json]", "how far jobs are, or the tasks of one", _of("jobs.status")),
    "wait": Other("JOB ...", "return when jobs are over, with their exit status", _of("jobs.wait")),
    "logs": Other("JOB.TASK [--rank N] [--job] [--follow] [--lines N]", "what a rank has printed", _of("jobs.logs")),
    "cancel": Other(
        "JOB[.TASK] ...", "end what waits or runs of a job; what is done or saved stays", _of("jobs.cancel")
    ),
    "retry": Other("JOB ...", "start again what of a job did not end well, exactly as it was", _of("jobs.retry")),
    "verify": Other("PATH|URL|JOB.TASK ...", "read artifacts in full: is every file what it was?", _of("verify")),
    "sync": Other(
        "[JOB|JOB.TASK|DIR ...] [--all]", "bring the numbers of trainings to W&B, from a login node", _of("sync")
    ),
    "trace": Other(
        "run=PATH|JOB.TASK step=N|doc=ID", "which documents a step of a pretraining saw, and back", _of("trace")
    ),
    "preflight": Other(
        "DIR", "(slurm/stage.sbatch) try the nodes of this SLURM job for a submitted training", _of("preflight")
    ),
    "task": Other("DIR", "(slurm/stage.sbatch) run a submitted task in this SLURM job", _task),
}


def main() -> None:
    """Run the command line; end with the exit status of what happened."""
    if "PIPELINE_ALLOCATION" not in os.environ:  # there they end it, and slurm/stage.sbatch lets it begin again
        for number in (signal.SIGTERM, signal.SIGUSR2):  # until a job runs, nothing can be lost
            signal.signal(number, lambda *_: sys.exit(Preempted.exit_status))
    try:
        try:
            status = _run(sys.argv[1:])
        except PipelineError as error:
            status = _say(error)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `… | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except (ModuleNotFoundError, OSError) as error:
        status = _say(_explained(error))
    except KeyboardInterrupt:
        status = Interrupted.exit_status
    sys.exit(status)


def _run(arguments: Sequence[str]) -> int:
    """Run a command line; return its exit status."""
    asks_help = bool({"--help", "-h"} & set(arguments))
    choice = next((word for word in arguments if word.startswith(("stage=", "run="))), None)
    if arguments == ["--version"]:
        print(pipeline.__version__)
    elif arguments and "=" not in arguments[0] and arguments[0][:1] not in ("-", "+", "~"):
        return _run_command(arguments[0], arguments[1:])
    elif asks_help and choice is not None:
        from pipeline.operate import print_settings

        print_settings(*choice.split("=", 1))
    else:
        from pipeline.compose import compose

        try:
            return compose(arguments, act)
        finally:  # Hydra exits when it has printed its help
            if asks_help:
                print("\nOther commands:", *map(_usage, COMMANDS), sep="\n  ")
    return 0


def _explained(error: ModuleNotFoundError | OSError) -> PipelineError:
    """Say what is wrong with this machine, where that is what it is."""
    if isinstance(error, OSError):
        return ArtifactError(f"{error.filename or 'input'}: {error.strerror}")
    if (error.name or "").partition(".")[0] == pipeline.__name__:
        raise error
    by_hand = "PIPELINE_ALLOCATION" in os.environ and not {"task", "preflight"} & set(sys.argv[1:2])
    where = "PIPELINE_SETUP or PIPELINE_PYTHON" if by_hand else "run.setup or run.python"
    return LaunchError(
        f"{sys.executable} on {platform.node()} has no '{error.name}', which the pipeline needs; take the Python that "
        f"it is installed for: {where} says where a node has it"
    )


def _run_command(name: str, arguments: Sequence[str]) -> int:
    """Run another command than a job or a stage. Raises ConfigError if there is none of this name."""
    if name not in COMMANDS:
        from pipeline.compose import CONF
        from pipeline.settings import nearest

        is_job = Path(name).is_file() or (CONF / f"job/{name}.yaml").exists()
        hint = f"; did you mean 'job={name}'?" if is_job else nearest(name, list(COMMANDS))
        raise ConfigError(f"no command is called '{name}' (a job is run by job=NAME){hint}")
    if {"--help", "-h"} & set(arguments):
        print(_usage(name), *_details(name), sep="\n")
        return 0
    return COMMANDS[name].run(arguments)


def _details(name: str) -> list[str]:
    """Return what the module of a command says about it beyond its usage."""
    module = next((f"pipeline.{place}{name}" for place in ("jobs.", "") if find_spec(f"pipeline.{place}{name}")), None)
    more = (import_module(module).__doc__ or "").partition("\n\n")[2].strip() if module else ""
    return ["", more] if more else []


def _usage(name: str) -> str:
    root = "" if COMMANDS[name].words == "DIR" else " [root=DIR]"  # a directory says where it is
    return f"python -m pipeline {name} {COMMANDS[name].words}{root}   {COMMANDS[name].about}"


def act(data: dict[str, Any], job: str | None) -> int:
    """Plan one composed command and run it; return its exit status."""
    from pipeline.execute import execute
    from pipeline.launch.slurm import Slurm
    from pipeline.launch.srun import is_in_allocation
    from pipeline.operate import print_end, print_plan, print_task
    from pipeline.plan import Command, plan
    from pipeline.settings import decode

    try:
        command = decode(Command, data)
        job = command.name or job
        tasks = plan(command, job)
        if command.plan and isinstance(command.run, Slurm) and not is_in_allocation():
            from pipeline.jobs.preview import preview

            preview(tasks, command, job)
            return 0
        if command.plan:
            print_plan(tasks, command)
            return 0
        if isinstance(command.run, Slurm) and not is_in_allocation():
            from pipeline.jobs.submit import submit

            submit(tasks, command, job)
            return 0
        ran = [task.name for task in tasks if task.done is None]
        execute(tasks, command, job, report=print_task)
        try:
            print_end(tasks, ran, command, job)
        except OSError:  # all is made, whether anybody can be told or not
            drop_unwritten(sys.stdout)
    except PipelineError as error:
        status = _say(error)
        if is_in_allocation():
            from pipeline.allocation import begin_again

            return begin_again(error)
        return status
    except BrokenPipeError:  # nothing is wrong with the output
        raise
    except OSError as error:
        return _say(ArtifactError(f"{error.filename or 'output'}: {error.strerror}; root=DIR chooses another place"))
    return 0


def _say(error: PipelineError) -> int:
    """Print an error and return its exit status."""
    problems = error.problems if isinstance(error, ConfigError) else (str(error),)
    for problem in problems:
        if isinstance(error, Preempted):
            tell(f"stopped: {problem}; run the same command to continue", sys.stderr)
        else:
            tell(f"error: {problem}", sys.stderr)
    return error.exit_status


if __name__ == "__main__":
    main()
