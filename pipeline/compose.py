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

from pipeline.errors import ConfigError
from pipeline.settings import nearest

PACKAGE = Path(__file__).resolve().parent
CONF = next((d for d in (PACKAGE / "conf", PACKAGE.parent / "conf") if d.is_dir()), PACKAGE / "conf")  # wheel, checkout


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
    unresolved: list[OmegaConfBaseException] = []

    def entry(config: DictConfig) -> None:
        try:
            data = OmegaConf.to_container(config, resolve=True)
        except OmegaConfBaseException as error:  # kept for later: Hydra would print it in its own way
            unresolved.append(error)
            return
        assert isinstance(data, dict)
        job = HydraConfig.get().runtime.choices.get("job")
        statuses.append(act({str(key): value for key, value in data.items()}, job))

    OmegaConf.register_new_resolver("jobs", lambda path: str(CONF / "job" / path), replace=True)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us as exceptions
    sys.argv = ["pipeline", *map(_translate, arguments)]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(entry)()
    except MissingConfigException as error:
        raise ConfigError(_explain_missing(error)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"command line: {_in_one_line(error)}") from None
    if unresolved:
        raise ConfigError(*(f"command line: {_in_one_line(error)}" for error in unresolved))
    return max(statuses)


def _translate(argument: str) -> str:
    """Turn one word of the command line into Hydra's grammar."""
    if argument == "--plan":
        return "++plan=true"
    key, equals, _ = argument.partition("=")
    if not equals or key.startswith(("-", "+", "~", "hydra")) or "@" in key or _is_group(key):
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
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
