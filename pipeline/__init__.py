"""From raw text to a trained, fine-tuned, evaluated and exported Transformer. Run it as `python -m pipeline --help`."""

__version__ = "0.1.0"
