from typing import Annotated, Literal

import pytest
from pydantic import Field

from pipeline.errors import ConfigError
from pipeline.settings import Choice, Input, Settings, Source, decode, encode, fingerprint, marked, nearest


class Adam(Choice):
    kind: Literal["adam"] = "adam"
    lr: float = 1.0


class Read(Choice):
    kind: Literal["read"] = "read"
    path: Annotated[str, Source()]


class Learn(Choice):
    kind: Literal["learn"] = "learn"
    tokens: Annotated[str, Input("tokens")]
    others: Annotated[dict[str, str], Input()] = {}
    readers: list[Read] = []
    optimizer: Adam = Adam()
    steps: int = Field(default=1, ge=1)


class Sgd(Choice):
    kind: Literal["sgd"] = "sgd"
    lr: float = 2.0
    momentum: float = 0.0


AnyUpdate = Annotated[Adam | Sgd, Field(discriminator="kind")]


class Update(Settings):
    first: AnyUpdate = Sgd(momentum=0.5)
    inner: list[AnyUpdate] = []
    after: AnyUpdate | None = None


class Root(Settings):
    tasks: dict[str, Annotated[Read | Learn, Field(discriminator="kind")]] = {}
    threads: int | None = None


def problems(data) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        decode(Root, data)
    assert caught.value.exit_status == 2
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tasks": {"a": {"kind": "lern"}}}, "tasks.a.kind: no stage is called 'lern'; did you mean 'learn'?"),
        ({"tasks": {"a": {"kind": "zzz"}}}, "tasks.a.kind: no stage is called 'zzz'; there is learn, read"),
        ({"tasks": {"a": {}}}, "tasks.a.kind: missing; say which kind"),
        ({"tasks": {"a": {"kind": "read"}}}, "tasks.a.path: missing; give it a value"),
        ({"thread": 1}, "thread: no such setting; did you mean 'threads'?"),
        ({"threads": "two"}, "threads: wanted an integer, found 'two'"),
        ({"threads": True}, "threads: wanted an integer, found True"),
        ({"threads": 1.5}, "threads: wanted an integer, found 1.5"),
        (
            {"tasks": {"a": {"kind": "learn", "tokens": "t", "steps": 0}}},
            "tasks.a.steps: wanted greater than or equal to 1, found 0",
        ),
        (
            {"tasks": {"a": {"kind": "learn", "tokens": "t", "optimizer": {"kind": "adam", "lrr": 1}}}},
            "tasks.a.optimizer.lrr: no such setting; did you mean 'lr'?",
        ),
        (
            {"tasks": {"a": {"kind": "learn", "tokens": "t", "readers": [{"kind": "read", "paht": "x", "path": "y"}]}}},
            "tasks.a.readers.0.paht: no such setting; did you mean 'path'?",
        ),
    ],
)
def test_each_mistake_is_one_clear_line(data, message):
    assert problems(data) == [message]


def test_a_choice_without_a_kind_is_the_default_with_those_settings_changed():
    assert decode(Update, {"first": {"lr": 3}}).first == Sgd(lr=3.0, momentum=0.5)
    assert decode(Update, {"first": {}}) == Update()
    assert decode(Update, {"first": {"kind": "sgd", "lr": 3}}).first == Sgd(lr=3.0)
    assert decode(Update, {"first": {"kind": "adam"}}).first == Adam()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"after": {"lr": 1}}, "after.kind: missing; say which kind: adam or sgd"),
        ({"inner": [{"lr": 1}]}, "inner.0.kind: missing; say which kind"),
        ({"first": {"beta": 1}}, "first.beta: no such setting of kind 'sgd', the default; there is kind, lr, momentum"),
        ({"first": {"kind": "sgd", "beta": 1}}, "first.beta: no such setting; there is kind, lr, momentum"),
        ({"first": {"lr": "x"}}, "first.lr: wanted a valid number, found 'x'"),
        ({"first": 3}, "first: wanted an object, found 3"),
    ],
)
def test_where_no_default_says_a_kind_it_has_to_be_said(data, message):
    with pytest.raises(ConfigError) as caught:
        decode(Update, data)
    assert caught.value.problems == (message,)


def test_a_task_name_must_be_fit_for_a_path():
    from pipeline.plan import Command

    with pytest.raises(ConfigError) as caught:
        decode(Command, {"tasks": {"a/b": {"kind": "dedup", "corpus": "x"}}})
    assert caught.value.problems == ("tasks.a/b: wanted a name of up to 64 letters, digits, _ and -",)


def test_numbers_that_are_none_are_never_written():
    class Loose(Settings):
        stats: dict[str, object]

    assert "NaN" in str(encode(Loose(stats={"loss": float("nan")}))).replace("nan", "NaN")  # not null: it would pass


def test_several_mistakes_are_reported_together():
    found = problems({"tasks": {"a": {"kind": "learn", "stps": 3}, "b": {"kind": "no"}}, "threads": "x"})
    assert {line.split(":")[0] for line in found} == {"tasks.a.tokens", "tasks.a.stps", "tasks.b.kind", "threads"}


def test_encode_and_decode_are_inverse():
    root = decode(Root, {"tasks": {"a": {"kind": "learn", "tokens": "@b", "steps": 5}}})
    assert decode(Root, encode(root)) == root


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Adam().lr = 2.0


def test_fingerprint_ignores_the_order_of_keys_and_nothing_else():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert len({fingerprint(x) for x in ({"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": None})}) == 6
    assert fingerprint({"a": 1}) == "015abd7f5cc57a2d"  # must not change between versions: artifacts would be redone


def test_marked_finds_inputs_and_sources_however_deep():
    stage = Learn(tokens="@t", others={"x": "@u"}, readers=[Read(path="p"), Read(path="q")])
    assert [(place, mark.kinds, value) for place, mark, value in marked(stage, Input)] == [
        ("tokens", ("tokens",), "@t"),
        ("others.x", (), "@u"),
    ]
    assert [(place, value) for place, _, value in marked(stage, Source)] == [
        ("readers.0.path", "p"),
        ("readers.1.path", "q"),
    ]


def test_nearest_names_one_or_lists_all():
    assert nearest("tokenise", ["tokenize", "shard"]) == "; did you mean 'tokenize'?"
    assert nearest("qqq", ["b", "a"]) == "; there is a, b"
    assert nearest("qqq", []) == ""


def test_a_guard_of_a_fine_tuning_keeps_its_threshold_where_another_setting_is_said():
    from pipeline.stages import AnyStage

    class Holder(Settings):
        stage: AnyStage

    data = {"kind": "finetune", "model": "m", "data": "d.jsonl", "guard": {"window": 64}}
    guard = decode(Holder, {"stage": data}).stage.guard
    assert (guard.window, guard.threshold) == (64, 200.0)
