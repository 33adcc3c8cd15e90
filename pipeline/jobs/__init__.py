"""Jobs that were started: `status`, `wait`, `logs`, `cancel` and `retry` of them, on SLURM or on this machine."""
