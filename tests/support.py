"""The command line as a user runs it, for tests."""

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pipeline", "--config-dir", str(PROJECT / "tests/conf"), *map(str, arguments)]


def run_pipeline(*arguments: object, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end; it must exit with `status`, and never with a traceback."""
    return run_command("--config-dir", PROJECT / "tests/conf", *arguments, status=status, **variables)


def run_command(*words: object, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """The same for a command about jobs that were started."""
    environment = {**os.environ, "PYTHONWARNINGS": "", "WANDB_MODE": "offline", **variables}
    line = [sys.executable, "-m", "pipeline", *map(str, words)]
    done = subprocess.run(line, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, f"exit status {done.returncode}, wanted {status}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr + done.stdout, done.stderr + done.stdout
    return done


MODEL_TASKS = ("pretrain", "finetune", "evaluate", "generate", "export")
