"""What machine this is, and how warm, as far as Linux tells without special rights."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("edgefm", "onnxruntime", "numpy", "pillow")


def describe_machine() -> dict[str, Any]:
    """Processor, board, cores that this process may use, memory, system, versions and execution providers."""
    import onnxruntime as ort  # slow to load, and only wanted here

    return {
        "processor": _processor(),
        "board": _text(Path("/proc/device-tree/model")),  # Raspberry Pi, Jetson; None on a PC
        "cores": usable_cores(),
        "memory_mb": _memory_mb(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "providers": ort.get_available_providers(),
    }


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_state() -> dict[str, float | None]:
    """What may spoil a measurement now; None where the system does not tell, as virtual machines do not.

    `temperature_c`: the warmest sensor. `clock_share`: the slowest core's clock as a share of its highest; much below 1
    under load, the device is throttled. `busy`: processes that wanted a core, mean of the last minute.
    """
    temperatures = [_number(path / "temp") for path in Path("/sys/class/thermal").glob("thermal_zone*")]
    degrees = [milli / 1e3 for milli in temperatures if milli is not None]
    shares = []
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"):
        now, highest = _number(folder / "scaling_cur_freq"), _number(folder / "cpuinfo_max_freq")
        if now and highest:
            shares.append(round(now / highest, 3))
    return {
        "temperature_c": max(degrees, default=None),
        "clock_share": min(shares, default=None),
        "busy": round(os.getloadavg()[0], 2),
    }


def peak_rss_mb() -> float | None:
    """Most memory that this process has taken, in 10^6 bytes; None where the system does not tell."""
    status = _text(Path("/proc/self/status")) or ""
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 / 1e6 if found else None


def _processor() -> str:
    found = re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")) or "", re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _memory_mb() -> int | None:
    found = re.search(r"^MemTotal:\s+(\d+) kB", _text(Path("/proc/meminfo")) or "", re.MULTILINE)
    return round(int(found[1]) * 1024 / 1e6) if found else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return None


def _number(path: Path) -> float | None:
    try:
        return float(_text(path) or "")
    except ValueError:
        return None
