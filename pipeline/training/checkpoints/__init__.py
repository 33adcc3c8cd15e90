"""Checkpoints of training: our own format, saved while training goes on, read back by any layout of ranks."""
