"""What `status` says of jobs that ended without a word and that the controller has forgotten: with sacct, and without.

Such are known to the accounting database alone. The cluster is called by its name in SLURM_CLUSTERS all along, as on
sites whose module sets that.
"""

import json
import os
import re
import shutil

import pytest
from submitted import wait_until
from support import run_command, run_pipeline

NEEDED = ("slurmdbd", "mariadbd")
MISSING = (
    "NOT TESTED against a real SLURM: there is no accounting. As root on Debian: apt-get install slurmdbd "
    "slurm-wlm-mysql-plugin mariadb-server-core mariadb-client-core"
)
FORGETS = ("--nodes", "2", "--enforce-memory", "--accounting", "--conf", "MinJobAge=2")  # it looks every ten seconds
FILE = "{path: tests/data/mini.jsonl}"
WITHOUT_A_WORD = "run.setup=['kill -KILL $$']"
HELD = "run.flags=[--hold]"
TOO_MUCH = "run.setup=['head --bytes=300M /dev/zero | tail --bytes=300M >/dev/null']"
HUNGRY = (TOO_MUCH, "run.data.memory_per_node=50M")
WITH_SACCT = {
    "cancelled.shard": ("cancelled", {"cancelled": 3}, ""),
    "element.shard": ("cancelled", {"done": 2, "cancelled": 1}, ""),
    "half.shard": ("waiting", {"failed": 1, "waiting": 2}, ".*"),
    "hungry.shard": ("failed", {}, "out of memory: .*"),
    "killed.shard": ("failed", {}, "it left no reason; see its logs"),
    "killed.clean": ("cancelled", {}, "waited for shard, which failed: it left no reason; see its logs"),
}
WITHOUT = {  # that they never wrote a thing is all that can be known
    "cancelled.shard": ("never started", {"never started": 3}, ""),
    "element.shard": ("never started", {"done": 2, "never started": 1}, ""),
    "half.shard": ("waiting", {"cancelled": 1, "waiting": 2}, ".*"),  # as of most that have left no trace
    "hungry.shard": ("never started", {}, ""),
    "killed.shard": ("never started", {}, ""),
    "killed.clean": ("never started", {}, "waited for shard, which never started"),
}


@pytest.fixture(scope="module")
def accounted(new_cluster):
    """A cluster with a database, whose controller forgets jobs within seconds."""
    if not all(shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for command in NEEDED):
        if os.environ.get("CI") or os.environ.get("PIPELINE_REQUIRE_SLURM") == "1":
            pytest.fail(MISSING)
        pytest.skip(MISSING)
    cluster = new_cluster(*FORGETS)
    cluster.env["SLURM_CLUSTERS"] = name = cluster.run(
        "sacctmgr", "-nP", "list", "cluster", "format=cluster"
    ).stdout.strip()
    yield cluster, name
    cluster.down()


def submit(cluster, root, name, *words, status=0, **variables):
    """Submit a job of its own; return the id of its first SLURM job."""
    known = f"root={root}", f"name={name}", "run=slurm", "run.threads=1"
    done = run_pipeline(*words, *known, status=status, **{**cluster.env, **variables})
    if status:
        return done.stderr
    return json.loads((root / f"jobs/{name}/job.json").read_text())["tasks"][0]["slurm"]


def shard(part_bytes):
    return "stage=shard", f"stage.sources=[{FILE}]", f"stage.part_bytes={part_bytes}", "run.array=3"


def judged(cluster, root, **variables):
    """What `status` says of each task: its state, that of the elements, and why."""
    found = json.loads(run_command("status", "--json", f"root={root}", **{**cluster.env, **variables}).stdout)
    assert {job["problem"] for job in found} == {""}
    tasks = {f"{job['job']}.{task['name']}": task for job in found for task in job["tasks"]}
    return {name: (task["state"], task["elements"], task["error"]) for name, task in tasks.items()}


def agree(found, wanted):
    assert found.keys() == wanted.keys()
    for name, (state, elements, error) in wanted.items():
        assert found[name][:2] == (state, elements), found
        assert re.fullmatch(error, found[name][2]), found


def test_what_the_controller_has_forgotten_sacct_tells_and_without_it_the_directories_do(accounted, tmp_path):
    cluster, name = accounted
    root = tmp_path / "artifacts"
    cancelled = submit(cluster, root, "cancelled", *shard(50_001), HELD)
    cluster.scancel(cancelled)
    element = submit(cluster, root, "element", *shard(50_002), HELD)
    cluster.scancel(f"{element}_1")
    cluster.run("scontrol", "release", element)
    half = submit(cluster, root, "half", *shard(50_003), HELD, WITHOUT_A_WORD)
    cluster.run("scontrol", "release", f"{half}_0")
    submit(cluster, root, "hungry", *shard(50_004), "run.array=1", *HUNGRY)
    others = [f"~tasks.{task}" for task in ("dedup", "train_tokenizer", "tokenize", "pretrain", "finetune", "report")]
    others += [f"~tasks.{task}" for task in ("evaluate", "generate", "export")]
    submit(cluster, root, "killed", "job=tiny", "run.array=1", *others, WITHOUT_A_WORD)

    said = submit(cluster, root, "astray", *shard(50_005), status=4, SLURM_CLUSTERS=f"{name},other")
    assert f"SLURM_CLUSTERS={name},other: wanted no other cluster than that of this machine, '{name}'" in said
    assert not (root / "jobs/astray").exists()

    def is_forgotten():
        known = cluster.run("squeue", "--noheader", "--array", "--states=all", "--format=%i").stdout.split()
        states = cluster.run("sacct", "--noheader", "--allocations", "--format=State").stdout.split()
        return known == [f"{half}_1", f"{half}_2"] and not {"PENDING", "RUNNING"} & set(states)  # held ones are neither

    wait_until(is_forgotten, 180, lambda: cluster.run("squeue", "--states=all").stdout)
    agree(judged(cluster, root), WITH_SACCT)
    # neither what a person likes to see nor the cluster that is asked as a rule changes that
    agree(judged(cluster, root, SQUEUE_PARTITION="low", SLURM_CLUSTERS="other"), WITH_SACCT)
    without = tmp_path / "bin"
    without.mkdir()
    for command in ("squeue", "scontrol"):
        (without / command).symlink_to(shutil.which(command))
    agree(judged(cluster, root, PATH=str(without)), WITHOUT)
