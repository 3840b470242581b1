"""What processes have cost so far, as Linux tells it."""

from __future__ import annotations

import os
from pathlib import Path

from ...models.errors import InputError

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


def cpu_s(session: int) -> float:
    """CPU seconds of all living processes of a session: a server with its workers."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # from the state on; the name may hold anything
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session:
            total += (int(fields[11]) + int(fields[12])) * _TICK_S
    return total


def resident_mb(pid: int) -> float:
    """Memory that a process holds now, in 10⁶ bytes. Raises `InputError` where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024 / 1e6
    except (OSError, StopIteration) as error:
        raise InputError(f"this system does not tell the memory of process {pid}; measure on Linux") from error
