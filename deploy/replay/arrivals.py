"""When frames come."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...models.errors import ConfigError, InputError


def fixed_rate(samples: int, per_s: float) -> np.ndarray:
    """(samples,) ms, evenly spaced from 0 on."""
    return np.arange(samples) * (1e3 / _checked(per_s))


def poisson(samples: int, per_s: float, seed: int) -> np.ndarray:
    """(samples,) ms with independent exponential gaps."""
    return np.random.default_rng(seed).exponential(1e3 / _checked(per_s), samples).cumsum()


def recorded(path: Path) -> np.ndarray:
    """(N,) ms from a text file with a time in seconds on each line, in order; the first frame comes at 0.

    Raises:
        InputError: naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the arrival times {path}: {error}") from error
    times: list[float] = []
    for number, line in enumerate(lines, start=1):
        try:
            time_s = float(line)
        except ValueError:
            raise InputError(f"{path}: line {number}: {line[:40]!r} is not a number of seconds") from None
        if not np.isfinite(time_s):
            raise InputError(f"{path}: line {number}: {line[:40]!r} is not a finite number of seconds")
        if times and time_s < times[-1]:
            raise InputError(f"{path}: line {number}: {time_s} s comes after {times[-1]} s; sort the times")
        times.append(time_s)
    if not times:
        raise InputError(f"{path} is empty; it needs a time in seconds on each line")
    return (np.array(times) - times[0]) * 1e3


def _checked(per_s: float) -> float:
    if not 0 < per_s < float("inf"):
        raise ConfigError(f"a rate of arrivals is a positive number of frames per second, got {per_s}")
    return per_s
