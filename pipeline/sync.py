"""`python -m pipeline sync [JOB | JOB.TASK | DIR …] [--all] [root=DIR]`: brings the numbers of trainings to W&B.

For a login node, where there is a network that compute nodes lack. What is sent is `metrics.jsonl`, which holds every
step once however often the task was begun: into one run, named by the artifact, from the step on that W&B has. A task
may be synced while it runs, as often as one likes.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.artifact import MANIFEST, WORK, write_json
from pipeline.errors import ArtifactError, ConfigError, LaunchError, PipelineError
from pipeline.jobs.words import expand, find, parse
from pipeline.launch.lock import read_owner
from pipeline.perform import read_result
from pipeline.settings import encode
from pipeline.track import METRICS, State, Wandb, read_metrics, upload
from pipeline.worker import read_task

SYNCED = "synced.json"  # in work/: the state that W&B was told, and the last step that it had when it was asked
STOPS = (0, 75, 130)  # exit statuses after which the same command continues


def sync(arguments: Sequence[str]) -> int:
    """Bring all that is named to W&B, or everything under the root; return the exit status.

    Raises:
        ConfigError: If a word is none of its own, or there is no account.
        ArtifactError: If nothing is called so.
        LaunchError: If W&B cannot be reached.
    """
    words = parse("sync", arguments, None, {"--all": bool}, most=len(arguments))
    root, names, every = words.root, words.names, "--all" in words.flags
    directories = list(dict.fromkeys(place.resolve() for place in _places(root, names)))
    status, count = 0, 0
    for directory in directories:
        try:
            count += _sync_one(directory, every)
        except (ConfigError, LaunchError):  # no account, no network: the others would fare no better
            raise
        except PipelineError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            status = error.exit_status
    if not count and not status:
        hint = "" if every else "; --all takes those of other trackers too"
        print(f"nothing to sync: no task of {', '.join(names) or root} has numbers that are for W&B{hint}")
    return status


def _places(root: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield the directories of the tasks that are named, or of all."""
    if not names:
        yield from (path.parent.parent for path in sorted(root.glob(f"*/*/{WORK}/task.json")))
    for name in expand(root, names):
        if (Path(name) / WORK / "task.json").is_file():
            yield Path(name)
            continue
        record, task = find(root, name)
        yield from (Path(one.directory) for one in record.tasks if task in (None, one))


def _sync_one(directory: Path, every: bool) -> bool:
    """Bring the numbers of a task to W&B; return whether it has any that are for W&B.

    Args:
        every: Whether those of other trackers are.
    """
    rows = read_metrics(directory / METRICS)
    if not rows or not (directory / WORK / "task.json").exists():
        return False
    try:
        task = read_task(directory / WORK / "task.json")
    except ConfigError as error:
        raise ArtifactError(f"{error}; made by another version of the pipeline") from None
    if not isinstance(task.tracker, Wandb) and not every:
        return False
    title, state, last = task.title, _state(directory), int(rows[-1]["step"])
    if _known(directory) == (last, "finished"):
        print(f"{title}: W&B has all {last:,} steps")
        return True
    choice = task.tracker if isinstance(task.tracker, Wandb) else Wandb()
    sent, had = upload(choice, directory.name, title, encode(task.stage), rows, state)
    with suppress(OSError):  # of somebody else, who may sync it as well
        write_json(directory / WORK / SYNCED, {"step": had, "state": state})
    print(f"{title}: {sent:,} rows sent, up to step {last:,} ({state})", flush=True)
    return True


def _state(directory: Path) -> State:
    if (directory / MANIFEST).exists():
        return "finished"
    result = read_result(directory)
    failed = result is not None and result["status"] not in STOPS and read_owner(directory) is None
    return "failed" if failed else "unfinished"


def _known(directory: Path) -> tuple[int, str] | None:
    """Return the last step that W&B said it had, and the state that it was told then; null before that."""
    try:
        known = json.loads((directory / WORK / SYNCED).read_text("utf-8"))
        return int(known["step"]), str(known["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
