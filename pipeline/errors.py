"""Every error that a user can cause, each with the exit status that a script can tell it by.

A message is one clear line: the place (dotted path or file), what was wanted, what was there, and the way out.
"""


class PipelineError(Exception):
    """Something a person can put right; printed as its message, without a traceback."""

    exit_status = 1


class ConfigError(PipelineError):
    """The settings cannot be run. Holds one line per problem, so that all mistakes are reported together."""

    exit_status = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ArtifactError(PipelineError):
    """An input or output is missing, damaged, empty, of the wrong kind, or has no room on the disk."""

    exit_status = 3


class LaunchError(PipelineError):
    """The processes of a task could not be started, or ended without saying why."""

    exit_status = 4


class Lost(LaunchError):
    """Processes were ended from outside, stood still, or a machine went: beginning again may help."""


class TrainingError(PipelineError):
    """Training cannot go on: a loss that is not finite, a checkpoint that does not fit."""

    exit_status = 5


class Preempted(PipelineError):
    """Asked to stop, state saved: running the same command again continues."""

    exit_status = 75


class Interrupted(Preempted):
    """The same, asked for by Ctrl-C."""

    exit_status = 130
