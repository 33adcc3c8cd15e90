"""What people are told where it cannot be written. (How far work is: tests/test_stage.py.)"""

import subprocess
import sys

from pipeline.progress import tell


def test_what_is_told_is_printed(capfd):
    tell("to all")
    tell("of an error", sys.stderr, end="!\n")
    assert capfd.readouterr() == ("to all\n", "of an error!\n")


def test_a_full_disk_changes_neither_the_work_nor_its_exit_status():
    program = "import sys\nfrom pipeline.progress import tell\ntell('x')\ntell('y', sys.stderr)\nsys.exit(75)\n"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=full)
    assert done.returncode == 75
