"""A corpus as tokens: memory-mapped streams of ids, one row a document; held-out documents in files of their own."""

import json
import shutil
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.artifact import WORK, Artifact
from pipeline.errors import ArtifactError
from pipeline.settings import Input, nearest
from pipeline.stage import PARTIAL, Context, Run, Stage, Stats
from pipeline.stages.train_tokenizer import TrainTokenizer
from pipeline.text.arrow import sample_texts
from pipeline.text.corpus import HELD, check_books
from pipeline.text.tokenizers import END_OF_TEXT, TOKENIZER, Tokenizer, load

VOCABULARY = "vocabulary.json"
SAMPLE_PARTS, SAMPLE_TEXTS, SAMPLE_CHARS = 3, 16, 2000  # what the engine is proven on
PART_TOKENS = "part_tokens."


class Tokenize(Stage):
    """Encodes every document and ends it with the end-of-text token. The tokenizer is copied beside the tokens.

    Attributes:
        end_of_text: The token that ends a document, an id that no text is encoded to; null is the one that the
            tokenizer's own stage names.
        held_out_fraction: Share of the documents that are kept from training, chosen by their text alone.
    """

    version: ClassVar[int] = 2
    produces: ClassVar[str] = "tokens"
    ranks: ClassVar[Literal["one", "units", "group"]] = "units"

    kind: Literal["tokenize"] = "tokenize"
    corpus: Annotated[str, Input("corpus")]
    tokenizer: Annotated[str, Input("tokenizer", "export")]
    end_of_text: str | None = Field(default=None, min_length=1)
    held_out_fraction: float = Field(default=0.02, ge=0, lt=1)

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return the number of tokens, and bytes per token."""
        return f"{stats['tokens']:,} tokens", f"{stats['bytes_per_token']:.2f} bytes a token"

    def check(self, upstream: Mapping[str, Stage], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse an end-of-text token that the tokenizer will not have."""
        maker = upstream["tokenizer"]
        if isinstance(maker, TrainTokenizer) and self.end_of_text not in (None, *maker.special_tokens):
            known = nearest(str(self.end_of_text), maker.special_tokens)
            yield "end_of_text", f"the tokenizer has no special token '{self.end_of_text}'{known}"

    def check_inputs(self, inputs: Mapping[str, Artifact], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse an end-of-text token that the tokenizer does not have."""
        maker = inputs.get("tokenizer")
        if maker is None or f"special.{self._end_name(maker)}" in maker.stats:
            return
        tokenizer = load(maker.file(TOKENIZER))
        if tokenizer.token_id(self._end_name(maker)) is None:
            known = nearest(self._end_name(maker), list(tokenizer.special_tokens))
            yield "end_of_text", f"{maker.path / TOKENIZER} has no token '{self._end_name(maker)}'{known}"

    def run(self, ctx: Context) -> None:
        """Encode this rank's parts."""
        from pipeline.text.encoding import Encoder, PartEncoder
        from pipeline.text.engine import choose_engine
        from pipeline.text.token_parts import keep_memory

        ctx.refuse(self.check_inputs(ctx.inputs, ctx.settings))
        keep_memory()
        corpus, maker = ctx.inputs["corpus"], ctx.inputs["tokenizer"]
        source = maker.file(TOKENIZER)
        tokenizer = load(source)
        end = self._end_id(tokenizer, maker)
        if ctx.rank == 0:
            with ctx.output.write(TOKENIZER) as path:
                shutil.copyfile(source, path)
        engine = choose_engine(tokenizer, sample_corpus(corpus))
        ctx.log(f"encoding with {engine.name}" + (f": {engine.why}" if engine.why else ""))
        ctx.output.stats["engine"] = engine.name
        encoder = Encoder(tokenizer, engine, end, self.held_out_fraction)
        directory = ctx.directory / WORK / PARTIAL
        for unit in ctx.units(corpus.parts(), "parts"):
            files = PartEncoder(encoder, corpus.proven_file(unit.name), directory).run(ctx.should_stop)
            for name, written in files.items():
                with unit.write(name, written.file) as path:
                    (directory / name).replace(path)
                for total in ("", "held_out.") if name.startswith(HELD) else ("",):
                    unit.stats[f"{total}documents"] += written.documents
                    unit.stats[f"{total}tokens"] += written.tokens
                    unit.stats[f"{total}bytes"] += written.bytes
                unit.stats["documents_in"] += written.documents
                unit.stats[PART_TOKENS + name] = written.tokens

    def finish(self, ctx: Context, stats: Stats) -> Stats:
        """Check that every document is there, and say what the tokens are and how the tokenizer fared."""
        from pipeline.text.encoding import read_tally
        from pipeline.text.vocabulary import describe, headline

        check_books(ctx, stats, ctx.inputs["corpus"].stats["documents"])
        held = {f"held_out.{name}": stats.pop(f"held_out.{name}", 0) for name in ("documents", "tokens", "bytes")}
        if held["held_out.documents"] == stats["documents"]:
            raise ArtifactError(
                f"{ctx.task}: all {stats['documents']:,} documents are held out, so there are none to train on; "
                f"held_out_fraction is {self.held_out_fraction}: lower it, or read more text"
            )
        maker = ctx.inputs["tokenizer"]
        tokenizer = load(maker.file(TOKENIZER))
        end, special = self._end_id(tokenizer, maker), list(tokenizer.special_tokens.values())
        tally = read_tally(ctx.directory / WORK / PARTIAL, tokenizer.vocab_size)
        if int(tally.counts.sum()) != stats["tokens"]:
            raise ArtifactError(
                f"{ctx.directory}: {stats['tokens']:,} tokens were written and {int(tally.counts.sum()):,} counted; "
                "delete this directory and run again"
            )
        numbers = headline(tally, special)
        exact = numbers["round_trip_fraction"]
        if exact < 1:
            ctx.log(
                f"decoding gives back {100 * exact:.0f} % of the sampled texts; bits per byte, which "
                "counts the bytes of the texts, flatters a model of such tokens"
            )
        with ctx.output.write(VOCABULARY) as path:
            path.write_text(json.dumps(describe(tally, special, tokenizer.decode), ensure_ascii=False), "utf-8")
        parts = {name: stats.pop(name) for name in sorted(stats) if name.startswith(PART_TOKENS)}
        return {
            **stats,
            **held,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text_id": end,
            "max_token_id": int(tally.counts.nonzero()[0][-1]),
            "dtype": tokenizer.dtype,
            "bytes_per_token": stats["bytes"] / stats["tokens"],
            **numbers,
            "part_tokens": {name.removeprefix(PART_TOKENS): count for name, count in parts.items()},
        }

    def verify(self, artifact: Artifact, inputs: Mapping[str, Artifact]) -> Iterator[str]:
        """Count again, encode the corpus again with the plain library, and yield what is not what was stored."""
        from pipeline.text.encoding import compare_part, count_again

        tokenizer = load(artifact.file(TOKENIZER))
        for name, found in {**count_again(artifact), "vocab_size": tokenizer.vocab_size}.items():
            if artifact.stats.get(name) != found:
                yield f"manifest.json: {name} is {artifact.stats.get(name)}, but its files have {found}"
        corpus = inputs.get("corpus")
        if corpus is None:
            return
        end = artifact.stats["end_of_text_id"]
        for name in corpus.parts():
            yield from compare_part(artifact, corpus.file(name), tokenizer, end, self.held_out_fraction)

    def _end_id(self, tokenizer: Tokenizer, maker: Artifact) -> int:
        """Return the id that ends a document; `maker` is the artifact of the tokenizer."""
        number = tokenizer.token_id(self._end_name(maker))
        assert number is not None
        return number

    def _end_name(self, maker: Artifact) -> str:
        """Return the token that ends a document; `maker` is the artifact of the tokenizer."""
        name: str = self.end_of_text or maker.stats.get("end_of_text", END_OF_TEXT)
        return name


def sample_corpus(corpus: Artifact) -> list[str]:
    """Return some texts from all over the corpus; the same on every rank."""
    parts = corpus.parts()
    chosen = dict.fromkeys(parts[number * len(parts) // SAMPLE_PARTS] for number in range(SAMPLE_PARTS))
    return [text[:SAMPLE_CHARS] for name in chosen for text in sample_texts(corpus.proven_file(name), SAMPLE_TEXTS)]
