"""Optimizers. The settings are light; torch is imported when one is built."""

from pipeline.training.optim.settings import (
    Adafactor,
    AdamW,
    AnyOptimizer,
    Lion,
    Muon,
    Optimizer,
    ScheduleFreeAdamW,
)

__all__ = ["Adafactor", "AdamW", "AnyOptimizer", "Lion", "Muon", "Optimizer", "ScheduleFreeAdamW"]
