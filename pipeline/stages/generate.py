"""Continuing prompts with a language model."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from pipeline.artifact import Artifact
from pipeline.settings import Input
from pipeline.stage import Context, Run, Stage, Stats
from pipeline.stages.finetune import refuse_classifier
from pipeline.stages.pretrain import load_language_model
from pipeline.text.tokenizers import TOKENIZER, load

SAMPLES = "samples.jsonl"


def _as_list(prompt: object) -> object:
    return [prompt] if isinstance(prompt, str) else prompt


class Generate(Stage):
    """Continues prompts, with a key-value cache.

    Attributes:
        prompt: One text, or several; each is the beginning of a text.
        max_new_tokens: Longest continuation; it ends earlier at the end of a text.
        temperature: Divides the logits before sampling; null always takes the likeliest token (greedy).
        top_k: Sample from the k likeliest tokens only; null from all.
        top_p: Sample from the fewest tokens whose probabilities sum to p only (Holtzman et al. 2020); null from all.
    """

    version: ClassVar[int] = 2
    produces: ClassVar[str] = "samples"

    kind: Literal["generate"] = "generate"
    model: Annotated[str, Input("model")]
    prompt: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
    max_new_tokens: int = Field(default=80, ge=1)
    temperature: float | None = Field(default=0.8, gt=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=0.95, gt=0, le=1)
    seed: int = Field(default=0, ge=0)

    def check(self, upstream: Mapping[str, Stage], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse classifiers."""
        yield from refuse_classifier(upstream)

    def disk_bytes(self, input_bytes: int, run: Run) -> int:
        """A small file."""
        return 1 << 20

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return how many tokens were made."""
        prompts = stats["prompts"]
        return f"{prompts} prompt{'s' if prompts != 1 else ''}", f"{stats['new_tokens']} new tokens"

    @classmethod
    def show(cls, artifact: Artifact) -> Iterator[str]:
        """Yield the texts, prompt and continuation."""
        for line in artifact.file(SAMPLES).read_text("utf-8").removesuffix("\n").split("\n"):
            sample = json.loads(line)
            text = sample["prompt"] + sample["continuation"]
            yield "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
            yield ""

    def run(self, ctx: Context) -> None:
        """Write one row a prompt to `samples.jsonl`."""
        from pipeline.models.generate import generate

        source = ctx.inputs["model"]
        model = load_language_model(source)
        tokenizer = load(source.file(TOKENIZER))
        end_of_text = source.stats["end_of_text_id"]
        # a text begins after the end of the one before, as in training
        ids = [[end_of_text, *tokenizer.encode(prompt)] for prompt in self.prompt]
        made = generate(
            model,
            ids,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop_id=end_of_text,
            seed=self.seed,
        )
        rows = [
            {"prompt": prompt, "continuation": tokenizer.decode(tokens), "new_tokens": len(tokens)}
            for prompt, tokens in zip(self.prompt, made, strict=True)
        ]
        with ctx.output.write(SAMPLES) as path:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        ctx.output.stats |= {"prompts": len(self.prompt), "new_tokens": sum(len(tokens) for tokens in made)}
