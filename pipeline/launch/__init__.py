"""Launchers: how a task's processes come to run."""

from typing import Annotated

from pydantic import Field

from pipeline.launch.local import Local
from pipeline.launch.slurm import Slurm

AnyRun = Annotated[Local | Slurm, Field(discriminator="kind")]
