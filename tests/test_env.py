import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from pipeline.env import (
    Ranks,
    StopRequest,
    adopt_slurm_rank,
    has_accelerator,
    missing_compiler,
    read_ranks,
    reserved_port,
)
from pipeline.errors import Interrupted, Preempted


def test_a_stop_is_remembered_and_handed_on():
    handed = []
    stop = StopRequest()
    stop.hand_on = lambda: handed.append(len(stop.came))
    before = signal.getsignal(signal.SIGUSR2)
    with stop.listening(signal.SIGUSR2, signal.SIGINT):
        assert not stop
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop
    assert stop.came == [signal.SIGUSR2, signal.SIGINT]
    assert handed == [1, 2]
    assert signal.getsignal(signal.SIGUSR2) == before


def test_the_first_signal_gives_the_exit_status():
    stop = StopRequest()
    stop.came = [signal.SIGINT, signal.SIGTERM]
    assert isinstance(stop.error("x"), Interrupted)
    stop.came = [signal.SIGTERM, signal.SIGINT]
    assert type(stop.error("x")) is Preempted


def test_a_signal_that_is_ignored_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        with stop.listening(signal.SIGHUP):
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_ranks_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    ranks = read_ranks()
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (3, 4, 3)


def test_a_rank_dies_with_its_launcher_even_where_orphans_are_adopted():
    """Under a subreaper (as slurmstepd is one) an orphan's parent is not process 1."""
    rank = "import time; from pipeline.env import die_with_parent; time.sleep(0.5); die_with_parent(); time.sleep(60)"
    launcher = (
        "import os, subprocess, sys, time; os.environ['PIPELINE_LAUNCHER'] = str(os.getpid()); "
        f"child = subprocess.Popen([sys.executable, '-c', {rank!r}]); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    reaper = (
        "import ctypes, subprocess, sys, time; ctypes.CDLL(None).prctl(36, 1); "  # PR_SET_CHILD_SUBREAPER
        f"launcher = subprocess.Popen([sys.executable, '-c', {launcher!r}], stdout=subprocess.PIPE, text=True); "
        "print(launcher.stdout.readline().strip(), flush=True); launcher.kill(); launcher.wait(); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", reaper], stdout=subprocess.PIPE, text=True)
    try:
        orphan = int(process.stdout.readline())
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and _runs(orphan):
            time.sleep(0.05)
        assert not _runs(orphan)
    finally:
        process.kill()
        process.communicate()


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_accelerator_that_is_hidden_is_none(monkeypatch):
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not has_accelerator()


def test_a_compiler_is_looked_for(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert missing_compiler().startswith("torch.compile needs a C++ compiler, and there is no 'g++' in the PATH")
    monkeypatch.setenv("CXX", "c++")
    assert missing_compiler() is None


def test_nobody_else_gets_a_reserved_port_and_rank_0_can_listen_on_it():
    with reserved_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))  # as a process would that wants this very port
        with socket.socket() as rank:
            rank.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            rank.bind(("", port))
            rank.listen()
            socket.create_connection(("127.0.0.1", port)).close()


@pytest.mark.slow
def test_the_store_of_torch_can_listen_on_a_reserved_port():
    from torch.distributed import TCPStore

    with reserved_port() as port:
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        store.set("a", "b")
        assert store.get("a") == b"b"


def test_a_rank_of_srun_takes_its_number_from_slurm(monkeypatch):
    for name, value in (("SLURM_PROCID", "2"), ("SLURM_LOCALID", "1"), ("WORLD_SIZE", "8"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "0")
    adopt_slurm_rank()
    assert read_ranks() == Ranks(0, 8, 0)  # a process in an allocation that srun did not start
    monkeypatch.setenv("PIPELINE_FIRST_RANK", "4")
    adopt_slurm_rank()
    assert read_ranks() == Ranks(6, 8, 1)
