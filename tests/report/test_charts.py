import re
from itertools import pairwise

import pytest
from made_up import Job, make_whole_job, metrics

from pipeline.report.charts import Bar, Curve, Level, bars, histogram, line_chart
from pipeline.report.curves import curves, read_runs
from pipeline.report.graph import graph
from pipeline.report.numerals import amount, duration, number, percent, short, size
from pipeline.report.scales import log_bins, log_ticks, smooth, thin, tick_labels, ticks, value_ticks


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "artifacts")


@pytest.fixture
def whole_job(tmp_path):
    return make_whole_job(tmp_path / "artifacts")


def plain(text):
    return text.replace("\N{NARROW NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (3, 97, [20, 40, 60, 80]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (0, 3e-4, [0, 1e-4, 2e-4, 3e-4]),
        (1e9, 1.5e9, [1e9, 1.1e9, 1.2e9, 1.3e9, 1.4e9, 1.5e9]),
    ],
)
def test_ticks_are_round(low, high, wanted):
    assert ticks(low, high) == wanted


def test_ticks_of_steps_are_whole():
    assert ticks(0, 2, whole=True) == [0, 1, 2]
    assert ticks(4, 4.5, whole=True) == [4]


def test_logarithmic_ticks():
    assert log_ticks(1, 1000) == [1, 10, 100, 1000]
    assert log_ticks(15, 300) == [20, 50, 100, 200]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0, 0.5, 1], ["0", "0.5", "1.0"]),
        ([0, 2000, 4000], ["0", "2,000", "4,000"]),
        ([0, 5000, 10000], ["0", "5 k", "10 k"]),
        ([2e6, 2.5e6], ["2.0 M", "2.5 M"]),
        ([0, 5e-4, 1e-3], ["0", "0.5e-3", "1.0e-3"]),
        ([0, 1e-5, 2e-5], ["0", "1e-5", "2e-5"]),
        ([], []),
    ],
)
def test_labels_tell_ticks_apart(values, wanted):
    assert [plain(label) for label in tick_labels(values)] == wanted


def test_axis_spans_its_values_in_round_steps():
    assert value_ticks([0.6, 3.1]) == [0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert value_ticks([5]) == [2, 3, 4, 5, 6, 7, 8]
    assert value_ticks([0]) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert value_ticks([40, 90], from_zero=True)[0] == 0


def test_spikes_do_not_flatten_the_rest():
    values = [1 + 0.01 * (n % 50) for n in range(500)]
    assert value_ticks([*values, 1e6])[-1] < 3
    assert value_ticks([*values, -1e6])[0] > -1


def test_a_falling_loss_is_no_spike():
    assert value_ticks([10.8, 9, 7, *[5 - n / 50 for n in range(100)]])[-1] >= 10.8


def test_thinning_keeps_ends_and_spikes():
    points = [(step, float(step % 7)) for step in range(1, 10_001)]
    points[5000] = (5001, 99.0)
    kept = thin(points)
    assert len(kept) <= 600
    assert kept == sorted(kept)
    assert {points[0], points[-1], points[5000]} <= set(kept)
    assert thin(points[:600]) == points[:600]


def test_smoothing_follows_the_values_and_not_a_spike():
    points = [(step, 100.0 - step) for step in range(100)]
    points[50] = (50, 1e9)
    smoothed = smooth(points, share=0.1)
    assert [x for x, _ in smoothed] == list(range(100))
    assert all(y == pytest.approx(100 - x, abs=3) for x, y in smoothed)
    assert smooth([(1, 5.0)]) == [(1, 5.0)]
    assert len(smooth([(step, 1.0) for step in range(10_000)])) <= 300


@pytest.mark.parametrize("counts", [{1: 4}, {0: 2, 1: 1}, {7: 1, 100_000: 3}, {n: n for n in range(1, 2000)}])
def test_bins_hold_everything_without_gaps(counts):
    bins = log_bins(counts)
    assert sum(count for _, _, count in bins) == sum(counts.values())
    assert all(one[1] == other[0] for one, other in pairwise(bins))
    assert bins[0][0] <= max(1, min(counts))
    assert bins[-1][1] > max(counts)
    for first, after, held in bins[1:]:
        assert held == sum(count for value, count in counts.items() if first <= value < after)


def test_numbers_in_words():
    assert [plain(amount(n)) for n in (0, 515, 9731, 13_107, 2_929_664, 1.31e9, 999_999)] == [
        "0", "515", "9,731", "13.1 k", "2.93 M", "1.31 B", "1.00 M",
    ]  # fmt: skip
    assert [plain(short(n)) for n in (0, 500, 10_000, 1_500_000)] == ["0", "500", "10 k", "1.5 M"]
    assert [plain(percent(s)) for s in (0, 0.0001, 0.5, 0.99999, 1)] == [
        "0 %",
        "< 0.1 %",
        "50.0 %",
        "> 99.9 %",
        "100 %",
    ]
    times = (0.04, 9.99, 42, 59.7, 185, 1354, 3599, 7800)
    assert [plain(duration(s)) for s in times] == [
        "0.0 s",
        "10 s",
        "42 s",
        "1 min 00 s",
        "3 min 05 s",
        "23 min",
        "1 h 00 min",
        "2 h 10 min",
    ]
    assert [plain(size(n)) for n in (831, 92_000, 1.3e9)] == ["831 B", "92 kB", "1.3 GB"]
    assert [number(n) for n in (3, 0.5, 4.5231, 22.2, 1e-5, 123456.7)] == [
        "3", "0.500", "4.523", "22.20", "1.000e-05", "123,457",
    ]  # fmt: skip
    assert number(float("inf")) == "inf"


def test_one_point_is_a_dot():
    chart = line_chart("Loss", "nats", [Curve("training", [(1, 5.0)])])
    assert "<circle" in chart
    assert "<polyline" not in chart
    assert "training 5" in chart


def test_many_points_are_thinned():
    points = [(step, float(step % 10)) for step in range(1, 10_001)]
    chart = line_chart("Loss", "nats", [Curve("training", points)], tokens_per_step=4096)
    assert len(re.search(r'points="([^"]*)"', chart)[1].split()) <= 600
    assert "10\N{NARROW NO-BREAK SPACE}k" in chart
    assert "41\N{NARROW NO-BREAK SPACE}M" in chart
    assert chart.count('class="hit"') <= 160


def test_spikes_are_noted_and_stay_in_the_plot():
    points = [(step, 1.0 + step % 3 / 10) for step in range(1, 200)]
    points[100] = (101, 1e6)
    points[50] = (51, -1e6)
    chart = line_chart("Gradient norm", "", [Curve("training", points)])
    assert "1 value above the top, the highest 1,000,000; 1 value below the bottom, the lowest -1,000,000." in chart
    heights = [float(pair.split(",")[1]) for pair in re.search(r'points="([^"]*)"', chart)[1].split()]
    assert min(heights) == 0
    assert max(heights) == 1000


def test_level_is_drawn_only_where_the_curves_are():
    curve = Curve("training", [(1, 1.0), (2, 3.0)])
    assert "clipped" in line_chart("Norm", "", [curve], level=Level(2.0, "clipped to 2"))
    assert "clipped" not in line_chart("Norm", "", [curve], level=Level(50.0, "clipped to 50"))


def test_a_column_tells_the_values_of_its_step():
    training = Curve("training", [(step, float(step)) for step in range(1, 21)])
    validation = Curve("validation", [(10, 12.5)], 2, "dots")
    titles = re.findall(
        r"<title>([^<]*)</title>", line_chart("Loss", "nats", [training, validation], tokens_per_step=100)
    )
    assert titles[9] == "step 10 (1,000 tokens)\ntraining 10\nvalidation 12.50"
    assert titles[10] == "step 11 (1,100 tokens)\ntraining 11"


def test_histogram_marks_median_mean_and_p90():
    chart = re.sub(r"<[^>]+>", "", histogram("Documents", "", {10: 8, 1000: 2}, "tokens", "document"))
    assert "median 10" in chart
    assert "mean 208" in chart
    assert "p90 1,000" in chart
    assert "8 documents, 80.0" in chart


def test_bars_are_as_long_as_their_values():
    drawn = bars([Bar("model", 2.0, "2.00"), Bar("unigram", 4.0, "4.00", 6)], full=4.0)
    assert re.findall(r"width:([\d.]+%)", drawn) == ["50%", "100%"]


def test_runs_of_one_artifact_start_at_their_own_first_step():
    rows = [{"step": 1, "baseline/loss": 3.0}, {"step": 2, "baseline/loss": 2.0}, {"step": 3, "finetune/loss": 1.0}]
    assert read_runs(rows) == {"baseline": {"loss": [(1, 3.0), (2, 2.0)]}, "finetune": {"loss": [(1, 1.0)]}}
    assert read_runs([{"step": 7, "time": 1, "loss": 3.0}]) == {"": {"loss": [(7, 3.0)]}}


def test_unknown_numbers_are_drawn_if_there_are_several(job):
    rows = '{"step": 1, "loss": 2, "expert_load": 0.5, "once": 1}\n{"step": 2, "loss": 1, "expert_load": 0.6}\n'
    drawn = curves(job.add("model", "model", {"kind": "pretrain"}, files={"metrics.jsonl": rows}))
    assert "Expert load" in drawn
    assert "Once" not in drawn


def test_graph_joins_what_feeds_what(whole_job):
    drawn = graph(whole_job.pick("shard", "clean", "tokenizer", "tokens"))
    assert drawn.count('class="node"') == 2 * 4
    assert drawn.count('class="arrow"') == 2 * 4
    assert "tokens from clean and tokenizer" in drawn


def test_graph_keeps_tasks_apart(whole_job):
    for drawing in graph(whole_job.all).split("<svg")[1:]:
        boxes = [
            tuple(float(re.search(rf'{name}="([\d.]+)"', box)[1]) for name in ("x", "y", "width", "height"))
            for box in re.findall(r"<rect[^>]*>", drawing)
        ]
        assert len(boxes) == len(whole_job.all)
        for place, (x, y, width, height) in enumerate(boxes):
            for other_x, other_y, other_width, other_height in boxes[:place]:
                beside = x + width <= other_x or other_x + other_width <= x
                assert beside or y + height <= other_y or other_y + other_height <= y


def test_the_curve_of_the_rate_says_which_schedule_it_is(job):
    stage = {"kind": "pretrain", "schedule": {"kind": "inverse_sqrt"}}
    entry = job.add("model", "model", stage, files={"metrics.jsonl": metrics(3)})
    assert "inverse sqrt schedule" in curves(entry)
    assert "schedule" not in curves(
        job.add("other", "model", {"kind": "pretrain"}, files={"metrics.jsonl": metrics(3)})
    )
