"""The only door to Hydra: from a command line and the YAML files in conf/ and jobs/ to plain data.

`KEY.PATH=value` is passed on as `++KEY.PATH=value`, so a typo meets our message, with the nearest name, and not
Hydra's advice to add the key. Groups (`job=`, `stage=`, `run=`, `tracker=`, `model@tasks.x.model=`) stay as they are.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipeline.errors import ConfigError, Interrupted, Preempted
from pipeline.settings import nearest

PACKAGE = Path(__file__).resolve().parent
CONF = next((d for d in (PACKAGE / "conf", PACKAGE.parent / "conf") if d.is_dir()), PACKAGE / "conf")  # wheel, checkout

STOPPED = (Preempted.exit_status, Interrupted.exit_status)


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
    refused: list[str] = []
    failures: list[Exception] = []

    def entry(config: DictConfig) -> None:
        if statuses[-1] in STOPPED:  # the rest of a sweep
            return
        try:
            data, job = _resolve(config)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                job = _name_point(data, job)
                print(f"\n[{job if _is_slurm(data) else len(statuses)}] {' '.join(_words(arguments))}", flush=True)
            sys.argv = ["pipeline", *_words(arguments)]  # for the record of the job: not Hydra's grammar
            statuses.append(act(data, job))
            refused.extend([job] if job and statuses[-1] and _is_slurm(data) else [])
        except Exception as error:  # kept for later: Hydra would print it in its own way
            failures.append(error)

    OmegaConf.register_new_resolver("jobs", lambda path: str(CONF / "job" / path), replace=True)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us as exceptions
    try:
        with TemporaryDirectory() as scratch:
            sys.argv = ["pipeline", *_translate(_find_job_files(arguments, Path(scratch)))]
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(entry)()
    except MissingConfigException as error:
        raise ConfigError(_explain_missing(error)) from None
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        hint = "; a value with other signs than letters goes into quotes of its own: 'KEY=\"<|end|>\"'"
        problem = _in_one_line(error).replace("++", "")
        raise ConfigError(f"command line: {problem}{hint if 'Lexer' in problem else ''}") from None
    if failures:
        raise failures[0]
    if refused and len(statuses) > 2:
        points = len(statuses) - 1
        print(f"\n{points - len(refused)} of {points} points went through; refused: {', '.join(refused)}", flush=True)
    return max(statuses)


def _words(arguments: Sequence[str]) -> list[str]:
    """Return the words of this point of a sweep, or of the command if it is none, as a person says them."""
    files = [argument for argument in arguments if argument.startswith("job=") and argument.endswith((".yaml", ".yml"))]
    words = [word.removeprefix("++") for word in HydraConfig.get().overrides.task]
    return [files[0] if files and word.startswith("job=") else word for word in words]


def _is_slurm(data: Mapping[str, Any]) -> bool:
    return isinstance(run := data.get("run"), dict) and run.get("kind") == "slurm"


def _name_point(data: Mapping[str, Any], job: str | None) -> str | None:
    """Return the name of a point of a sweep: under SLURM all of them run side by side, so each is a job of its own."""
    if not _is_slurm(data):
        return job
    return f"{job or HydraConfig.get().runtime.choices.get('stage')}-{HydraConfig.get().job.num}"


def _replace_mappings(config: DictConfig) -> None:
    """Let `KEY={…}` on the command line take the place of what KEY was, where Hydra only merges the two."""
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    for override in overrides:
        if override.is_force_add():  # in their order: what changes a key within comes after
            key, value = override.key_or_group, override.value()
            OmegaConf.update(config, key, value, merge=False, force_add=True)


def _resolve(config: DictConfig) -> tuple[dict[str, Any], str | None]:
    """Return plain data with all interpolations done, and the name of the job."""
    try:
        _replace_mappings(config)
        data = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"command line: {_in_one_line(error)}") from None
    assert isinstance(data, dict)
    job = HydraConfig.get().runtime.choices.get("job")
    if "job" in data:
        raise ConfigError(f"jobs/{job}.yaml: its first line must be '# @package _global_'")
    return {str(key): value for key, value in data.items()}, job


def _find_job_files(arguments: Sequence[str], scratch: Path) -> Iterator[str]:
    """Let `job=PATH.yaml` be a file anywhere: put it where Hydra looks for the group. Raises ConfigError."""
    for argument in arguments:
        group, _, name = argument.partition("=")
        if group != "job" or not name.endswith((".yaml", ".yml")):
            yield argument
            continue
        path = Path(name).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"job: {name}: no such file")
        shipped = CONF / "job" / f"{path.stem}.yaml"
        if not shipped.exists():
            (scratch / "job").mkdir()
            (scratch / "job" / f"{path.stem}.yaml").symlink_to(path)
            yield f"hydra.searchpath=[file://{scratch}]"
        elif not shipped.samefile(path):
            raise ConfigError(f"job: {name}: the pipeline brings a job of this name; give the file another")
        yield f"job={path.stem}"


def _translate(given: Iterable[str]) -> list[str]:
    """Turn a command line into Hydra's grammar: flags first, and keys that may be wrong with ++."""
    arguments = list(given)
    keys = [a for a in arguments if a[:1] in ("+", "~") or ("=" in a and not a.startswith("-"))]
    flags = [a for a in arguments if a not in keys and a != "--plan"]
    return [*flags, *map(_translate_key, keys), *(["++plan=true"] if "--plan" in arguments else [])]


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
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return _in_one_line(error)
    hint = "; job=PATH.yaml takes a file" if group == "job" else ""
    return f"{group}: no {group} is called '{name}'{nearest(name, list(error.options or ()))}{hint}"


def _in_one_line(error: Exception) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return text.split(" See https://")[0]
