"""How far the memory of this process rises, by Linux's own mark. `getrusage`'s goes over an exec and never falls."""

from __future__ import annotations

import ctypes
from pathlib import Path

_M_MMAP_THRESHOLD = -3  # malloc.h


def lowered() -> int:
    """Begins the mark anew; returns what is resident now, in kB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def freed_at_once() -> None:
    """From now on what this process frees, from 64 KiB on, goes back to the system, and is seen when it comes again."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 65536)


def risen_mib(resident_kb: int) -> float:
    """From what `lowered` returned to the mark, in MiB."""
    return (_status("VmHWM") - resident_kb) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
