"""Settings from a TOML file with flags over it, checked in one place.

[cloud]                     edgefm.cloud.config.CloudConfig
[cloud.customization]       edgefm.cloud.config.CustomizationConfig
[agent]                     edgefm.edge.config.AgentConfig
[agent.switcher]            edgefm.edge.config.SwitcherConfig
"""

from __future__ import annotations

import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ..models.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

Config = TypeVar("Config")
SECTIONS = {"cloud", "agent"}


def load_config(kind: type[Config], section: str, path: Path | None, flags: dict[str, Any]) -> Config:
    """Builds a config dataclass: its defaults, under the file's `[section]`, under the flags that are not None.

    Args:
        flags: by field name; a dot reaches into a nested config (`switcher.objective`).

    Raises:
        ConfigError: an unreadable file, an unknown key or a value of the wrong kind, with its name.
    """
    sections = _read(path) if path else {}
    misspelt = sorted(sections.keys() - SECTIONS)
    if misspelt:
        raise ConfigError(f"{path} has an unknown section [{misspelt[0]}]; there are {', '.join(sorted(SECTIONS))}")
    values = sections.get(section, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: [{section}] must be a table")
    for name, value in flags.items():
        if value is None:
            continue
        *tables, key = name.split(".")
        target = values
        for table in tables:
            target = target.setdefault(table, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{path}: [{section}.{table}] must be a table, got {target!r}")
        target[key] = value
    _refuse_unknown(kind, values, section, path)
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([section, *map(str, first["loc"])])
        raise ConfigError(f"{where}: {first['msg']} (got {first['input']!r})") from None


def parse_labels(text: str | None) -> tuple[str, ...] | None:
    """`cat, dog` or `@FILE` with one label a line; None stays None.

    Raises:
        ConfigError: the file cannot be read.
    """
    if text is None:
        return None
    if text.startswith("@"):
        try:
            parts = Path(text[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the labels from {text[1:]}: {error}") from error
    else:
        parts = text.split(",")
    return tuple(label.strip() for label in parts if label.strip())


def parse_size(text: str) -> tuple[int, int]:
    """`640x480`. Raises `ConfigError` for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not found:
        raise ConfigError(f"a size in pixels is WIDTHxHEIGHT, such as 640x480; got {text!r}")
    return int(found[1]), int(found[2])


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the settings {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _refuse_unknown(kind: Any, values: dict[str, Any], section: str, path: Path | None) -> None:
    known = {field.name for field in fields(kind)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ConfigError(f"{path}: [{section}] has no setting {unknown[0]!r}; there are {', '.join(sorted(known))}")
    hints = get_type_hints(kind)
    for name, value in values.items():
        if is_dataclass(hints[name]) and isinstance(value, dict):
            _refuse_unknown(hints[name], value, f"{section}.{name}", path)
