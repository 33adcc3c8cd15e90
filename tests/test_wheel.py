"""The built wheel carries the presets and the jobs."""

import subprocess
import sys
import zipfile

import pytest
from support import PROJECT


@pytest.mark.slow
def test_the_wheel_runs_the_quickstart_from_anywhere(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(PROJECT)]
    subprocess.run(build, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    plan = [sys.executable, "-m", "pipeline", "job=quickstart", "--plan"]
    done = subprocess.run(plan, cwd=tmp_path / "site", capture_output=True, text=True, check=True)
    assert "11 of 11 tasks would run" in done.stdout
    assert (tmp_path / "site/pipeline/slurm/stage.sbatch").read_bytes() == (PROJECT / "slurm/stage.sbatch").read_bytes()
