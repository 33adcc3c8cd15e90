"""Where the process of a rank begins: `rank.py DIR/work/task.json`, started by a launcher.

Imports next to nothing before the process is tied to its launcher, then does the work of `worker`.
"""

from pipeline.env import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    from pipeline.worker import main

    main()
