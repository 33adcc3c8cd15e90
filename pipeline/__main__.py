"""`python -m pipeline job=NAME | stage=KIND [key=value …] [--plan]`."""

import signal
import sys
from typing import Any

import pipeline
from pipeline.errors import ArtifactError, ConfigError, Interrupted, PipelineError, Preempted


def main() -> None:
    """Run the command line; end with the exit status of what happened."""
    for number in (signal.SIGTERM, signal.SIGUSR2):  # until a job runs, nothing can be lost
        signal.signal(number, lambda *_: sys.exit(Preempted.exit_status))
    try:
        if sys.argv[1:] == ["--version"]:
            print(pipeline.__version__)
            return
        stage = next((word.removeprefix("stage=") for word in sys.argv if word.startswith("stage=")), None)
        if stage is not None and {"--help", "-h"} & set(sys.argv):
            from pipeline.operate import print_settings

            print_settings(stage)
            return
        from pipeline.compose import compose

        status = compose(sys.argv[1:], act)
    except PipelineError as error:
        status = _say(error)
    except KeyboardInterrupt:
        status = Interrupted.exit_status
    sys.exit(status)


def act(data: dict[str, Any], job: str | None) -> int:
    """Plan one composed command and run it; return its exit status."""
    from pipeline.execute import execute
    from pipeline.operate import print_end, print_plan, print_task
    from pipeline.plan import Command, plan
    from pipeline.settings import decode

    try:
        command = decode(Command, data)
        tasks = plan(command, job)
        if command.plan:
            print_plan(tasks, command)
            return 0
        ran = [task.name for task in tasks if task.done is None]
        execute(tasks, command, job, report=print_task)
        print_end(tasks, ran, command, job)
    except PipelineError as error:
        return _say(error)
    except OSError as error:
        return _say(ArtifactError(f"{error.filename or 'output'}: {error.strerror}; root=DIR chooses another place"))
    return 0


def _say(error: PipelineError) -> int:
    """Print an error and return its exit status."""
    problems = error.problems if isinstance(error, ConfigError) else (str(error),)
    for problem in problems:
        if isinstance(error, Preempted):
            print(f"stopped: {problem}; run the same command to continue", file=sys.stderr)
        else:
            print(f"error: {problem}", file=sys.stderr)
    return error.exit_status


if __name__ == "__main__":
    main()
