"""Evaluation of a language model on the documents that its pretraining held out."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pipeline.artifact import write_json
from pipeline.errors import ArtifactError
from pipeline.settings import Input
from pipeline.stage import Context, Run, Stage, Stats
from pipeline.stages.finetune import refuse_classifier
from pipeline.stages.pretrain import VALIDATION_ROWS, check_tokenizer, load_language_model
from pipeline.text.corpus import HELD
from pipeline.text.tokenizers import TOKENIZER, load

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.text.stream import TokenStream


class Evaluate(Stage):
    """Held-out loss, perplexity and bits per byte, beside a model that knows only how often each byte occurs.

    The documents are those that the tokens artifact holds out; which, follows from each one's text alone.
    """

    version: ClassVar[int] = 1
    produces: ClassVar[str] = "report"

    kind: Literal["evaluate"] = "evaluate"
    model: Annotated[str, Input("model")]
    tokens: Annotated[str, Input("tokens")]

    def check(self, upstream: Mapping[str, Stage], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse classifiers."""
        yield from refuse_classifier(upstream)

    def disk_bytes(self, input_bytes: int, run: Run) -> int:
        """A small file."""
        return 1 << 20

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return how much was read, and bits per byte beside the byte-unigram model's."""
        amount = f"{stats['documents']:,} documents, {stats['tokens']:,} tokens"
        unigram = stats["byte_unigram_bits_per_byte"]
        return amount, f"{stats['bits_per_byte']:.3f} bits per byte (byte unigram {unigram:.3f})"

    def run(self, ctx: Context) -> None:
        """Score all held-out documents and write `metrics.json`."""
        from pipeline.text.stream import open_stream
        from pipeline.training.metrics import score

        source, tokens = ctx.inputs["model"], ctx.inputs["tokens"]
        check_tokenizer(source, tokens)
        model, settings = load_language_model(source), source.manifest.stage
        if not tokens.parts(HELD):
            raise ArtifactError(
                f"{tokens.place}: holds out no document to evaluate on; tokenize with a larger held_out_fraction"
            )
        held = open_stream(tokens, HELD)
        result = score(
            model,
            held,
            settings["seq_len"],
            VALIDATION_ROWS,
            held.end_of_text,
            document_mask=settings["document_mask"],
        )
        metrics = {
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte(held),
            "byte_unigram_bits_per_byte": _byte_unigram(held, tokens),
            "documents": held.num_documents,
            "tokens": held.num_tokens,
            "bytes": held.num_bytes,
        }
        with ctx.output.write("metrics.json") as path:
            write_json(path, metrics)
        ctx.output.stats |= metrics


def _byte_unigram(held: "TokenStream", tokens: "Artifact") -> float:
    """Return the entropy of single bytes in the held-out text itself: no byte-unigram model can do better on it."""
    tokenizer = load(tokens.file(TOKENIZER))
    counts: Counter[int] = Counter()
    for start, stop in held.documents():
        counts.update(tokenizer.decode(held.read(start, stop - start - 1).tolist()).encode())  # without its last token
    total = counts.total()
    return -sum(n / total * math.log2(n / total) for n in counts.values())
