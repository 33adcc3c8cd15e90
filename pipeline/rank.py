"""Where the process of a rank begins: `rank.py DIR/work/task.json`, started by a launcher.

Imports next to nothing before it can be asked to stop and is tied to its launcher, then does the work of `worker`.
"""

from pipeline.env import STOP_SIGNALS, StopRequest, adopt_slurm_rank, die_with_parent

if __name__ == "__main__":
    with StopRequest().listening(*STOP_SIGNALS) as stop:
        die_with_parent()
        adopt_slurm_rank()
        from pipeline.worker import main

        main(stop)
