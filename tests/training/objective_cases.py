"""Small vocabularies, rows and settings that the tests of objectives share."""

import numpy as np

from pipeline.settings import Settings, decode
from pipeline.training.objectives import AnyObjective, Row, SpecialIds

END = 0


class Holder(Settings):
    objective: AnyObjective


def objective_of(kind, **settings):
    return decode(Holder, {"objective": {"kind": kind, **settings}}).objective


def make_ids(names, num_ordinary, continues=(), breaks=()):
    """The end of text is 0, then come the special tokens, then ordinary ones."""
    numbers = {name: 1 + place for place, name in enumerate(names)}
    size = 1 + len(names) + num_ordinary
    special = np.arange(size) <= len(names)
    return SpecialIds(
        numbers, END, size, special, np.isin(np.arange(size), continues), np.isin(np.arange(size), breaks)
    )


def ids_for(objective, num_ordinary=1000, **more):
    return make_ids(objective.special_tokens(), num_ordinary, **more)


def make_row(*documents, length=None, before=END):
    """A row of documents, each a list of tokens; what is behind them up to `length` is empty, as the loader has it."""
    tokens = np.concatenate([np.asarray(document, np.int64) for document in documents] or [np.empty(0, np.int64)])
    inputs = np.concatenate([[before], tokens[:-1]])[: len(tokens)].astype(np.int64)
    numbers = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    gap = (length or len(tokens)) - len(tokens)
    return Row(
        np.concatenate([tokens, np.full(gap, -100)]),
        np.concatenate([inputs, np.full(gap, END)]),
        np.concatenate([numbers, len(documents) + np.arange(gap)]).astype(np.int32),
    )


def random_documents(rng, first, count, longest, closed=True):
    """Documents of ordinary tokens from `first` on, which all differ; each ends with the end of text."""
    found = []
    for _ in range(count):
        size = int(rng.integers(1, longest + 1))
        found.append([*range(first, first + size), *([END] if closed else [])])
        first += size
    return found
