"""The only door to Hydra: from a command line and the YAML files in conf/ and jobs/ to plain data.

`KEY.PATH=value` is passed on as `++KEY.PATH=value`, so a typo meets our message, with the nearest name, and not
Hydra's advice to add the key. Groups (`job=`, `stage=`, `run=`, `tracker=`, `model@tasks.x.model=`) stay as they are.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
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
        act: Takes the plain data and the name of the job if one was chosen; returns an exit status.

    Returns:
        The highest exit status.

    Raises:
        ConfigError: If Hydra cannot compose it.
    """
    statuses = [0]
    problems: list[str] = []
    crashes: list[Exception] = []

    def entry(config: DictConfig) -> None:
        if statuses[-1] in STOPPED:  # the rest of a sweep
            return
        try:
            data = OmegaConf.to_container(config, resolve=True)
        except OmegaConfBaseException as error:  # kept for later: Hydra would print it in its own way
            problems.append(f"command line: {_in_one_line(error)}")
            return
        assert isinstance(data, dict)
        job = HydraConfig.get().runtime.choices.get("job")
        if "job" in data:
            problems.append(f"jobs/{job}.yaml: its first line must be '# @package _global_'")
            return
        try:
            statuses.append(act({str(key): value for key, value in data.items()}, job))
        except Exception as error:  # ours, not Hydra's
            crashes.append(error)

    OmegaConf.register_new_resolver("jobs", lambda path: str(CONF / "job" / path), replace=True)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us as exceptions
    sys.argv = ["pipeline", *_translate(arguments)]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(entry)()
    except MissingConfigException as error:
        problems.append(_explain_missing(error))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        problems.append(f"command line: {_in_one_line(error)}")
    if crashes:
        raise crashes[0]
    if problems:
        raise ConfigError(*problems)
    return max(statuses)


def _translate(arguments: Sequence[str]) -> list[str]:
    """Turn a command line into Hydra's grammar: flags first, and keys that may be wrong with ++."""
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
    return f"{group}: no {group} is called '{name}'{nearest(name, list(error.options or ()))}"


def _in_one_line(error: Exception) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return text.split(" See https://")[0]
