"""Activation checkpointing changes no bit of what is learned, under any ZeRO stage and with shared layers."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import PROJECT

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("recompute_ranks")]


@pytest.mark.parametrize("layout", ["1-1", "2-1", "2-2"])
def test_the_bits_are_those_of_what_keeps_everything(layout):
    arguments = [sys.executable, str(Path(__file__).with_name("recompute_ranks.py")), layout]
    done = subprocess.run(arguments, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
