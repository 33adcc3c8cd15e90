"""What a training stage leaves: the model, its tokenizer, and the record of how it was trained."""

from collections.abc import Callable
from pathlib import Path

from pipeline.stage import Context
from pipeline.text.tokenizers import TOKENIZER
from pipeline.track import METRICS
from pipeline.training.ledger import LEDGER


def write_model(ctx: Context, tokenizer: Path, save: Callable[[Path], list[str]]) -> None:
    """Put a model, its tokenizer, its metrics and its ledger into the output, each file in one durable step.

    Args:
        save: Writes the model's files into a directory and returns their names.
    """
    with ctx.scratch() as scratch:
        for name in save(scratch):
            with ctx.output.write(name) as path:
                (scratch / name).rename(path)
    with ctx.output.write(TOKENIZER) as path:
        path.write_bytes(tokenizer.read_bytes())
    for name in (METRICS, LEDGER):
        if (ctx.directory / name).exists():
            ctx.output.add(name)
