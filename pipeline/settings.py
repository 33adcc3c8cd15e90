"""Settings: frozen, strict pydantic models, decoded with all problems at once, and the fingerprint of plain data.

A `Choice` is a settings class that YAML picks by `kind:`. Fields that name another task's output carry an `Input`
mark; fields that name raw files carry a `Source` mark. Both are replaced by what they point at before hashing.
"""

import difflib
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import ConfigError


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys and wrong types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )


class Choice(Settings):
    """Settings that YAML picks by `kind:`; a subclass declares `kind: Literal["name"] = "name"`."""

    kind: str


def choices_of(union: Any) -> dict[str, Any]:
    """Return the classes of a union of choices, such as all stages, by their kinds."""
    return {choice.model_fields["kind"].default: choice for choice in get_args(get_args(union)[0])}


@dataclass(frozen=True)
class Input:
    """Marks a field that holds the path of an artifact or `@task`; `kinds` are the artifact kinds it may be."""

    kinds: tuple[str, ...]

    def __init__(self, *kinds: str) -> None:
        object.__setattr__(self, "kinds", kinds)


@dataclass(frozen=True)
class Source:
    """Marks a field that holds the path of a raw file, identified in the fingerprint by its content."""


SettingsT = TypeVar("SettingsT", bound=Settings)


def decode(model: type[SettingsT], data: Mapping[str, Any], where: str = "") -> SettingsT:
    """Turn plain data into `model`. A choice that names no kind is the default with those settings changed.

    Args:
        where: Dotted path put before the path of each problem.

    Raises:
        ConfigError: With one line for every problem: dotted path, what was wanted, what was found, nearest name.
    """
    text, assumed = json.dumps(data), set[str]()
    while True:
        try:
            return model.model_validate_json(text)
        except ValidationError as error:
            problems = error.errors()
        schema, whole = model.model_json_schema(), json.loads(text)
        completed = {path for problem in problems if (path := _complete(problem, schema, whole))}
        if not completed:
            raise ConfigError(*dict.fromkeys(_problem(e, schema, data, where, assumed) for e in problems))
        text, assumed = json.dumps(whole), assumed | completed


def encode(settings: BaseModel) -> dict[str, Any]:
    """Turn settings into plain JSON data, every default written out; `decode` turns it back."""
    data: dict[str, Any] = settings.model_dump(mode="json")
    return data


def fingerprint(data: Any) -> str:
    """Return 16 hexadecimal digits (64 bits of SHA-256) that identify plain data, whatever the order of its keys."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def marked(settings: Settings, mark: type[Input] | type[Source], where: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted path, the mark, value) for every marked string in `settings`, however deep."""
    for name, field in type(settings).model_fields.items():
        path = f"{where}.{name}" if where else name
        found = next((m for m in field.metadata if isinstance(m, mark)), None)
        for place, value in _leaves(path, getattr(settings, name)):
            if isinstance(value, Settings):
                yield from marked(value, mark, place)
            elif found is not None and isinstance(value, str):
                yield place, found, value


def nearest(name: str, known: list[str]) -> str:
    """Return "; did you mean 'x'?" for the known name closest to `name`, or a list of what there is."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; there is {', '.join(sorted(known))}" if known else ""


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, item) for every item of nested lists and mappings, or the value itself."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{path}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(f"{path}.{index}", item)
    else:
        yield path, value


def _complete(error: Any, schema: dict[str, Any], data: Any) -> str:
    """Put what the default says into a choice that names no kind; return its path, empty if that is not the problem."""
    path, node = _locate(error["loc"], schema, data)
    default = node.get("properties", {}).get(path[-1], {}).get("default") if path else None
    if error["type"] != "union_tag_not_found" or default is None:
        return ""
    *parents, last = path
    for key in parents:
        data = data[int(key)] if isinstance(data, list) else data[key]
    data[last] = {**default, **data[last]}
    return ".".join(path)


def _problem(error: Any, schema: dict[str, Any], data: Any, where: str, assumed: Collection[str]) -> str:
    """Put one of pydantic's errors in our words; `assumed` are the paths of choices that named no kind."""
    path, node = _locate(error["loc"], schema, data)
    kind, found = error["type"], _show(error["input"])
    place = ".".join([where, *path] if where else path) or "settings"
    if kind == "extra_forbidden":
        if elsewhere := next(_elsewhere(path[-1], node, schema), None):
            return f"{place}: no such setting; did you mean '{elsewhere}'?"
        known = node.get("properties", {})
        of_kind = f" of kind '{known['kind']['const']}', the default" if ".".join(path[:-1]) in assumed else ""
        return f"{place}: no such setting{of_kind}{nearest(path[-1], list(known))}"
    if kind == "missing":
        return f"{place}: missing; give it a value"
    if kind == "union_tag_invalid":
        tag, known = error["ctx"]["tag"], error["ctx"]["expected_tags"].replace("'", "").split(", ")
        return f"{place}.kind: no {_noun(path)} is called '{tag}'{nearest(tag, known)}"
    if kind == "union_tag_not_found":
        siblings = [name for name, value in data.get("tasks", {}).items() if path[:1] == ["tasks"] and "kind" in value]
        if len(path) == 2 and (close := difflib.get_close_matches(path[-1], siblings, n=1)):
            return f"{place}: no task is called '{path[-1]}'; did you mean '{close[0]}'?"
        choices = node.get("properties", {}).get(path[-1], {}) if path else {}
        known = sorted(_deref(choices, schema).get("discriminator", {}).get("mapping", {}))
        return f"{place}.kind: missing; say which kind{': ' if known else ''}{' or '.join(known)}"
    if kind == "string_pattern_mismatch" and error["ctx"]["pattern"].endswith("_-]{1,64}$"):
        name = f"{place.removesuffix('.[key]')}: wanted a name of up to 64 letters, digits, _ and -"
        return name if path[-1] == "[key]" else f"{name}, found {found}"
    if kind == "value_error":
        return f"{place}: {error['ctx']['error']}"
    wanted = error["msg"].replace("Input should be", "wanted").replace("a valid integer", "an integer")
    is_number = kind == "string_type" and isinstance(error["input"], int | float)
    quotes = f'; in quotes it is one: "{json.dumps(error["input"])}"' if is_number else ""
    return f"{place}: {wanted[0].lower()}{wanted[1:]}, found {found}{quotes}"


def _locate(loc: tuple[int | str, ...], schema: dict[str, Any], data: Any) -> tuple[list[str], dict[str, Any]]:
    """Return the path of an error as a user wrote it (no union tags) and the JSON schema of what holds its last key."""
    node, path = _deref(schema, schema), []
    for depth, key in enumerate(loc):
        mapping = node.get("discriminator", {}).get("mapping", {})
        if key in mapping:  # pydantic names the branch of a union; the user did not write it
            node = _deref({"$ref": mapping[key]}, schema)
            continue
        path.append(str(key))
        if depth < len(loc) - 1:
            keyed = [node.get("additionalProperties"), *node.get("patternProperties", {}).values(), node.get("items")]
            below = node.get("properties", {}).get(key) or next((b for b in keyed if isinstance(b, dict)), {})
            node = _deref(below, schema)
    return path, node


def _elsewhere(key: str, node: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    """Yield the paths of the settings one level below that have a name which is none here."""
    for name, field in node.get("properties", {}).items():
        choices = _deref(field, schema)
        for choice in choices.get("oneOf", [choices]):
            if key in _deref(choice, schema).get("properties", {}):
                yield f"{name}.{key}"


def _deref(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Follow `$ref`, and the one branch of an optional value that is not null."""
    if "anyOf" in node:
        node = next((b for b in node["anyOf"] if b.get("type") != "null"), node)
    if "$ref" in node:
        return _deref(schema["$defs"][node["$ref"].rsplit("/", 1)[1]], schema)
    return node


def _noun(path: list[str]) -> str:
    """Return what a choice at `path` is: its key, but a task's kind is a stage and a list's item is one of its name."""
    if path[-2:-1] == ["tasks"]:
        return "stage"
    return next((key.removesuffix("s") for key in reversed(path) if not key.isdigit()), "choice")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
