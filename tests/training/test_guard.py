import json
import math
import random
import statistics

import pytest

from pipeline.errors import ConfigError, TrainingError
from pipeline.settings import decode, encode
from pipeline.training.guard import Finding, Guard, Watch, decide
from pipeline.training.ledger import Event

WINDOW = 16


def calm(seed=0, steps=WINDOW):
    """Losses and norms of steps of which none stands out."""
    chooser = random.Random(seed)
    return [(3.0 + chooser.gauss(0, 0.05), math.exp(chooser.gauss(0, 0.15))) for _ in range(steps)]


def watching(guard=None, steps=WINDOW):
    watch = Watch(guard or Guard(window=WINDOW))
    for step, (loss, norm) in enumerate(calm(steps=steps), 1):
        assert watch.judge(step, loss, norm) is None
    return watch


def event(step, policy="skip", back=None, skipped=None):
    return Event(
        step=step,
        reason="",
        loss=None,
        grad_norm=None,
        z=None,
        policy=policy,
        rolled_back_to=back,
        skipped=skipped or [step],
    )


def found(step):
    return Finding(step, "the loss is nan", math.nan, math.inf)


@pytest.mark.parametrize("steps", [0, 3, WINDOW])
@pytest.mark.parametrize(
    ("loss", "norm", "words"),
    [
        (math.nan, 1.0, "the loss is nan"),
        (math.inf, math.inf, "the loss is inf"),
        (3.0, math.inf, "the gradient is not finite"),
        (3.0, math.nan, "the gradient is not finite"),
    ],
)
def test_what_is_not_finite_is_found_at_every_step(steps, loss, norm, words):
    watch = watching(steps=steps)
    assert watch.judge(steps + 1, loss, norm) == Finding(
        steps + 1, words, pytest.approx(loss, nan_ok=True), pytest.approx(norm, nan_ok=True)
    )


@pytest.mark.parametrize(("scale", "is_found"), [(None, True), (65536.0, False), (2.0, False), (1.0, True)])
def test_an_overflow_is_none_as_long_as_the_scale_of_the_loss_can_fall(scale, is_found):
    watch = watching()
    before = watch.state()
    assert (watch.judge(17, 3.0, math.inf, scale) is not None) == is_found
    assert watch.state() == before
    assert watch.judge(17, math.nan, math.inf, scale) is not None  # of a loss in fp32 no scale is the cause


def test_a_spike_is_found_in_the_loss_and_in_the_norm_and_is_not_remembered():
    watch = watching()
    before = watch.state()
    loss, norm = watch.judge(17, 9.0, 1.0), watch.judge(17, 3.0, 500.0)
    assert "the loss is 9, against 2.98 before" in loss.reason
    assert "the norm of the gradient is 500, against 0.957 before" in norm.reason
    assert loss.z > 15
    assert norm.z > 15
    assert watch.state() == before
    assert watch.judge(17, 1.0, 0.01) is None  # a fall is none


def test_a_norm_is_judged_once_the_window_is_full_and_a_loss_from_the_second_step_on():
    assert watching(steps=WINDOW - 1).judge(WINDOW, 3.0, 500.0) is None
    assert watching().judge(WINDOW + 1, 3.0, 500.0) is not None
    assert watching(steps=0).judge(1, 9.0, 500.0) is None
    watch = watching(steps=0)
    assert watch.judge(1, 8.33, 0.5) is None
    assert "the loss is 2.683e+06, against 8.33 before" in watch.judge(2, 2682542.5, 5e7).reason
    assert watch.judge(2, 10.0, 5.0) is None  # it may rise a little at first


def test_the_z_score_is_that_of_the_median_and_its_absolute_deviation():
    watch, losses = watching(), [loss for loss, _ in calm()]
    middle = statistics.median(losses)
    deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in losses)
    assert deviation > 0.02 * middle  # the floor
    assert watch.judge(17, 9.0, 1.0).z == pytest.approx((9.0 - middle) / deviation, rel=1e-12)


def test_losses_that_hardly_differ_do_not_make_every_change_a_spike():
    watch = Watch(Guard(window=8, threshold=15))
    for step in range(1, 9):
        watch.judge(step, 0.001, 1.0)
    assert watch.judge(9, 0.2, 3.0) is None
    assert watch.judge(9, 0.4, 3.0) is not None
    assert watch.judge(9, 0.001, 5.0) is not None


def test_a_spike_after_the_window_has_moved_on_is_judged_by_the_new_height():
    watch = watching()
    for step in range(17, 60):
        assert watch.judge(step, max(1.0, 3.0 - (step - 16) * 0.1), 1.0) is None
    assert watch.judge(60, 3.0, 1.0) is not None  # what was usual at first


def test_a_watch_goes_on_exactly_where_its_state_was_taken():
    watch, other = watching(), Watch(Guard(window=WINDOW))
    other.judge(1, 7.0, 7.0)
    other.restore(json.loads(json.dumps(watch.state())))
    for step, (loss, norm) in enumerate(calm(seed=1, steps=40), 17):
        bad = step % 7 == 0
        judged = [one.judge(step, loss + 9 * bad, norm) for one in (watch, other)]
        assert judged[0] == judged[1]
        assert (judged[0] is not None) == bad
    assert watch.state() == other.state()
    other.restore({})
    assert other.state() == {"losses": [], "norms": []}


def test_fail_raises_with_a_way_out():
    with pytest.raises(
        TrainingError, match=r"^train: step 7: the loss is nan; .*python -m pipeline trace.*optimizer.lr"
    ):
        decide(Guard(policy="fail"), [], found(7), 4, "train: ")


def test_a_run_that_ends_by_a_spike_is_told_of_the_threshold():
    with pytest.raises(TrainingError, match="a higher guard.threshold lets such a step through"):
        decide(Guard(policy="fail"), [], Finding(7, "the loss is 9", 9.0, 1.0, 31.0), 4)


def test_skip_passes_over_the_bad_step_alone():
    made = decide(Guard(policy="skip"), [], found(7), 4)
    assert (made.policy, made.rolled_back_to, made.skipped) == ("skip", None, [7])
    assert (made.loss, made.grad_norm) == (None, None)
    assert decide(Guard(policy="skip"), [], Finding(7, "", 9.0, 2.0, 31.0), None).z == 31.0


@pytest.mark.parametrize(
    ("checkpoint", "batches", "skipped"),
    [(4, 1, [7]), (4, 2, [6, 7]), (4, 8, [5, 6, 7]), (6, 8, [7]), (0, 8, [1, 2, 3, 4, 5, 6, 7])],
)
def test_a_rollback_passes_over_the_batches_since_the_checkpoint_up_to_the_bad_one(checkpoint, batches, skipped):
    made = decide(Guard(policy="rollback", skip_batches=batches), [], found(7), checkpoint)
    assert (made.policy, made.rolled_back_to, made.skipped) == ("rollback", checkpoint, skipped)


def test_a_rollback_names_only_steps_that_were_not_passed_over_before():
    made = decide(Guard(skip_batches=4), [event(6, "rollback", 4, [5, 6])], found(7), 4)
    assert made.skipped == [7]
    assert made.rolled_back_to == 4


def test_a_rollback_without_a_checkpoint_is_a_skip():
    made = decide(Guard(policy="rollback"), [], found(7), None)
    assert (made.policy, made.rolled_back_to, made.skipped) == ("skip", None, [7])


def test_skips_in_a_row_are_bounded():
    guard = Guard(policy="skip", max_in_a_row=2)
    assert decide(guard, [event(5), event(6)][1:], found(7), None).skipped == [7]
    with pytest.raises(TrainingError, match="after 2 such steps in a row"):
        decide(guard, [event(5), event(6)], found(7), None)
    assert decide(guard, [event(4), event(5)], found(7), None).skipped == [7]  # step 6 was trained


def test_rollbacks_in_a_row_are_bounded_until_a_checkpoint_lies_beyond():
    guard = Guard(policy="rollback", max_in_a_row=2)
    before = [event(15, "rollback", 10), event(17, "rollback", 10)]
    with pytest.raises(TrainingError, match="after 2 such steps in a row"):
        decide(guard, before, found(19), 10)
    assert decide(guard, before, found(25), 20).rolled_back_to == 20
    assert decide(guard, before[:1], found(19), 10).rolled_back_to == 10


def test_a_checkpoint_of_nothing_but_passed_steps_is_not_one_beyond():
    guard = Guard(policy="rollback", max_in_a_row=2)
    before = [event(11, "rollback", 10), event(12, "rollback", 11)]
    with pytest.raises(TrainingError, match="after 2 such steps in a row"):
        decide(guard, before, found(13), 12)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"policy": "ignore"}, "guard.policy: wanted 'fail', 'skip' or 'rollback', found 'ignore'"),
        ({"window": 4}, "guard.window: wanted"),
        ({"threshold": 0.0}, "guard.threshold: wanted"),
        ({"skip_batches": 0}, "guard.skip_batches: wanted"),
        ({"max_in_a_row": 0}, "guard.max_in_a_row: wanted"),
    ],
)
def test_settings_that_make_no_sense_are_refused(data, words):
    with pytest.raises(ConfigError, match=words):
        decode(Guard, data, where="guard")


def test_settings_are_plain_data():
    assert decode(Guard, encode(Guard())) == Guard()
