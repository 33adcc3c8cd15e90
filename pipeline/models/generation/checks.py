"""What a model cannot read."""

from collections.abc import Iterable, Iterator, Sequence

from pipeline.errors import ConfigError
from pipeline.models.config import AnyModel


def check_prompts(
    config: AnyModel, prompts: Sequence[Sequence[int]], mask_id: int | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (setting, problem) for prompts that are empty, too long, or have no mask where there must be one."""
    limit = config.max_seq_len
    for row, prompt in enumerate(prompts):
        if not prompt:
            yield f"prompt.{row}", "empty; begin with at least one id, such as the one that ends documents"
        elif config.kind == "decoder" and len(prompt) >= limit:
            yield f"prompt.{row}", f"{len(prompt)} ids leave no room in the model's {limit} positions; shorten it"
        elif len(prompt) > limit:
            yield f"prompt.{row}", f"{len(prompt)} ids are more than the model's {limit} positions; shorten it"
        if mask_id is not None and mask_id not in prompt:
            yield f"prompt.{row}", "there is no mask to fill"


def refuse(*problems: Iterable[tuple[str, str]]) -> None:
    """Raise one ConfigError with all (setting, problem), if there are any."""
    if lines := [f"{setting}: {problem}" for found in problems for setting, problem in found]:
        raise ConfigError(*lines)
