"""The result of a job in one sentence, and in a few large numbers."""

from collections.abc import Sequence

from pipeline.report.entries import Entry, is_corpus
from pipeline.report.numerals import amount, duration, plural

MOST_MODELS = 3  # that have a tile
Tile = tuple[str, str, str]  # what is counted, how much it is, and what to compare it with


def sentence(entries: Sequence[Entry]) -> str:
    """Return what came out of the tasks, as far as there is something of each kind."""
    trained, documents = _trained(entries), _documents(entries)
    models = _models(entries)
    if len(models) > 1:
        return "; ".join(f"{model.name}: {_learned(model)}" + _outcome(model) for model in models) + "."
    results = [text for text in (_bits(entries), _accuracy(entries)) if text]
    if trained:
        told = f": {'; '.join(results)}" if results else _outcome(trained)
        return f"{_learned(trained)}{told}."
    if results:
        text = "; ".join(results)
        return f"{text[0].upper()}{text[1:]}."
    if documents:
        given, kept = documents
        tokens = _tokens(entries)
        became = f" and became {amount(tokens)} tokens" if tokens else ""
        return f"Of {plural(given, 'document')}, {kept:,} were kept{became}."
    return f"{plural(len(entries), 'task')} in {duration(sum(entry.seconds for entry in entries))}."


def tiles(entries: Sequence[Entry]) -> list[Tile]:
    """Return the numbers that matter most, of those that there are."""
    found: list[Tile] = []
    if documents := _documents(entries):
        found.append(("documents", amount(documents[1]), f"of {amount(documents[0])} read"))
    if tokens := _tokens(entries):
        vocabulary = _first(_led_to(entries), "vocab_size")
        note = f"vocabulary {vocabulary.numbers['vocab_size']:,.0f}" if vocabulary else ""
        found.append(("tokens", amount(tokens), note))
    models = _models(entries)
    for model in models[:MOST_MODELS]:
        steps = model.numbers.get("steps")
        label = f"parameters of {model.name}" if len(models) > 1 else "parameters"
        found.append((label, amount(model.numbers["parameters"]), f"{steps:,.0f} steps" if steps else ""))
    if scored := _scored(entries):
        unigram = scored.numbers.get("byte_unigram_bits_per_byte")
        note = f"byte unigram {unigram:.2f}" if unigram is not None else "held-out text"
        found.append(("bits per byte", f"{_bits_per_byte(scored):.2f}", note))
    if tuned := _first(entries, "test_accuracy"):
        found.append(("test accuracy", f"{tuned.numbers['test_accuracy']:.2f}", _rival(tuned)))
    seconds = sum(entry.seconds for entry in entries)
    return [*found, ("in all", duration(seconds), plural(len(entries), "task"))]


def _first(entries: Sequence[Entry], *numbers: str, kind: str | None = None) -> Entry | None:
    """Return the first task with all these numbers, whose artifact is of `kind`."""
    fitting = (entry for entry in entries if kind in (None, entry.artifact.manifest.kind))
    return next((entry for entry in fitting if entry.numbers.keys() >= set(numbers)), None)


def _tokens(entries: Sequence[Entry]) -> float:
    return sum(e.numbers.get("tokens", 0) for e in _led_to(entries) if e.artifact.manifest.kind == "tokens")


def _led_to(entries: Sequence[Entry]) -> Sequence[Entry]:
    """Return the tasks that the first language model was made of, in their order; without a model all."""
    trained = _trained(entries)
    if trained is None:
        return entries
    by_fingerprint = {entry.fingerprint: entry for entry in entries}
    found, open_ends = {trained.fingerprint}, [trained]
    while open_ends:
        for need in open_ends.pop().needs.values():
            if need in by_fingerprint and need not in found:
                found.add(need)
                open_ends.append(by_fingerprint[need])
    return [entry for entry in entries if entry.fingerprint in found]


def _models(entries: Sequence[Entry]) -> list[Entry]:
    """Return the language models that were trained."""
    wanted = {"parameters", "tokens"}
    return [e for e in entries if e.artifact.manifest.kind == "model" and e.numbers.keys() >= wanted]


def _trained(entries: Sequence[Entry]) -> Entry | None:
    return next(iter(_models(entries)), None)


def _learned(model: Entry) -> str:
    return f"{amount(model.numbers['parameters'])} parameters learned {amount(model.numbers['tokens'])} tokens"


def _outcome(model: Entry) -> str:
    """Return the result of a training in its own words, with a comma before it."""
    return f", {model.result}" if model.result else ""


def _scored(entries: Sequence[Entry]) -> Entry | None:
    """Return the evaluation of a language model, or the training that measured itself."""
    return _first(entries, "bits_per_byte") or _first(entries, "validation_bits_per_byte")


def _bits_per_byte(entry: Entry) -> float:
    return entry.numbers.get("bits_per_byte", entry.numbers.get("validation_bits_per_byte", 0.0))


def _documents(entries: Sequence[Entry]) -> tuple[int, int] | None:
    """Return how many documents the first corpus stages were given, and the last ones kept, on the way to a model."""
    corpora = {entry.fingerprint: entry for entry in _led_to(entries) if is_corpus(entry)}
    if not corpora:
        return None
    read_by_another = {need for entry in corpora.values() for need in entry.needs.values()}
    first = [entry for entry in corpora.values() if not corpora.keys() & set(entry.needs.values())]
    last = [entry for entry in corpora.values() if entry.fingerprint not in read_by_another]
    return int(sum(e.numbers["documents_in"] for e in first)), int(sum(e.numbers["documents"] for e in last))


def _bits(entries: Sequence[Entry]) -> str | None:
    scored = _scored(entries)
    if scored is None:
        return None
    unigram = scored.numbers.get("byte_unigram_bits_per_byte")
    rival = f" (byte unigram {unigram:.2f})" if unigram is not None else ""
    return f"{_bits_per_byte(scored):.2f} bits per byte on held-out text{rival}"


def _accuracy(entries: Sequence[Entry]) -> str | None:
    tuned = _first(entries, "test_accuracy")
    if tuned is None:
        return None
    rival = _rival(tuned)
    return f"fine-tuned accuracy {tuned.numbers['test_accuracy']:.2f}" + (f" against {rival}" if rival else "")


def _rival(tuned: Entry) -> str:
    """Return what a fine-tuned classifier is compared with."""
    if "baseline.test_accuracy" in tuned.numbers:
        return f"{tuned.numbers['baseline.test_accuracy']:.2f} from random weights"
    if "majority.test_accuracy" in tuned.numbers:
        return f"{tuned.numbers['majority.test_accuracy']:.2f} for the majority class"
    return ""
