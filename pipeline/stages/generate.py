"""Continuing prompts with a language model, or filling their masks with an encoder."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from pipeline.artifact import Artifact
from pipeline.errors import ConfigError, Preempted
from pipeline.models.config import AnyModel, EncoderDecoder
from pipeline.models.files import CONFIG_FILE, is_theirs
from pipeline.models.generation.settings import AnyDecoding, FillMask, Sample, Writing, check_decoding
from pipeline.progress import terminal_width
from pipeline.settings import Input
from pipeline.stage import Context, Run, Stage, Stats
from pipeline.stages.finetune import refuse_classifier
from pipeline.stages.loading import load_language_model, model_settings, planned_model
from pipeline.stages.streaming import Stream, visible, write_nowhere, write_terminal
from pipeline.text.prompts import encode_prompt, special_id
from pipeline.text.tokenizers import TOKENIZER, Tokenizer, load

if TYPE_CHECKING:
    from pipeline.models.transformer import Transformer

SAMPLES = "samples.jsonl"
BERTS_FIRST = "[CLS]"  # and ModernBERT's
BATCH_PROMPTS = 32  # prompts that are fed at once, where the settings do not say how many


def _as_list(prompt: object) -> object:
    return [prompt] if isinstance(prompt, str) else prompt


class Generate(Stage):
    """Continues prompts, with a key-value cache; an encoder-decoder answers them, an encoder fills their masks.

    On a terminal the texts can be read while they are made.

    Attributes:
        prompt: One text, or several; each is the beginning of a text, what an encoder-decoder reads, or a whole text
            with masks.
        decoding: How the next token is chosen.
        max_new_tokens: Longest continuation; it ends earlier at the end of a text. Masks take one token each.
        stop: A text, or several: a continuation ends before the first of them.
        special_tokens: Whether the text of a special token in a prompt stands for that token, such as a chat marker, a
            sentinel or [SEP]; else it is ordinary text, as in a corpus. The mask always stands for itself.
        seed: What is drawn follows from it and from the number of the prompt.
    """

    version: ClassVar[int] = 3
    produces: ClassVar[str] = "samples"
    streams: ClassVar[bool] = True

    kind: Literal["generate"] = "generate"
    model: Annotated[str, Input("model")]
    prompt: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
    decoding: AnyDecoding = Sample()
    max_new_tokens: int = Field(default=80, ge=1)
    stop: Annotated[list[Annotated[str, StringConstraints(min_length=1)]], BeforeValidator(_as_list)] = []
    special_tokens: bool = False
    seed: int = Field(default=0, ge=0)

    def check(self, upstream: Mapping[str, Stage], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse classifiers, what the model's family cannot do, and prompts without a mask to fill."""
        yield from refuse_classifier(upstream)
        made_by, decoding = upstream["model"], self.decoding
        if (planned := planned_model(made_by)) is not None:
            yield from check_decoding(decoding, planned)
        if not isinstance(decoding, FillMask):
            return
        for row, prompt in enumerate(self.prompt):
            if decoding.mask_token not in prompt:
                yield f"prompt.{row}", f"there is no {decoding.mask_token} to fill"
        if self.stop:
            yield "stop", "all masks are filled at once, so nothing can be stopped; leave it empty"
        objective = getattr(made_by, "objective", None)
        objective = getattr(objective, "objective", objective)  # of a distillation, that of the student
        trained = getattr(objective, "mask_token", decoding.mask_token)
        if trained != decoding.mask_token:
            yield "decoding.mask_token", f"the model is trained with '{trained}', found '{decoding.mask_token}'"

    def check_inputs(self, inputs: Mapping[str, Artifact], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse what the model cannot do, a mask that its tokenizer lacks, and prompts that it cannot read."""
        from pipeline.models.generation.checks import check_prompts

        if (source := inputs.get("model")) is None:
            return
        config, tokenizer = model_settings(source), load(source.file(TOKENIZER))
        yield from check_decoding(self.decoding, config)
        mask_id = None
        if isinstance(self.decoding, FillMask):
            try:
                mask_id = special_id(tokenizer, self.decoding.mask_token)
            except ConfigError as error:
                yield "decoding.mask_token", str(error)
                return
        _, fed = _encode(self, source, config, tokenizer)
        yield from check_prompts(config, fed, mask_id)

    def disk_bytes(self, input_bytes: int, run: Run) -> int:
        """A small file."""
        return 1 << 20

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return how many prompts there were, and how many tokens were made."""
        prompts, masks = stats["prompts"], stats.get("masks")
        made = f"{stats['new_tokens']} new tokens" if masks is None else f"{masks} mask{'s' * (masks != 1)} filled"
        return f"{prompts} prompt{'s' * (prompts != 1)}", made

    @classmethod
    def show(cls, artifact: Artifact) -> Iterator[str]:
        """Yield the texts, prompt and continuation, or the text without masks and what could stand in their place."""
        for line in artifact.file(SAMPLES).read_text("utf-8").removesuffix("\n").split("\n"):
            yield visible(_told(json.loads(line)))
            yield ""

    def run(self, ctx: Context) -> None:
        """Write one row a prompt to `samples.jsonl`."""
        ctx.refuse(self.check_inputs(ctx.inputs, ctx.settings))
        source = ctx.inputs["model"]
        model, tokenizer = load_language_model(source), load(source.file(TOKENIZER))
        if isinstance(self.decoding, FillMask):
            rows, made = _fill(ctx, self, self.decoding, model, tokenizer)
        else:
            rows, made = _write(ctx, self, self.decoding, model, tokenizer)
        with ctx.output.write(SAMPLES) as path:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        ctx.output.stats |= {"prompts": len(rows), **made}


def _write(
    ctx: Context, stage: Generate, decoding: Writing, model: "Transformer", tokenizer: Tokenizer
) -> tuple[list[dict[str, Any]], Stats]:
    """Return a row for every prompt, and what is counted of all."""
    from pipeline.models.generation.text import Text
    from pipeline.models.generation.writing import generate

    source, answers = ctx.inputs["model"], model.config.kind == "encoder_decoder"
    encoded, prompts = _encode(stage, source, model.config, tokenizer)
    rows: list[dict[str, Any]] = []
    for batch in _batches(ctx, len(prompts)):
        texts = [Text(tokenizer.decode, stage.stop, [] if answers else ids) for ids in encoded[batch]]
        made = generate(
            model,
            prompts[batch],
            decoding,
            max_new_tokens=stage.max_new_tokens,
            end_id=source.stats["end_of_text_id"],
            start_id=_begins_with(source, model.config),
            seed=stage.seed,
            first_row=batch.start,
            texts=texts,
            sees_prompt=_objective(source).get("kind") == "prefix",
            watch=Stream([_opening(prompt, answers) for prompt in stage.prompt[batch]], texts, _terminal(ctx)),
        )
        for prompt, text, ids in zip(stage.prompt[batch], texts, made, strict=True):
            row = {"prompt": prompt, "continuation": text.text, "new_tokens": len(ids)}
            rows.append(row | ({"answer": True} if answers else {}))
    return rows, {"new_tokens": sum(row["new_tokens"] for row in rows)}


def _fill(
    ctx: Context, stage: Generate, settings: FillMask, model: "Transformer", tokenizer: Tokenizer
) -> tuple[list[dict[str, Any]], Stats]:
    """Return a row for every prompt, and what is counted of all."""
    from pipeline.models.generation.filling import fill

    mask_id = special_id(tokenizer, settings.mask_token)
    encoded, framed = _encode(stage, ctx.inputs["model"], model.config, tokenizer)
    rows: list[dict[str, Any]] = []
    for batch in _batches(ctx, len(framed)):
        found = fill(model, framed[batch], mask_id, settings)
        for prompt, ids, masks in zip(stage.prompt[batch], encoded[batch], found, strict=True):
            likeliest = iter(candidates[0][0] for candidates in masks)
            filled = [next(likeliest) if number == mask_id else number for number in ids]
            told = [[{"token": tokenizer.decode([i]), "probability": p} for i, p in each] for each in masks]
            rows.append({"prompt": prompt, "filled": tokenizer.decode(filled), "masks": told})
            _terminal(ctx)(f"{_told(rows[-1])}\n\n")
    return rows, {"masks": sum(len(row["masks"]) for row in rows)}


def _encode(
    stage: Generate, source: Artifact, config: AnyModel, tokenizer: Tokenizer
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the ids of each prompt, and those with what the model reads before and after it."""
    if isinstance(stage.decoding, FillMask):
        mask = stage.decoding.mask_token
        hidden = tokenizer.special_tokens if stage.special_tokens else [mask]
        encoded = [encode_prompt(tokenizer, prompt, hidden, mask) for prompt in stage.prompt]
        before, after = _frame(source, tokenizer)
        return encoded, [
            [*([] if ids[:1] == before else before), *ids, *([] if ids[-1:] == after else after)] for ids in encoded
        ]
    special = tokenizer.special_tokens if stage.special_tokens else ()
    encoded = [encode_prompt(tokenizer, prompt, special) for prompt in stage.prompt]
    # As in training: a text begins after the end of the one before, and what an encoder reads has an end.
    if config.kind == "encoder_decoder":
        return encoded, [[*ids, source.stats["end_of_text_id"]] for ids in encoded]
    return encoded, [[_begins_with(source, config), *ids] for ids in encoded]


def _begins_with(source: Artifact, config: AnyModel) -> int:
    """Return what a decoder reads first: the token that ends a text, and where others made the model what they say."""
    end: int = source.stats["end_of_text_id"]
    if isinstance(config, EncoderDecoder):
        return end if config.decoder_start_id is None else config.decoder_start_id
    if not is_theirs(source.path):
        return end
    first = json.loads(source.file(CONFIG_FILE).read_text("utf-8")).get("bos_token_id")
    return first if isinstance(first, int) else end


def _frame(source: Artifact, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return what comes before and after a whole text, as in the encoder's training."""
    objective = _objective(source)
    first, last = objective.get("first_token"), objective.get("separator")
    if is_theirs(source.path) and BERTS_FIRST in tokenizer.special_tokens:
        first = BERTS_FIRST
    end: int = source.stats["end_of_text_id"]
    before = [] if first is None else [special_id(tokenizer, first)]
    return before, [end if last is None else special_id(tokenizer, last)]


def _objective(source: Artifact) -> Mapping[str, Any]:
    """Return the settings of what a model was trained to do; of a distillation, what the student was."""
    objective: Mapping[str, Any] = source.manifest.stage.get("objective", {})
    inner: Mapping[str, Any] = objective.get("objective", objective)
    return inner


def _batches(ctx: Context, count: int) -> Iterator[slice]:
    size = ctx.settings.microbatch_sequences or BATCH_PROMPTS
    progress = ctx.progress(count, "prompts", show=_terminal(ctx) is write_nowhere)  # elsewhere the texts are shown
    for start in range(0, count, size):
        if ctx.should_stop():
            raise Preempted(f"{ctx.task} after {start} of {count} prompts; it will begin again")
        batch = slice(start, min(start + size, count))
        yield batch
        progress.advance(batch.stop - start)
    progress.close()


def _terminal(ctx: Context) -> Callable[[str], None]:
    """Return what writes to a terminal, or nowhere if nobody reads along."""
    return write_terminal if ctx.rank == 0 and terminal_width() is not None else write_nowhere


def _opening(prompt: str, answers: bool) -> str:
    """Return what comes before a continuation: an answer is no continuation of what is asked."""
    return f"{prompt}\n=> " if answers else prompt


def _told(row: Mapping[str, Any]) -> str:
    """Return a row of `samples.jsonl` as a person reads it."""
    if "masks" not in row:
        return _opening(row["prompt"], row.get("answer", False)) + str(row["continuation"])
    lines = [
        f"  mask {number}: " + ", ".join(f"{c['token']!r} {c['probability']:.3f}" for c in candidates)
        for number, candidates in enumerate(row["masks"], 1)
    ]
    return "\n".join([row["filled"], *lines])
