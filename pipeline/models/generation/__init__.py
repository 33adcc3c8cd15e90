"""Text from trained models: continued, rewritten or filled in. `settings` says how and imports no torch."""
