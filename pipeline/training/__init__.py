"""Training: the loop, its optimizers and schedules, checkpoints."""
