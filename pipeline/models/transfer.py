"""Weights taken over from another model, to go on training with them. Imports no torch."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.models.config import AnyModel
from pipeline.models.weights import weights

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.transformer import Transformer

# What may be there on one side only: heads, which are made for one objective, and segments.
OPTIONAL = ("ahead.", "pooler.", "sentence_head.", "head_transform.", "head_bias", "token_type_embedding.")
VOCABULARY = ("embedding.weight", "head.weight", "head_bias")  # a row for each id, and rows that pad them


def misfits(config: AnyModel, source: AnyModel) -> Iterator[str]:
    """Yield why the weights of a model with the settings `source` are not those of one with the settings `config`.

    They may have other heads, another vocabulary and another padding of it.
    """
    known = {"vocab_size": 1, "vocab_multiple": 1}
    wanted, found = (
        {weight.name: weight.shape for weight in weights(one.model_copy(update=known))} for one in (config, source)
    )
    yield from _differences(wanted, found)


def compare(model: "Transformer", source: "Transformer") -> tuple[list[str], list[str]]:
    """Return the names of what a model has and a source has not, and of what only the source has.

    Both may be on the device "meta".

    Raises:
        ConfigError: If the two differ in more than heads and padding.
    """
    wanted, found = (
        {name: tuple(w.shape[1:] if name in VOCABULARY else w.shape) for name, w in one.state_dict().items()}
        for one in (model, source)
    )
    if problems := list(_differences(wanted, found)):
        raise ConfigError(f"model: {describe_misfits(problems)}")
    return sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())


def take_over(name: str, first: "Tensor", found: "Tensor", num_ids: int) -> "Tensor":
    """Return a weight with the values of a source's.

    Args:
        first: The whole weight with its first values, which is changed.
        num_ids: Of what has a row for each id, so many rows are taken.
    """
    rows = slice(num_ids) if name in VOCABULARY else slice(None)
    first[rows] = found[rows]
    return first


def describe_misfits(problems: list[str]) -> str:
    """Return what is wrong and the way out."""
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"the weights of init_from do not fit ({problems[0]}{more}); leave it null to take the settings of init_from"


def _differences(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name in sorted(wanted.keys() | found.keys()):
        if name in wanted and name in found:
            if wanted[name] != found[name]:
                yield f"'{name}': wanted shape {wanted[name]}, found {found[name]}"
        elif not name.startswith(OPTIONAL):
            yield f"no weight '{name}' in it" if name in wanted else f"no place for its '{name}'"
