"""A tokenizer that others have made, checked and made complete."""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from pipeline.artifact import Artifact
from pipeline.errors import ArtifactError
from pipeline.settings import nearest
from pipeline.stage import Context, Run, Stage, Stats
from pipeline.stages.train_tokenizer import describe, expand_ranges, refuse_bad_tokens, refuse_shared_tokens
from pipeline.text.tokenizer_files import AnyVocabulary, Bytes, Tiktoken
from pipeline.text.tokenizers import END_OF_TEXT, TOKENIZER


class ImportTokenizer(Stage):
    """Takes over a tokenizer: any `tokenizer.json`, the files of GPT-2, BERT and tiktoken, or plain bytes.

    Attributes:
        vocabulary: Where it comes from.
        special_tokens: Tokens that no text contains, such as the chat markers `<|im_start|>` and `<|im_end|>`; those
            that the tokenizer lacks get the next ids. "<extra_id_{0..99}>" is short for a hundred.
        added_tokens: Ordinary tokens that are found in a text before anything else; those it lacks get the next ids.
        end_of_text: The token that ends every document, such as BERT's [SEP]; the tokenizer must have it, or
            special_tokens name it.
    """

    version: ClassVar[int] = 1
    produces: ClassVar[str] = "tokenizer"

    kind: Literal["import_tokenizer"] = "import_tokenizer"
    vocabulary: AnyVocabulary
    special_tokens: list[str] = []
    added_tokens: list[str] = []
    end_of_text: str = Field(default=END_OF_TEXT, min_length=1)

    @field_validator("special_tokens")
    @classmethod
    def _different_once_expanded(cls, tokens: list[str]) -> list[str]:
        return refuse_bad_tokens(expand_ranges(tokens))

    @field_validator("added_tokens")
    @classmethod
    def _no_token_twice(cls, tokens: list[str]) -> list[str]:
        return refuse_bad_tokens(tokens)

    @classmethod
    def headline(cls, stats: Stats) -> tuple[str, str]:
        """Return the size of the vocabulary, and what ends a text."""
        return f"{stats['vocab_size']:,} tokens in the vocabulary", f"{stats['end_of_text']} ends a text"

    def check(self, upstream: Mapping[str, Stage], run: Run) -> Iterator[tuple[str, str]]:
        """Refuse what the settings alone say cannot work."""
        yield from refuse_shared_tokens(self.special_tokens, self.added_tokens)
        if self.end_of_text in self.added_tokens:
            yield "end_of_text", f"'{self.end_of_text}' is an ordinary added token; name it in special_tokens instead"
        fixed = self.vocabulary.special_ids if isinstance(self.vocabulary, Tiktoken) else {}
        if isinstance(self.vocabulary, Bytes | Tiktoken) and self.end_of_text not in {*self.special_tokens, *fixed}:
            yield "end_of_text", f"this vocabulary has no token '{self.end_of_text}'; name it in special_tokens"

    def disk_bytes(self, input_bytes: int, run: Run) -> int:
        """Return room for the largest vocabularies there are."""
        return 32 << 20

    def run(self, ctx: Context) -> None:
        """Read the files, add what is asked for, and write `tokenizer.json`."""
        tokenizer = self.vocabulary.read()
        if tokenizer.data["model"].get("dropout"):
            raise ArtifactError(
                f"{ctx.task}.vocabulary: this tokenizer has BPE dropout, so the ids of a text are random; take dropout "
                "out of its file"
            )
        asked = {*self.special_tokens, *tokenizer.special_tokens}
        if self.end_of_text not in asked and tokenizer.token_id(self.end_of_text) is None:
            raise ArtifactError(
                f"end_of_text: the tokenizer has no token '{self.end_of_text}'"
                f"{nearest(self.end_of_text, list(tokenizer.special_tokens))}; say which one ends a text, or "
                "name a new one in special_tokens too"
            )
        tokenizer.extend(list(dict.fromkeys([*self.special_tokens, self.end_of_text])), self.added_tokens)
        with ctx.output.write(TOKENIZER) as path:
            tokenizer.save(path)
        ctx.output.stats |= describe(tokenizer, self.end_of_text)

    @classmethod
    def show(cls, artifact: Artifact) -> Iterator[str]:
        """Yield the special tokens and their ids."""
        for name, number in artifact.stats.items():
            if name.startswith("special."):
                yield f"{name.removeprefix('special.')}  {number}"
