"""slurm/devcluster: a real SLURM that comes up, survives what it is there to survive, and leaves nothing behind."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from submitted import wait_until

DEVCLUSTER = Path(__file__).parents[2] / "slurm" / "devcluster"


def processes_of(directory: Path) -> list[str]:
    """Whatever runs with this cluster in its environment or on its command line, but for the tests themselves."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if int(process.name) != os.getpid() and str(directory).encode() in text:
            found.append(f"{process.name} {(process / 'cmdline').read_bytes()!r}")
    return found


def test_the_cluster_has_four_idle_nodes_and_four_partitions(cluster):
    assert len(cluster.nodes) == 4
    assert {cluster.node_state(node) for node in cluster.nodes} == {"idle"}
    partitions = cluster.run("sinfo", "-h", "-o", "%P %l").stdout.split("\n")
    assert {"main* infinite", "short 1:00", "low infinite", "high infinite"} <= set(partitions)


def test_up_again_changes_nothing_and_other_settings_are_refused(cluster):
    job_id = cluster.submit("-o", "/dev/null", "--wrap", "sleep 300")
    cluster.wait_for(job_id, "RUNNING")
    assert "up already" in cluster.devcluster("up").stderr
    assert cluster.job(job_id)["JobState"] == "RUNNING"
    refused = cluster.devcluster("up", "--nodes", "2", check=False)
    assert refused.returncode == 1
    assert "it is up with other settings; take it down first" in refused.stderr


def test_env_points_a_shell_to_the_cluster(cluster):
    shell = cluster.run("bash", "-c", f'eval "$({DEVCLUSTER} env --directory {cluster.directory})"; echo $SLURM_CONF')
    assert shell.stdout.strip() == cluster.env["SLURM_CONF"]


def test_a_job_runs_on_two_nodes_that_know_each_other_by_name(cluster, tmp_path):
    script = 'srun bash -c "hostname; getent hosts \\$SLURM_JOB_NODELIST >/dev/null; getent hosts $(hostname)"'
    job_id = cluster.submit("-N2", "-o", str(tmp_path / "out"), "--wrap", script)
    job = cluster.wait_for(job_id, "COMPLETED")
    names = {line for line in (tmp_path / "out").read_text().splitlines() if re.fullmatch(r"[a-z]\d+-\d", line)}
    assert len(names) == int(job["NumNodes"]) == 2
    assert names <= set(cluster.nodes)


def test_more_than_the_cluster_has_is_refused_at_submission(cluster):
    for words in (["-N5"], ["-p", "short", "-t", "5"], ["-c", "64"], ["-p", "nope"]):
        assert cluster.run("sbatch", *words, "--wrap", "true", check=False).returncode == 1, words


def test_a_crash_takes_the_node_down_and_requeues_its_job(cluster, tmp_path):
    script = f"sleep 1000 & echo $! >{tmp_path}/pid-$SLURM_RESTART_COUNT; wait"
    job_id = cluster.submit("--requeue", "-o", str(tmp_path / "out"), "--wrap", script)
    node = cluster.wait_for(job_id, "RUNNING")["NodeList"]
    while not (tmp_path / "pid-").exists() or not (tmp_path / "pid-").read_text():
        time.sleep(0.1)
    child = Path("/proc", (tmp_path / "pid-").read_text().strip())
    assert (child / "cmdline").read_bytes()
    cluster.crash(node)
    assert not child.exists() or not (child / "cmdline").read_bytes()
    cluster.wait_for_node(node, "down")
    job = cluster.wait_for(job_id, "PENDING")
    assert (job["Restarts"], job["Reason"]) == ("1", "BeginTime")
    cluster.start_now(job_id)
    assert cluster.wait_for(job_id, "RUNNING")["NodeList"] != node
    cluster.start(node)
    cluster.wait_for_node(node, "idle")


def test_a_preempted_job_is_queued_again_and_starts_when_it_may(cluster, tmp_path):
    low = cluster.submit("-p", "low", "-N4", "--exclusive", "-o", str(tmp_path / "low"), "--wrap", "sleep 300")
    cluster.wait_for(low, "RUNNING")
    high = cluster.submit("-p", "high", "-N4", "--exclusive", "-o", str(tmp_path / "high"), "--wrap", "sleep 3")
    cluster.wait_for(high, "RUNNING", "COMPLETED")
    cluster.start_now(low)
    job = cluster.wait_for(low, "RUNNING")
    assert job["Restarts"] == "1"
    assert cluster.job(high)["JobState"] == "COMPLETED"


def test_a_controller_that_is_killed_comes_back_with_its_queue(cluster):
    running = cluster.submit("-o", "/dev/null", "--wrap", "sleep 300")
    held = cluster.submit("--hold", "-o", "/dev/null", "--wrap", "true")
    before = cluster.wait_for(running, "RUNNING")
    began = time.time()
    while (cluster.directory / "state/job_state").stat().st_mtime < began:  # SLURM saves every few seconds
        time.sleep(0.1)
    cluster.restart_controller()
    after = cluster.wait_for(running, "RUNNING")
    assert (after["StartTime"], after["Restarts"]) == (before["StartTime"], "0")
    assert cluster.job(held)["Reason"] == "JobHeldUser"


def test_a_cut_cable_leaves_processes_alive_that_the_controller_has_given_up(isolated_cluster, tmp_path):
    beat, pid = tmp_path / "beat", tmp_path / "pid"
    script = f"echo $$ >{pid}; while sleep 0.1; do echo >>{beat}; done"
    job_id = isolated_cluster.submit("--no-requeue", "-o", str(tmp_path / "out"), "--wrap", script)
    node = isolated_cluster.wait_for(job_id, "RUNNING")["NodeList"]
    isolated_cluster.cut(node)
    isolated_cluster.wait_for(job_id, "NODE_FAIL", timeout_s=90)
    size = beat.stat().st_size
    wait_until(lambda: beat.stat().st_size > size, 30)
    isolated_cluster.heal(node)
    isolated_cluster.wait_for_node(node, "idle")
    process = Path("/proc", pid.read_text().strip(), "cmdline")
    wait_until(lambda: not process.exists() or not process.read_bytes(), 30)


def test_two_clusters_run_side_by_side_and_down_leaves_nothing_of_one(cluster, new_cluster, tmp_path):
    other = new_cluster("--nodes", "2", "--conf", "MaxArraySize=5", "--conf", "MinJobAge=77", "--conf", "KillWait=9")
    assert not set(other.nodes) & set(cluster.nodes)
    assert other.run("sbatch", "--array=0-4", "-o", "/dev/null", "--wrap", "sleep 300").returncode == 0
    assert other.run("sbatch", "--array=0-5", "--wrap", "true", check=False).returncode == 1
    settings = other.run("scontrol", "show", "config").stdout
    assert re.search(r"MinJobAge += 77 sec", settings)
    assert re.search(r"KillWait += 9 sec", settings)
    stubborn = other.submit("-o", str(tmp_path / "out"), "--wrap", "trap '' TERM; setsid sleep 1000 & sleep 1000")
    other.wait_for(stubborn, "RUNNING")
    assert processes_of(other.directory)
    other.devcluster("down")
    assert processes_of(other.directory) == []
    other.devcluster("up")
    assert other.run("squeue", "-h").stdout == ""
    other.devcluster("down", "--purge")
    assert processes_of(other.directory) == []
    assert not other.directory.exists()
    assert cluster.node_state(cluster.nodes[0]) == "idle"


def test_a_job_that_takes_more_memory_than_it_asked_for_ends_out_of_memory(new_cluster, tmp_path):
    if not os.access("/sys/fs/cgroup/memory/cgroup.procs", os.W_OK):
        pytest.skip("NOT TESTED against a real SLURM: memory limits need cgroups of version 1")
    limited = new_cluster("--nodes", "1", "--enforce-memory")
    greedy = "exec python3 -c 'print(len(bytearray(600 << 20)))'"
    killed = limited.submit("--mem=100", "-o", str(tmp_path / "killed"), "--wrap", greedy)
    spared = limited.submit("--mem=1000", "-o", str(tmp_path / "spared"), "--wrap", greedy)
    assert limited.wait_for(killed, "OUT_OF_MEMORY")["Reason"] == "OutOfMemory"
    limited.wait_for(spared, "COMPLETED")
    limited.down()


def test_a_line_of_slurm_conf_that_slurm_does_not_know_is_named_and_nothing_stays_up(cluster):
    directory = cluster.directory.with_name(cluster.directory.name + "x")
    words = ["up", "--directory", str(directory), "--port", "15000", "--prefix", "typo-", "--conf", "NoSuchKey=1"]
    refused = cluster.run(str(DEVCLUSTER), *words, check=False)
    assert refused.returncode == 1
    assert "unrecognized key: NoSuchKey" in refused.stderr
    assert processes_of(directory) == []
    cluster.run(str(DEVCLUSTER), "down", "--purge", "--directory", str(directory))


def test_a_port_or_a_prefix_in_use_is_refused(cluster, tmp_path_factory):
    taken = re.search(r"SlurmctldPort=(\d+)", (cluster.directory / "etc/slurm.conf").read_text())[1]
    directory = str(cluster.directory) + "y"
    for words, message in (
        (["--port", taken, "--prefix", "other-"], f"port {taken} is in use; choose another --port"),
        (["--port", "15000", "--prefix", cluster.nodes[0][:-1]], "choose another --prefix"),
    ):
        refused = cluster.run(str(DEVCLUSTER), "up", "--directory", directory, *words, check=False)
        assert refused.returncode == 1
        assert message in refused.stderr
    cluster.run(str(DEVCLUSTER), "down", "--purge", "--directory", directory)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["upp"], 2, "there is no command 'upp'"),
        (["up", "--node", "4"], 2, "there is no option --node"),
        (["up", "--nodes", "four"], 2, "--nodes needs a whole number, not 'four'"),
        (["up", "--nodes"], 2, "--nodes needs a value"),
        (["crash", "n1", "--directory", "/nonexistent"], 1, "there is no cluster in /nonexistent"),
        (["status", "--directory", "/nonexistent"], 1, "no cluster is up in /nonexistent"),
        (["up", "--directory", "/a b"], 1, "slurm.conf cannot name this directory"),
    ],
)
def test_a_wrong_command_line_is_one_clear_line(words, status, message):
    if os.getuid() != 0 and words[0] == "up":
        message = message if status == 2 else "slurm.conf cannot name"
    done = subprocess.run([DEVCLUSTER, *words], capture_output=True, text=True)
    assert done.returncode == status
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_names_every_command():
    text = subprocess.run([DEVCLUSTER, "--help"], capture_output=True, text=True, check=True).stdout
    for command in ("up", "env", "status", "crash", "stop", "start", "cut", "heal", "restart-controller", "down"):
        assert re.search(rf"^  {command} ", text, re.MULTILINE), command


def test_shellcheck_finds_nothing_in_the_scripts():
    if not shutil.which("shellcheck"):
        if os.environ.get("CI") or os.environ.get("PIPELINE_REQUIRE_SLURM") == "1":
            pytest.fail("shellcheck is not installed")
        pytest.skip("NOT TESTED: shellcheck is not installed")
    scripts = [path for path in DEVCLUSTER.parent.iterdir() if path.is_file() and path.read_bytes().startswith(b"#!")]
    assert DEVCLUSTER in scripts
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
