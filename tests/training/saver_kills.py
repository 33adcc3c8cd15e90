"""Kills a rank at each of its calls to the disk while it saves, and looks what is found afterwards.

`python saver_kills.py DIRECTORY WORLD RANK`: step 2 is saved; then, from that alone, `WORLD` ranks save step 3, of
which rank RANK ends at its first call to the disk, then at its second, and so on until it lives. After each time a line
of JSON says which call that was, whether the rank had handed in its part, which step is found, what was said, what
else is left, and whether the bits are right.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from saving import make, same, train

CALLS = ("open", "write", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "chmod")
KILLED = 9


def rank_of(directory, rank, world, die_at, dies):
    """Save step 3; end at a call to the disk."""
    engine, saver = make(directory, rank, world, every_steps=1, keep=1, attempt="5")
    left = iter(range(die_at))

    def dying(call):
        def counted(*arguments, **named):
            if next(left, None) is None:
                os._exit(KILLED)
            return call(*arguments, **named)

        return counted

    restore(engine, saver, directory)
    if rank == dies:
        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
    train(engine, saver, 3, 3)
    os._exit(0 if saver._writing.error is None else 1)


def restore(engine, saver, directory):
    """Go on from step 2, which one rank saved, without a word to others."""
    from pipeline.training.checkpoints.format import read_index
    from pipeline.training.checkpoints.restore import load
    from pipeline.training.checkpoints.retention import Summary

    checkpoint = directory / "step-00000002"
    ranks, sums = engine.mpu.data, engine.mpu.sum_all
    engine.mpu.sum_all = lambda numbers, device: [number * ranks for number in numbers]  # the others say the same
    load(engine, saver._layouts, engine.mpu, checkpoint, read_index(checkpoint))
    engine.mpu.sum_all = sums
    saver._newest, saver._summaries = 2, {2: Summary(False, None)}


def once(base, directory, world, dies, die_at):
    """Let the ranks save; return whether the one that was to die lived."""
    shutil.copytree(base, directory)
    ranks = {}
    for rank in range(world):
        child = os.fork()
        if not child:
            try:
                rank_of(directory, rank, world, die_at, dies)
            finally:
                os._exit(1)
        ranks[child] = rank
    lived = True
    while ranks:
        child, status = os.wait()
        rank, code = ranks.pop(child), os.waitstatus_to_exitcode(status)
        if code == KILLED:
            assert rank == dies
            lived = False
            for other in ranks:  # as the launcher does
                os.kill(other, signal.SIGKILL)
        else:
            assert code in (0, -signal.SIGKILL), code
    return lived


def save_undisturbed(root):
    """Save step 2 in one directory, and steps 2 and 3 in another."""
    engine, saver = make(root / "base", every_steps=2, keep=1)
    train(engine, saver, 1, 2)
    shutil.copytree(root / "base", root / "whole")
    engine, saver = make(root / "whole", every_steps=1, keep=1)
    saver.restore()
    train(engine, saver, 3, 3)


def main():
    root, world, dies = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    child = os.fork()
    if not child:
        save_undisturbed(root)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    die_at, lived = 0, False
    while not lived:
        directory, log = root / str(die_at), []
        lived = once(root / "base", directory, world, dies, die_at)
        handed_in = any(directory.glob(f"step-00000003.*/rank-{dies:05d}.json"))
        handed_in = handed_in or (directory / "step-00000003").is_dir()
        _, saver = make(directory, seed=1, every_steps=1, keep=1, log=log.append)
        found = saver.restore()
        other = {2: root / "base/step-00000002", 3: root / "whole/step-00000003"}[found.step]
        row = {"die_at": die_at, "lived": lived, "handed_in": handed_in, "found": found.step, "notes": found.notes}
        row["log"] = log
        row["same"] = same(directory / f"step-{found.step:08d}", other)
        row["left"] = sorted(path.name for path in directory.iterdir())
        print(json.dumps(row), flush=True)
        shutil.rmtree(directory)
        die_at += 1


if __name__ == "__main__":
    main()
