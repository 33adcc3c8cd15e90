import json
import os

import pytest

from pipeline.errors import ArtifactError, LaunchError
from pipeline.training.ledger import LEDGER, MAX_DOCUMENTS, Event, Ledger, pieces, read_ledger

NAN = Event(
    step=7, reason="the loss is nan", loss=None, grad_norm=None, z=None, policy="skip", rolled_back_to=None, skipped=[7]
)
SPIKE = Event(
    step=31,
    reason="ü \u2028",
    loss=9.25,
    grad_norm=0.1 + 0.2,
    z=33.3,
    policy="rollback",
    rolled_back_to=20,
    skipped=[29, 30, 31],
)
DOCUMENTS = [("web", "a/1", 0, 12), ("books", "line\nbreak \u2028 \ud7ff", 3, 2**40)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / LEDGER


def test_what_is_recorded_is_read_again(path):
    ledger = Ledger(path, writes=True)
    assert (ledger.events, ledger.skipped) == ([], set())
    ledger.record(NAN, lambda: DOCUMENTS)
    ledger.record(SPIKE)
    again = Ledger(path, writes=False)
    assert again.events == ledger.events
    assert again.skipped == ledger.skipped == {7, 29, 30, 31}
    first, second = again.events
    assert (first.documents, first.num_documents) == (DOCUMENTS, 2)
    assert (second.grad_norm, second.reason, second.documents) == (0.1 + 0.2, "ü \u2028", [])
    assert [json.loads(line)["step"] for line in path.read_text().split("\n")[:-1]] == [7, 31]


def test_a_rank_that_does_not_write_knows_the_same_and_leaves_the_file_alone(path):
    writer, other = Ledger(path, writes=True), Ledger(path, writes=False)
    other.record(NAN, lambda: pytest.fail("only who writes looks the documents up"))
    assert not path.exists()
    writer.record(NAN, lambda: DOCUMENTS)
    assert other.skipped == writer.skipped
    assert [event.step for event in other.events] == [event.step for event in writer.events]


def test_documents_are_listed_up_to_a_number_and_all_counted(path):
    many = [("web", f"d{number}", 0, 1) for number in range(MAX_DOCUMENTS + 10)]
    recorded = Ledger(path, writes=True).record(NAN, lambda: iter(many))
    assert recorded.documents == many[:MAX_DOCUMENTS]
    assert recorded.num_documents == MAX_DOCUMENTS + 10


def test_two_trainings_of_one_artifact_share_the_file_but_no_steps(path):
    Ledger(path, writes=True, training="baseline").record(NAN)
    tuned = Ledger(path, writes=True, training="finetune")
    assert tuned.skipped == set()
    tuned.record(SPIKE)
    assert Ledger(path, writes=True, training="baseline").skipped == {7}
    assert [event.training for event in read_ledger(path)] == ["baseline", "finetune"]


def test_a_try_that_was_followed_by_another_writes_nothing(path):
    def fence():
        raise LaunchError("try 1 is over")

    Ledger(path, writes=True).record(NAN)
    before = path.read_bytes()
    with pytest.raises(LaunchError):
        Ledger(path, writes=True, fence=fence).record(SPIKE)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["open", "fsync", "replace"])
def test_a_kill_while_it_is_written_leaves_the_ledger_before_or_after(path, name):
    Ledger(path, writes=True).record(NAN)
    child = os.fork()
    if not child:
        calls = {"open": "pathlib.Path.write_text", "fsync": "os.fsync", "replace": "pathlib.Path.replace"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calls[name], lambda *arguments, **named: os._exit(9))
            Ledger(path, writes=True).record(SPIKE)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert Ledger(path, writes=True).skipped == {7}
    Ledger(path, writes=True).record(SPIKE)
    assert Ledger(path, writes=True).skipped == {7, 29, 30, 31}


@pytest.mark.parametrize("damage", ["cut", "byte", "field", "utf8"])
def test_a_damaged_ledger_is_refused_and_names_the_way_out(path, damage):
    Ledger(path, writes=True).record(NAN)
    Ledger(path, writes=True).record(SPIKE)
    data = path.read_bytes()
    if damage == "cut":
        data = data[:-9]
    elif damage == "byte":
        data = b"[" + data[1:]
    elif damage == "field":
        data = data.replace(b'"step": 31', b'"stop": 31')
    else:
        data = data[:40] + b"\xff" + data[40:]
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"ledger.jsonl: damaged \(.*delete .* and train from the beginning"):
        Ledger(path, writes=True)


def test_pieces_are_those_of_the_batch():
    class Span:
        def __init__(self, name, begin, end):
            self.id, self.begin, self.end = name, begin, end

    class Loader:
        def spans(self, step):
            assert step == 3
            yield "web", [Span("a", 0, 5), Span("b", 0, 2)]
            yield "books", [Span("c", 7, 9)]

    assert list(pieces(Loader(), 3)) == [("web", "a", 0, 5), ("web", "b", 0, 2), ("books", "c", 7, 9)]


def test_a_ledger_that_has_lost_events_is_refused(path):
    ledger = Ledger(path, writes=True)
    ledger.check(0)
    ledger.record(NAN)
    ledger.check(1)
    path.unlink()
    with pytest.raises(ArtifactError, match="wanted 1 events, which the newest checkpoint knows of, found 0"):
        Ledger(path, writes=True).check(1)


def test_a_directory_in_the_place_of_the_ledger_is_refused(path):
    path.mkdir()
    with pytest.raises(ArtifactError, match="ledger.jsonl: damaged"):
        Ledger(path, writes=False)
