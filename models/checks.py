"""Checks that the settings of device and cloud share."""

from __future__ import annotations

import math
import re
from dataclasses import fields

from .errors import ConfigError, InputError

_LONGEST_NAME = 64  # the contract's `MAX_NAME_LENGTH`
ENVIRONMENT_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{_LONGEST_NAME - 1}}}")

_TARGET = re.compile(r"(?:[a-z]+:/{2,3})?(?:\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+):(\d{1,5})")


def check_environment_name(name: str) -> str:
    """Raises `InputError` unless the name can safely name a folder."""
    if not ENVIRONMENT_NAME.fullmatch(name):
        raise InputError(
            f"an environment's name has letters, digits, dots, dashes and underscores, starts with a letter or digit "
            f"and has at most {_LONGEST_NAME} of them; got {name!r}"
        )
    return name


def check_device_id(device_id: str) -> None:
    """Raises `InputError` for one that is too long to be kept beside every sample."""
    if len(device_id) > _LONGEST_NAME:
        raise InputError(f"a device's name has at most {_LONGEST_NAME} characters; got {len(device_id)} of them")


def check_target(target: str) -> str:
    """Raises `ConfigError` unless it is host:port: without a port, gRPC would silently take 443."""
    found = _TARGET.fullmatch(target)
    if found is None or not 0 < int(found[1]) < 2**16:
        raise ConfigError(f"the cloud's address is host:port, such as 127.0.0.1:50061; got {target!r}")
    return target


def require_finite(config: object) -> None:
    """Raises `ConfigError` if a float of a config dataclass is nan or infinite: every comparison with nan is false, so
    a bounds check would let it pass."""
    for field in fields(config):  # pyright: ignore[reportArgumentType]
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{field.name} must be a finite number, got {value}")
