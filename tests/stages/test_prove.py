"""What a certificate tries, what it refuses and what it says; that it proves and finds faults is in tests/numerics."""

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.launch.local import Local
from pipeline.models.config import Encoder, EncoderDecoder
from pipeline.plan import Command, plan
from pipeline.settings import decode, encode
from pipeline.stage import Parallel
from pipeline.stages.prove import VOCAB_SIZE, Prove
from pipeline.training.certificate.layouts import (
    DEGREES,
    PRECISIONS,
    Layout,
    batch_rows,
    covering,
    possible,
    worlds,
)
from pipeline.training.certificate.trial import Trace, Trial, count_units, train_plainly
from pipeline.training.certificate.verdict import BOUNDS, Row, judge, table, worst_first

RANKS = (1, 2, 3, 4, 6, 8)


def prove(**changes) -> Prove:
    return decode(Prove, {"kind": "prove", **changes}, where="stage")


def pairs(layout):
    return set(combinations(layout.choices.items(), 2))


@pytest.mark.parametrize(("ranks", "precision"), list(product(RANKS, PRECISIONS)))
def test_any_two_choices_that_are_possible_are_tried_together(ranks, precision):
    every = list(possible(ranks, precision, Parallel()))
    chosen = covering(every)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, every))
    assert len(chosen) == len(set(chosen)) <= max(14, len(every) / 2)


@pytest.mark.parametrize("ranks", RANKS)
def test_every_zero_stage_is_tried_on_every_mesh_and_numbers_of_ranks_only_fall(ranks):
    layouts = prove().layouts(Local(ranks=ranks))
    meshes = {(world // t, t) for world in worlds(ranks) for t in DEGREES if world % t == 0}
    for precision, zeros in (("fp64", (0,)), ("fp32", (0, 1, 2, 3)), ("bf16", (1, 2, 3))):
        tried = {(layout.data, layout.tensor, layout.zero) for layout in layouts if layout.precision == precision}
        assert tried == {(*mesh, zero) for mesh in meshes for zero in zeros}
    sizes = [(-layout.world, layout.tensor) for layout in layouts]
    assert sizes == sorted(sizes)


def test_full_tries_all():
    assert len(prove(full=True).layouts(Local(ranks=2))) == sum(
        len(list(possible(2, precision, Parallel()))) for precision in PRECISIONS
    )


def test_what_looks_at_whole_matrices_is_not_offloaded():
    layouts = prove(optimizer={"kind": "muon"}).layouts(Local(ranks=2))
    assert not any(layout.offload for layout in layouts)
    assert any(layout.offload for layout in prove().layouts(Local(ranks=2)))


@pytest.mark.parametrize("ranks", RANKS)
def test_every_layout_can_share_the_batch(ranks):
    rows = batch_rows(ranks)
    for layout in possible(ranks, "fp32", Parallel(), offload=False):
        assert rows % (layout.data * layout.accumulation) == 0


def test_a_layout_says_its_name_and_its_settings():
    layout = Layout("fp32", 2, 1, 2, 2, True, "full", "cpu")
    assert layout.name == "fp32 zero 2, data 1 x tensor 2, accumulation 2, sequence, full recomputation, offload cpu"
    made = layout.parallel(Parallel(zero=1, deepspeed={"a": 1}))
    assert made == Parallel(
        zero=2, tensor=2, sequence=True, activation_checkpointing="full", offload="cpu", deepspeed={"a": 1}
    )


@pytest.mark.parametrize(
    ("changes", "ranks", "problem"),
    [
        (
            {"vocab_size": 61, "vocab_multiple": 1},
            2,
            (
                "model",
                "under tensor parallelism of 2, the padded vocabulary (61) must be a multiple of 2; set",
            ),
        ),
        (
            {"num_kv_heads": 2},
            4,
            ("model", "under tensor parallelism of 4, num_heads (8) and num_kv_heads (2) must"),
        ),
        ({"d_ff": 50}, 8, ("model", "under tensor parallelism of 4, d_ff (50) must be a multiple of 4")),
        ({"max_seq_len": 8}, 1, ("seq_len", "16 is longer than the model's max_seq_len (8)")),
    ],
)
def test_a_model_that_the_ranks_cannot_share_is_refused(changes, ranks, problem):
    found = list(prove(model={**encode(prove().model), **changes}).check({}, Local(ranks=ranks)))
    assert [name for name, _ in found] == [problem[0]]
    assert found[0][1].startswith(problem[1])


def test_a_model_that_nobody_has_to_share_may_have_any_size():
    assert not list(prove(model={**encode(prove().model), "vocab_multiple": 1}).check({}, Local(ranks=1)))
    assert not list(prove().check({}, Local(ranks=8)))


def test_sequences_that_cannot_be_shared_are_refused():
    ((name, problem),) = prove(seq_len=18).check({}, Local(ranks=4))
    assert name == "model"
    assert "sequences of 18 positions cannot be shared by 4 ranks" in problem


def test_a_model_without_a_vocabulary_gets_one_and_dropout_is_tried_apart():
    stage = prove(model={"kind": "decoder", "dropout": 0.1})
    assert stage.settled_model.dropout == 0
    assert stage.model.vocab_size is None
    assert stage.settled_model.vocab_size == VOCAB_SIZE


def test_a_certificate_of_two_ranks_is_none_of_four(tmp_path):
    def fingerprint(**run):
        command = {"stage": {"kind": "prove"}, "run": {"kind": "local", **run}, "root": str(tmp_path)}
        (task,) = plan(decode(Command, command), None)
        return task.fingerprint

    extra = {"zero_optimization": {"overlap_comm": True}}
    found = [fingerprint(ranks=2), fingerprint(ranks=4), fingerprint(ranks=2, parallel={"deepspeed": extra})]
    assert len(set(found)) == 3
    assert fingerprint(ranks=2, threads=1) == found[0]


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ConfigError, match="stage.steps"):
        prove(steps=0)


FAMILIES = {
    "decoder": prove().model,
    "encoder": Encoder(vocab_size=61, d_model=16, num_layers=1, num_heads=4, token_types=2, pooler=True),
    "encoder_decoder": EncoderDecoder(vocab_size=61, d_model=16, num_layers=1, num_heads=4, positions="relative"),
}


def trial(family="decoder", **changes) -> Trial:
    stage = prove()
    settings = {"model": FAMILIES[family], "make": None, "optimizer": stage.optimizer, "seed": 0}
    return Trial(**{**settings, "batch_rows": 8, "seq_len": 16, "clip_norm": 1.8, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_from_examples_whose_rows_differ(family):
    one = trial(family)
    example = one.example(3)
    labels = (example["labels"] != -100).sum(1)
    assert labels[0] == 16
    assert len(set(labels.tolist())) > 2
    assert all(torch.equal(example[name], tensor) for name, tensor in one.example(3).items())
    assert not torch.equal(example["ids"], one.example(4)["ids"])
    assert count_units(example)["labels"] == labels.sum()
    traces = train_plainly(one, [0, 6])
    assert traces[6].losses[-1] < traces[6].losses[0]
    assert all(tensor.dtype == torch.float64 for tensor in traces[6].weights.values())
    moved = [name for name, w in traces[6].weights.items() if not torch.equal(w, traces[0].weights[name])]
    assert moved == list(traces[6].weights)


def test_the_default_training_is_clipped_in_some_steps_only():
    norms = train_plainly(trial(), [24])[24].grad_norms
    assert min(norms) < trial().clip_norm < max(norms)


FIRST = Trace(weights={"a": torch.zeros(2), "b": torch.zeros(2)})
RIGHT = Trace([2.0, 1.0], [1.0, 1.0], {"a": torch.ones(2).double(), "b": torch.ones(2).double()})


def verdict(losses=(2.0, 1.0), norms=(1.0, 1.0), a=(1.0, 1.0), **changes) -> Row:
    weights = {"a": torch.tensor(a), "b": torch.ones(2)}
    trace = Trace(list(losses), list(norms), weights, **changes)
    return judge(Layout("fp32", 1), trace, RIGHT, FIRST, 0.5)


def test_what_is_right_has_no_problem():
    row = verdict(losses=(2.0, 1.0 + BOUNDS["fp32"].loss / 2))
    assert row.problems == ()
    assert row.loss == pytest.approx(BOUNDS["fp32"].loss / 2)
    assert (row.precision, row.seconds) == ("fp32", 0.5)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"losses": (2.0, 1.1)}, "the loss of step 2 is off by 1.0e-01, wanted at most 3e-06"),
        ({"losses": (float("nan"), 1.0)}, "the loss of step 1 is off by inf, wanted at most 3e-06"),
        ({"norms": (1.17, 1.0)}, "the norm of step 1 is off by 1.7e-01, wanted at most 2e-05"),
        ({"a": (1.0, 2.0)}, "'a' is off by 7.1e-01 of what it learned, wanted at most 2e-04"),
        ({"a": (1.0, float("nan"))}, "'a' is off by inf of what it learned, wanted at most 2e-04"),
        ({"a": (1.0, 1.0, 1.0)}, "'a' is off by inf of what it learned, wanted at most 2e-04"),
        ({"apart": ["a", "b"]}, "the ranks' copies of 'a' and 1 more are not the same"),
    ],
)
def test_what_is_further_off_than_rounding_is_said(changes, problem):
    row = verdict(**changes)
    assert row.problems == (problem,)
    assert row.json["problems"] == [problem]
    assert all(value is None or value < 10 for value in (row.json["loss"], row.json["grad_norm"], row.json["weights"]))


def test_a_weight_that_has_nothing_to_learn_must_stay():
    still = Trace([1.0], [1.0], {"a": torch.ones(2).double()})
    assert judge(Layout("fp64", 0), still, still, still, 0.0).problems == ()
    moved = replace(still, weights={"a": torch.ones(2).double() + 1e-9})
    assert judge(Layout("fp64", 0), moved, still, still, 0.0).problems


def test_the_table_has_a_line_for_every_row_and_problem():
    rows = [verdict(), verdict(norms=(1.5, 1.0)), verdict(norms=(9.0, 1.0)), Row("random numbers", 0.1)]
    lines = "\n".join(table(rows)).split("\n")
    assert len(lines) == 1 + len(rows) + 2
    assert lines[3].strip() == "WRONG: the norm of step 1 is off by 5.0e-01, wanted at most 2e-05"
    assert worst_first(rows) == [rows[2], rows[1]]


def test_the_headline_says_how_many_and_how_far():
    amount, result = Prove.headline({"layouts": 60, "ranks": 4, "worst.fp32.weights": 8.3e-6})
    assert amount == "60 layouts on up to 4 ranks"
    assert result == "all like one process: weights at most 8e-06 off in fp32"
