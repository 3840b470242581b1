"""Checks that the settings of device and cloud share."""

from __future__ import annotations

import math
from dataclasses import fields

from .errors import ConfigError


def require_finite(config: object) -> None:
    """Raises `ConfigError` if a float of a config dataclass is nan or infinite: every comparison with nan is false, so
    a bounds check would let it pass."""
    for field in fields(config):  # pyright: ignore[reportArgumentType]
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{field.name} must be a finite number, got {value}")
