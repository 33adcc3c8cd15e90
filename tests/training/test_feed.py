import threading

import pytest

from pipeline.training.feed import STEPS_AHEAD, Feeder


def test_batches_come_in_the_order_of_their_steps():
    with Feeder(lambda step: step * 10, 3, 9) as feeder:
        assert [feeder.take()[0] for _ in range(3, 10)] == [30, 40, 50, 60, 70, 80, 90]


def test_batches_are_made_ahead_but_never_past_the_last_step():
    fed, ready = [], threading.Event()

    def feed(step):
        fed.append(step)
        if step == STEPS_AHEAD:
            ready.set()
        return step

    with Feeder(feed, 1, 3) as feeder:
        assert ready.wait(10)
        assert fed == list(range(1, STEPS_AHEAD + 1))  # before anybody took one
        assert [feeder.take()[0] for _ in range(3)] == [1, 2, 3]
    assert fed == [1, 2, 3]


def test_the_wait_is_measured():
    go = threading.Event()
    with Feeder(lambda step: go.wait(10), 1, 1) as feeder:
        threading.Timer(0.2, go.set).start()
        taken, waited_s = feeder.take()
    assert taken
    assert waited_s > 0.1


def test_what_feeding_raises_is_raised_where_the_batch_is_taken():
    def feed(step):
        if step == 2:
            raise ValueError("bad row")
        return step

    with Feeder(feed, 1, 5) as feeder:
        assert feeder.take()[0] == 1
        with pytest.raises(ValueError, match="bad row"):
            feeder.take()


def test_leaving_drops_what_was_made_ahead():
    with Feeder(lambda step: step, 1, 1000) as feeder:
        feeder.take()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed")]
