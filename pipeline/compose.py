"""The only door to Hydra: from a command line and the YAML files in conf/ and jobs/ to plain data.

`KEY.PATH=value` is passed on as `++KEY.PATH=value`, so a typo meets our message, with the nearest name, and not
Hydra's advice to add the key. Groups (`job=`, `stage=`, `run=`, `tracker=`, `model@tasks.x.model=`) stay as they are.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipeline.code import PACKAGE
from pipeline.errors import ConfigError, Interrupted, Preempted
from pipeline.settings import decode, nearest

CONF = next((d for d in (PACKAGE / "conf", PACKAGE.parent / "conf") if d.is_dir()), PACKAGE / "conf")  # wheel, checkout

STOPPED = (Preempted.exit_status, Interrupted.exit_status)
YAML = (".yaml", ".yml")
GIVEN = "given"  # what Hydra calls the file of job=PATH.yaml or run=PATH.yaml
JOB_NAME = re.compile(r"\w[\w.-]{0,63}")  # becomes part of paths, of commands and of the names of SLURM jobs
FLAGS = (
    *("--plan", "--help", "-h", "--multirun", "-m", "--cfg", "-c", "--resolve", "--package", "-p", "--info", "-i"),
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--hydra-help", "--experimental-rerun"),
    *("--run", "-r", "--shell-completion", "-sc"),
)
PLAN = ("--dry-run", "--dryrun", "--test-only", "-n")  # what others call --plan


def compose(arguments: Sequence[str], act: Callable[[dict[str, Any], str | None], int]) -> int:
    """Compose the configuration of a command line and hand it to `act`, once for every point of a sweep.

    Args:
        act: Takes the plain data and the name of the job if one was chosen; returns an exit status. Of a sweep under
            SLURM every point is a job of its own name; one that is refused leaves the others as they are.

    Returns:
        The highest exit status.

    Raises:
        ConfigError: If Hydra cannot compose it.
    """
    statuses = [0]
    given = _given_files(arguments)
    refused: list[str] = []
    failures: list[Exception] = []

    def entry(config: DictConfig) -> None:
        if statuses[-1] in STOPPED:  # the rest of a sweep
            return
        try:
            data, job = _resolve(config, given.get("job"))
            _refuse_run_without_kind(data, given.get("run"))
            words = _words(arguments)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                data, job = _name_point(data, job)
                point = data.get("name") or job if _is_slurm(data) else len(statuses)
                print(f"\n[{point}] {' '.join(words)}", flush=True)
            sys.argv = ["pipeline", *words]  # for the record of the job: not Hydra's grammar
            statuses.append(act(data, job))
            refused.extend([str(data.get("name") or job)] if statuses[-1] and _is_slurm(data) else [])
        except Exception as error:  # kept for later: Hydra would print it in its own way
            failures.append(error)

    OmegaConf.register_new_resolver("jobs", lambda path: str(CONF / "job" / path), replace=True)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us as exceptions
    try:
        with TemporaryDirectory() as scratch:
            sys.argv = ["pipeline", *_translate(_place_files(arguments, given, Path(scratch)))]
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(entry)()
    except MissingConfigException as error:
        raise ConfigError(_explain_missing(error)) from None
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"command line: {_in_one_line(error).replace('++', '')}{_hint(error)}") from None
    if failures:
        raise failures[0]
    if refused and len(statuses) > 2:
        points = len(statuses) - 1
        print(f"\n{points - len(refused)} of {points} points went through; refused: {', '.join(refused)}", flush=True)
    return max(statuses)


def _hint(error: Exception) -> str:
    if not isinstance(error, OverrideParseException):
        return ""
    if "missing EQUAL" in str(error):
        return "; wanted KEY=VALUE"
    return "; a value with other signs than letters goes into quotes of its own: 'KEY=\"<|end|>\"', 'KEY=[\"--a=b\"]'"


def _words(arguments: Sequence[str]) -> list[str]:
    """Return the words of this point of a sweep, or of the command if it is none, as a person says them."""
    said = {f"{group}={GIVEN}": argument for argument in arguments if (group := _file_group(argument))}
    words = [word.removeprefix("++") for word in HydraConfig.get().overrides.task]
    words = [word.removesuffix("=null") if word.startswith("~") else word for word in words]  # which Hydra adds
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    flags = [word for flag, value in pairs if flag == "--config-dir" for word in (flag, value)]
    return [*flags, *(said.get(word, word) for word in words)]


def _is_slurm(data: Mapping[str, Any]) -> bool:
    return isinstance(run := data.get("run"), dict) and run.get("kind") == "slurm"


def _name_point(data: dict[str, Any], job: str | None) -> tuple[dict[str, Any], str | None]:
    """Name a point of a sweep: under SLURM all of them run side by side, so each is a job of its own."""
    number = HydraConfig.get().job.num
    if not _is_slurm(data):
        return data, job
    if data.get("name") is not None:
        return {**data, "name": f"{data['name']}-{number}"}, job
    return data, f"{job or HydraConfig.get().runtime.choices.get('stage')}-{number}"


def _replace_mappings(config: DictConfig) -> None:
    """Let `KEY={…}` on the command line take the place of what KEY was, where Hydra only merges the two."""
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    for override in overrides:
        if override.is_force_add():  # in their order: what changes a key within comes after
            key, value = override.key_or_group, override.value()
            OmegaConf.update(config, key, value, merge=False, force_add=True)


def _resolve(config: DictConfig, file: Path | None) -> tuple[dict[str, Any], str | None]:
    """Return plain data with all interpolations done, and the name of the job, which may be of a file."""
    try:
        _replace_mappings(config)
        data = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"command line: {_in_one_line(error)}") from None
    assert isinstance(data, dict)
    job = HydraConfig.get().runtime.choices.get("job")
    if "job" in data:
        raise ConfigError(f"{file or f'jobs/{job}.yaml'}: its first line must be '# @package _global_'")
    if file is not None and job == GIVEN:
        job = file.stem
    return {str(key): value for key, value in data.items()}, job


def _refuse_run_without_kind(data: Mapping[str, Any], file: Path | None) -> None:
    """Refuse settings of `run` that do not say of which kind they are; the other mistakes are named as if for SLURM."""
    from pipeline.plan import Command

    run = data.get("run")
    if not isinstance(run, dict) or "kind" in run:
        return
    place = file or f"run/{HydraConfig.get().runtime.choices.get('run')}.yaml"
    problems = [
        f"run: {place}: does not say whether it is for slurm or local; begin it with 'defaults: [slurm, _self_]'"
    ]
    try:
        decode(Command, {**data, "run": {"kind": "slurm", **run}})
    except ConfigError as error:
        problems += error.problems
    raise ConfigError(*problems)


def _file_group(argument: str) -> str | None:
    """Return the group of which `GROUP=PATH.yaml` gives a file; null if it gives none."""
    group, _, value = argument.partition("=")
    return group if group in ("job", "run") and _unquoted(value).endswith(YAML) else None


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _given_files(arguments: Sequence[str]) -> dict[str, Path]:
    """Return the files of `job=PATH.yaml` and `run=PATH.yaml`, which may be anywhere, by group. Raises ConfigError."""
    given = {}
    for argument in arguments:
        group, _, value = argument.partition("=")
        path = Path(_unquoted(value)).expanduser()
        if _file_group(argument):
            if not path.is_file():
                raise ConfigError(f"{group}: {path}: no such file")
            if group == "job" and not JOB_NAME.fullmatch(path.stem):
                raise ConfigError(
                    f"job: {path}: a job is called as its file; wanted a name of up to 64 letters, digits, _, - and ., "
                    f"found '{path.stem}'"
                )
            given[group] = path.absolute()
        elif group in ("job", "run") and "/" in value and Path(f"{path}.yaml").is_file():
            raise ConfigError(f"{group}: {path}: a path has to end in .yaml; there is {path}.yaml")
    return given


def _place_files(arguments: Sequence[str], given: Mapping[str, Path], scratch: Path) -> Iterator[str]:
    """Put the files that were given where Hydra looks for their groups, under a name that it can say."""
    for group, path in given.items():
        (scratch / group).mkdir()
        (scratch / group / f"{GIVEN}.yaml").symlink_to(path)
    if given:
        yield f"hydra.searchpath=[file://{scratch}]"
    for argument in arguments:
        of_file = _file_group(argument)
        yield f"{of_file}={GIVEN}" if of_file else argument


def _translate(given: Iterable[str]) -> list[str]:
    """Turn a command line into Hydra's grammar: flags first, and keys that may be wrong with ++."""
    arguments = list(given)
    _refuse_flags(arguments)
    keys = [a for a in arguments if a[:1] in ("+", "~") or ("=" in a and not a.startswith("-"))]
    flags = [a for a in arguments if a not in keys and a != "--plan"]
    return [*flags, *map(_translate_key, keys), *(["++plan=true"] if "--plan" in arguments else [])]


def _refuse_flags(arguments: Sequence[str]) -> None:
    """Refuse flags that there are not, which Hydra answers with a page. Raises ConfigError with the nearest."""
    unknown = [flag for flag in (word.partition("=")[0] for word in arguments) if flag[:1] == "-" and flag not in FLAGS]
    if unknown:
        raise ConfigError(*(f"{flag}: no such flag{_nearest_flag(flag)}" for flag in unknown))


def _nearest_flag(flag: str) -> str:
    if flag in PLAN:
        return "; did you mean '--plan'?"
    return f"; did you mean '{flag[2:]}=NAME'?" if _is_group(flag[2:]) else nearest(flag, list(FLAGS))


def _translate_key(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if value.startswith("~/"):  # the shell expands it only at the start of a word
        argument = f"{key}={Path.home()}{value[1:]}"
    if not equals or key.startswith(("+", "~", "hydra")) or "@" in key or _is_group(key):
        return argument
    return "++" + argument


def _is_group(key: str) -> bool:
    return "." not in key and (CONF / key).is_dir()


def _explain_missing(error: MissingConfigException) -> str:
    """Say which name of a group is not there, and which is nearest."""
    group, _, name = (error.missing_cfg_file or "").partition("/")
    if not name:
        return _in_one_line(error)
    hint = f"; {group}=PATH.yaml takes a file" if group in ("job", "run") else ""
    return f"{group}: no {group} is called '{name}'{nearest(name, list(error.options or ()))}{hint}"


def _in_one_line(error: Exception) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return text.split(" See https://")[0]
