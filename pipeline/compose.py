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
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import ConfigError
from pipeline.settings import nearest

HERE = Path(__file__).resolve().parent
PROJECT = HERE if (HERE / "conf").is_dir() else HERE.parent  # the wheel carries conf/ and jobs/ inside the package
CONF = PROJECT / "conf"


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

    def entry(config: DictConfig) -> None:
        data = OmegaConf.to_container(config, resolve=True)
        assert isinstance(data, dict)
        job = HydraConfig.get().runtime.choices.get("job")
        statuses.append(act({str(key): value for key, value in data.items()}, job))

    OmegaConf.register_new_resolver("project", lambda path: str(PROJECT / path), replace=True)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us as exceptions
    sys.argv = ["pipeline", *map(_translate, arguments)]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(entry)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, arguments)) from None
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


def _explain(error: Exception, arguments: Sequence[str]) -> str:
    """Say in one line what Hydra found wrong."""
    for argument in arguments:
        group, equals, name = argument.lstrip("+").partition("=")
        group = group.partition("@")[0]
        if equals and _is_group(group) and not any(mark in name for mark in ",${"):
            known = [str(p.relative_to(CONF / group).with_suffix("")) for p in (CONF / group).rglob("*.yaml")]
            if name not in known:
                return f"{group}: no {group} is called '{name}'{nearest(name, known)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "command line: " + " ".join(lines)
