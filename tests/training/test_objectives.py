"""What all objectives have in common: settings, fixed shapes, purity; and the batches of training."""

import subprocess
import sys

import numpy as np
import pytest
from objective_cases import END, Holder, ids_for, make_row, objective_of

from pipeline.errors import ConfigError
from pipeline.models.config import Decoder, Encoder, EncoderDecoder
from pipeline.settings import Input, decode, encode, marked
from pipeline.text.loader import Loader, Order, Rows
from pipeline.text.mixture import Weights
from pipeline.text.packing import BestFit, Contiguous, Padded, WarmUp
from pipeline.text.stream import TokenStream
from pipeline.text.token_parts import TokenWriter
from pipeline.training.objectives.batch import Examples, count_terms, example_seeds
from pipeline.training.objectives.draws import Draws

SEQ_LEN = 32
MODELS = {
    "decoder": Decoder(),
    "encoder": Encoder(token_types=2, pooler=True),
    "encoder_decoder": EncoderDecoder(),
}
KINDS = {
    "causal": {},
    "prefix": {},
    "fill_in_middle": {"documents_per_row": 2},
    "masked": {"first_token": "[CLS]", "unit": "span"},
    "next_sentence": {},
    "sentence_order": {"unit": "whole_word"},
    "span_corruption": {},
    "denoisers": {},
    "distillation": {"objective": {"kind": "masked"}, "teacher": "@teacher"},
}


@pytest.fixture(params=KINDS)
def objective(request):
    return objective_of(request.param, **KINDS[request.param])


def rows_of(*rows):
    tokens, inputs, documents = (
        np.stack(arrays) for arrays in zip(*((r.tokens, r.inputs, r.documents) for r in rows), strict=True)
    )
    return Rows(inputs, tokens, documents)


def some_rows(length, count=4):
    rng = np.random.default_rng(length)
    rows = []
    for number in range(count):
        size = length - 3 * (number % 2)
        first = int(rng.integers(1, size))
        tokens = rng.integers(400, 1000, size)
        rows.append(make_row([*tokens[: first - 1], END], tokens[first:], length=length))
    return rows


def test_every_example_has_the_same_shapes_whatever_the_row(objective):
    ids, length = ids_for(objective), objective.row_tokens(SEQ_LEN)
    shapes = set()
    for seed, row in enumerate([*some_rows(length), make_row(length=length), make_row([500], length=length)]):
        example = objective.make(row, seed, SEQ_LEN, ids, some_rows(length)[0])
        shapes.add(tuple((name, array.shape, array.dtype.kind) for name, array in sorted(example.items())))
        assert example["ids"].shape == (SEQ_LEN,)
        assert example["ids"].dtype == example["labels"].dtype == np.int64
        assert example["ids"].min() >= 0
        assert example["ids"].max() < ids.vocab_size
    assert len(shapes) == 1


def test_an_example_follows_from_the_row_and_the_seed(objective):
    ids, (row, *others) = ids_for(objective), some_rows(objective.row_tokens(SEQ_LEN))
    kept = [array.copy() for array in (row.tokens, row.inputs, row.documents)]
    first, again = (objective.make(row, 2**64 - 1, SEQ_LEN, ids, others[0]) for _ in range(2))
    assert {name: array.tolist() for name, array in first.items()} == {
        name: array.tolist() for name, array in again.items()
    }
    assert all((a == b).all() for a, b in zip(kept, (row.tokens, row.inputs, row.documents), strict=True))
    if objective.kind != "causal":
        differ = [objective.make(row, seed, SEQ_LEN, ids, others[0]) for seed in range(8)]
        assert len({tuple(each["ids"].tolist() + each["labels"].tolist()) for each in differ}) > 1


def test_random_numbers_are_the_same_on_every_machine():
    """The raw bits of Philox with the key 7, which numpy promises never to change."""
    assert Draws(7).uniform(2).tolist() == [0.8720734548204873, 0.29536538151378355]
    draws, raw = Draws(7), np.random.Philox(key=7).random_raw(8)
    assert draws.uniform(3).tolist() == [(int(bits) >> 11) / 2**53 for bits in raw[:3]]
    assert draws.order(5).tolist() == sorted(range(5), key=lambda place: raw[3 + place])
    numbers = Draws(1).below(10, 10_000)
    assert np.bincount(numbers) == pytest.approx(np.full(10, 1000), abs=120)
    assert np.mean([Draws(seed).chance(0.3) for seed in range(3000)]) == pytest.approx(0.3, abs=0.034)


def test_settings_come_back_as_they_were(objective):
    holder = Holder(objective=objective)
    assert decode(Holder, encode(holder)) == holder
    assert set(objective.families) <= set(MODELS)
    assert set(objective.term_names) <= {"tokens", "sentence", "distill"}


def test_each_trains_its_families_and_refuses_the_others(objective):
    for kind, model in MODELS.items():
        problems = list(objective.check(model, SEQ_LEN))
        assert not problems if kind in objective.families else any(name.endswith("kind") for name, _ in problems)
    if objective.row_tokens(2) < 1:
        assert [name for name, _ in objective.check(MODELS[min(objective.families)], 2)] == ["seq_len"]


def test_distillation_is_what_it_wraps():
    inner = objective_of("next_sentence")
    outer = objective_of("distillation", objective={"kind": "next_sentence"}, teacher="@big")
    assert (outer.families, outer.partner, outer.needs_documents) == (inner.families, True, True)
    assert outer.special_tokens() == inner.special_tokens()
    assert outer.row_tokens(64) == 61
    assert outer.term_names == {"tokens": "masked", "sentence": "next_sentence", "distill": "distill"}
    assert [(place, mark.kinds, value) for place, mark, value in marked(Holder(objective=outer), Input)] == [
        ("objective.teacher", ("model",), "@big")
    ]
    assert [name for name, _ in outer.check(Decoder(), 64)] == ["objective.objective.kind"]
    assert [name for name, _ in outer.check(Encoder(), 64)] == ["model.token_types", "model.pooler"]
    with pytest.raises(ConfigError, match="objective.teacher: missing"):
        objective_of("distillation")
    with pytest.raises(ConfigError, match="objective.objective.kind: no objective is called 'distillation'"):
        objective_of("distillation", objective={"kind": "distillation", "teacher": "@a"}, teacher="@b")


def test_an_unknown_objective_is_named():
    with pytest.raises(ConfigError, match="objective.kind: no objective is called 'mlm'"):
        objective_of("mlm")


def test_settings_load_nothing_heavy():
    code = (
        "import sys, pipeline.training.objectives; print([m for m in ('numpy', 'torch', 'xxhash') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Batches


def make_loader(tmp_path, objective, packing, seq_len=SEQ_LEN, **changes):
    """Two sources whose documents have 1 to 60 tokens."""
    rng, streams = np.random.default_rng(4), {}
    for name, low in (("web", 400), ("code", 700)):
        path = tmp_path / f"{name}.arrow"
        with TokenWriter(path, "uint16") as writer:
            lengths = rng.integers(1, 60, 80)
            values = rng.integers(low, low + 300, lengths.sum())
            values[np.cumsum(lengths) - 1] = END
            writer.add([str(n) for n in range(80)], [name] * 80, values, lengths, lengths, lengths.astype(np.uint64))
        streams[name] = TokenStream([str(path)], [len(values)], end_of_text=END, vocab_size=2000)
    settings = {"mixture": Weights(weights={"web": 2.0, "code": 1.0}), "packing": packing, "batch_rows": 12, "seed": 5}
    order = Order(**settings, seq_len=objective.row_tokens(seq_len), steps=6, **changes)
    return Loader(streams, order)


def examples_of(objective, document_mask=True, seed=5):
    return Examples(objective, ids_for(objective), SEQ_LEN, document_mask, seed)


@pytest.mark.parametrize("packing", [Contiguous(), BestFit(), Padded()], ids=lambda packing: packing.kind)
def test_a_batch_is_the_same_however_it_is_shared(tmp_path, objective, packing):
    loader, examples = make_loader(tmp_path, objective, packing), examples_of(objective)
    whole = examples.read(loader, 2)
    assert {len(array) for array in whole.values()} == {12}
    for shares in (2, 3, 12):
        size = 12 // shares
        parts = [examples.read(loader, 2, slice(rank * size, (rank + 1) * size)) for rank in range(shares)]
        for name, array in whole.items():
            assert (np.concatenate([part[name] for part in parts]) == array).all()
    assert any((array != examples.read(loader, 3)[name]).any() for name, array in whole.items())
    other_seed = examples_of(objective, seed=6).read(loader, 2)
    same = all((array == other_seed[name]).all() for name, array in whole.items())
    assert same == (objective.kind == "causal")


def test_batches_of_causal_examples_are_the_loaders_rows(tmp_path):
    objective = objective_of("causal")
    loader = make_loader(tmp_path, objective, Contiguous())
    rows, example = loader.read(1), examples_of(objective).read(loader, 1)
    assert (example["ids"] == rows.inputs).all()
    assert (example["labels"] == rows.labels).all()
    assert (example["documents"] == rows.documents).all()
    assert set(examples_of(objective, document_mask=False).read(loader, 1)) == {"ids", "labels"}
    assert count_terms(example) == {"labels": 12 * SEQ_LEN, "rows": 12, "sentences": 0}


@pytest.mark.parametrize("document_mask", [True, False])
def test_what_a_causal_row_does_not_fill_is_padding(tmp_path, document_mask):
    objective = objective_of("causal")
    example = examples_of(objective, document_mask).read(make_loader(tmp_path, objective, Padded()), 1)
    gaps = example["labels"] == -100
    assert gaps.any()
    assert (example["documents"][gaps] == -1).all()
    assert (example["documents"][~gaps] >= 0).all()


def test_without_a_document_mask_each_row_is_one_document(tmp_path, objective):
    loader = make_loader(tmp_path, objective, BestFit())
    example = examples_of(objective, document_mask=False).read(loader, 1)
    for name in ("documents", "decoder_documents"):
        assert set(np.unique(example.get(name, 0)).tolist()) <= {-1, 0}
    masked = examples_of(objective).read(loader, 1)
    if objective.needs_documents:  # nothing else changes
        assert all((masked[name] == array).all() for name, array in example.items() if "documents" not in name)


def test_partners_are_from_elsewhere_in_the_same_source(tmp_path):
    objective = objective_of("next_sentence")
    loader = make_loader(tmp_path, objective, Contiguous())
    length, further = objective.row_tokens(SEQ_LEN), set()
    texts = [stream.read(0, stream.num_tokens) for stream in loader.streams]
    for step in range(1, 7):
        samples, partners = loader.samples(step), loader.read_partners(step)
        places = zip(samples.source.tolist(), samples.row.tolist(), partners.labels, strict=True)
        for source, row, labels in places:
            size = loader.sizes[source]
            rows = texts[source][: size * length].reshape(size, length)
            (found,) = np.flatnonzero((rows == labels).all(axis=1))
            assert -(-size // 3) <= (found - row) % size < 2 * -(-size // 3)
            further.add(int(found - row) % size)
        assert (loader.read_partners(step, slice(3, 5)).labels == partners.labels[3:5]).all()
    assert len(further) > 10


def test_terms_are_counted(tmp_path):
    objective = objective_of("next_sentence")
    example = examples_of(objective).read(make_loader(tmp_path, objective, Padded()), 1)
    assert count_terms(example) == {
        "labels": np.count_nonzero(example["labels"] != -100),
        "rows": 12,
        "sentences": np.count_nonzero(example["sentence"] != -100),
    }
    assert set(example["sentence"].tolist()) <= {0, 1, -100}


def test_while_the_length_warms_up_a_sample_has_several_examples(tmp_path):
    objective = objective_of("prefix")
    loader = make_loader(tmp_path, objective, Contiguous(), warmup=[WarmUp(tokens=12 * SEQ_LEN * 2, seq_len=8)])
    examples = examples_of(objective)
    assert examples.read(loader, 1)["ids"].shape == (48, 8)
    assert examples.read(loader, 3)["ids"].shape == (12, SEQ_LEN)
    assert (examples.read(loader, 1, slice(3, 6))["prefix"] == examples.read(loader, 1)["prefix"][12:24]).all()


def test_seeds_are_of_the_sample_and_not_of_the_rank():
    assert example_seeds(1, range(4), 2)[4:] == example_seeds(1, range(2, 4), 2)
    seeds = [seed for run in range(3) for seed in example_seeds(run, range(100), 2)]
    assert len(set(seeds)) == 600
    assert all(0 <= seed < 2**64 for seed in seeds)
