"""Parallelism: the arithmetic of ranks, and the only door to DeepSpeed's engine."""
