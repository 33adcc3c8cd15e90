"""Launchers: how a task's processes come to run."""

from pipeline.launch.local import Local

AnyRun = Local  # a union on `kind` as soon as there is a second launcher
