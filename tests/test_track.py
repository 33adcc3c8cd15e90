import json
import time

import pytest

from pipeline.settings import Settings, decode
from pipeline.track import AnyTracker, Jsonl, NoTracker, TensorBoard, Wandb, open_tracker, read_metrics


def track(choice, directory, steps, after=0):
    tracker = open_tracker(choice, directory, "pretrain-0123456789abcdef", "job.pretrain", {"lr": 1e-3}, after)
    for step in steps:
        tracker.log(step, {"loss": 10.0 - step})
    tracker.close()


def steps_in(directory):
    return [row["step"] for row in read_metrics(directory / "metrics.jsonl")]


@pytest.mark.parametrize("kind", ["none", "jsonl", "tensorboard", "wandb"])
def test_every_kind_can_be_chosen(kind):
    class Holder(Settings):
        tracker: AnyTracker

    assert decode(Holder, {"tracker": {"kind": kind}}).tracker.kind == kind


def test_jsonl_holds_every_number(tmp_path):
    track(Jsonl(), tmp_path, [1, 2])
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 9.0), (2, 8.0)]
    assert all(row["time"] > 1e9 for row in rows)


def test_a_resumed_run_has_one_axis_of_steps(tmp_path):
    track(Jsonl(), tmp_path, [1, 2, 3, 4, 5])
    track(Jsonl(), tmp_path, [4, 5, 6], after=3)  # the checkpoint was of step 3
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    track(Jsonl(), tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    track(Jsonl(), tmp_path, [3], after=2)
    assert steps_in(tmp_path) == [1, 2, 3]


def test_lines_that_are_no_rows_are_dropped(tmp_path):
    track(Jsonl(), tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('5\n[1]\nnull\n{}\n{"step": "a", "time": 1}\n{"step": 2, "time": null}\n\n\0\n')
    track(Jsonl(), tmp_path, [3], after=2)
    assert steps_in(tmp_path) == [1, 2, 3]


def test_none_leaves_nothing(tmp_path):
    track(NoTracker(), tmp_path, [1])
    assert list(tmp_path.iterdir()) == []


def test_none_removes_the_record_of_an_earlier_try(tmp_path):
    track(Jsonl(), tmp_path, [1])
    track(NoTracker(), tmp_path, [2], after=1)
    assert list(tmp_path.iterdir()) == []  # it would stop short at step 1


def read_offline_run(path):
    """Records of a W&B offline file: a 7-byte header, then LevelDB log blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, partial, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        partial += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            record = Record()
            record.ParseFromString(partial)
            records.append(record)
            partial = b""
    return records


def wait_for_end(path):
    """Records of a run, once its end is among them: another process writes the file."""
    deadline = time.monotonic() + 30
    while True:
        records = read_offline_run(path)
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < deadline, [record.WhichOneof("record_type") for record in records]
        time.sleep(0.05)


@pytest.mark.slow
def test_wandb_offline_holds_the_run_and_continues_its_id(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    track(Wandb(), tmp_path, [1, 2, 3])
    track(Wandb(), tmp_path, [3, 4], after=2)
    assert capsys.readouterr().out.count(f"wandb: offline; to upload: python -m pipeline sync {tmp_path}\n") == 2
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in files] == ["run-pretrain-0123456789abcdef.wandb"] * 2
    seen = []
    for path in files:
        records = wait_for_end(path)
        run = next(record.run for record in records if record.HasField("run"))
        assert (run.run_id, run.display_name) == ("pretrain-0123456789abcdef", "job.pretrain")
        assert {item.key: json.loads(item.value_json) for item in run.config.update}["lr"] == 1e-3
        rows = [
            {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        seen.append([(row["_step"], row["loss"]) for row in rows])
    assert seen == [[(1, 9.0), (2, 8.0), (3, 7.0)], [(3, 7.0), (4, 6.0)]]
    assert steps_in(tmp_path) == [1, 2, 3, 4]


@pytest.mark.slow
def test_tensorboard_holds_the_scalars(tmp_path):
    track(TensorBoard(), tmp_path, [1, 2])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 9.0), (2, 8.0)]
    assert steps_in(tmp_path) == [1, 2]
