"""`edgefm profile`, `edgefm select`, and what `--student auto` means."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from ..edge.config import AgentConfig
from ..edge.machine import describe_machine, machine_state
from ..edge.profiler import ProfileOptions, find_students, profile_students
from ..models.device_profile import DeviceProfile, Limits
from ..models.errors import ConfigError
from ..models.selection import Selection, select_student
from ..models.students import PROFILES, measured_accuracy

AUTO = "auto"
NO_LIMITS = Limits()
_MUCH_OTHER_WORK = 0.5
"""Busy processes for each core."""


def profile_device(
    students: Path, device: str, limits: Limits, options: ProfileOptions, console: Console
) -> DeviceProfile:
    """Measures every student in `students` on this machine.

    Raises:
        InputError: no student there. ModelError: one cannot be loaded or run.
    """
    found = find_students(students)
    before = machine_state()
    with console.status("Measuring ...") as status:
        costs = profile_students(found, options, lambda what: status.update(f"Measuring {what} ..."))
    machine = describe_machine()
    if (before["busy"] or 0.0) > _MUCH_OTHER_WORK * machine["cores"]:
        console.print(
            f"warning: before the measurement {before['busy']:g} processes wanted this machine's {machine['cores']} cores; "
            "the figures are higher than an idle device's"
        )
    measuring = {"frame_size": list(options.frame_size), "runs": options.runs, "batch": 1}
    state = {"before": before, "after": machine_state()}
    return DeviceProfile(
        source=f"edgefm profile, {date.today().isoformat()}",
        device=device or machine["board"] or machine["processor"],
        students=costs,
        limits=limits,
        machine={**machine, **measuring, **state},
    )


def explain(profile: DeviceProfile, selection: Selection) -> Table:
    """Every student with its cost, its accuracy and the reason it was taken or not."""
    caption = f"Figures: {profile.source}. {_accuracy_source()}"
    table = Table(title=f"{profile.device}: {selection.limits}", caption=caption, box=box.SIMPLE_HEAD)
    for heading in ("student", "threads", "preprocess + student p95, ms", "memory, MB", "accuracy", "verdict"):
        left = heading in ("student", "verdict")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading == "student")
    for verdict in selection.verdicts:
        cost = verdict.cost
        cells = ["-", "-", "-"]
        if cost is not None:
            spent = f"{cost.preprocess_ms:.2f} + {cost.session_p95_ms:.2f}"
            cells = [str(cost.threads), spent, f"{cost.peak_rss_mb:.0f}"]
        accuracy = "-" if verdict.accuracy is None else f"{verdict.accuracy:.3f}"
        style = "bold" if cost is not None and cost is selection.taken else None
        table.add_row(verdict.student, *cells, accuracy, verdict.reason, style=style)
    return table


def limits_of(latency_ms: float | None, memory_mb: float | None, otherwise: Limits = NO_LIMITS) -> Limits:
    """The given limits over the others. Raises `ConfigError` unless they are positive numbers."""
    try:
        return Limits(
            latency_ms=otherwise.latency_ms if latency_ms is None else latency_ms,
            memory_mb=otherwise.memory_mb if memory_mb is None else memory_mb,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{first['loc'][0]}: {first['msg']} (got {first['input']!r})") from None


def _accuracy_source() -> str:
    sets = sorted({result.data for name in PROFILES for result in measured_accuracy(name)})
    return f"Accuracy: customized, mean of {', '.join(sets)} (edgefm bench students)."


def with_selected_student(config: AgentConfig) -> AgentConfig:
    """For `student = "auto"`: the student, and its number of threads, that the device profile selects.

    Raises:
        ConfigError: no device profile or an unreadable one, or no student that fits its limits.
    """
    if (config.student == AUTO) != (config.device_profile is not None):
        raise ConfigError("student 'auto' and device_profile go together: make the file with 'edgefm profile'")
    if config.device_profile is None:
        return config
    profile = DeviceProfile.load(config.device_profile)
    taken = select_student(profile, profile.limits).require(profile.device)
    return replace(config, student=taken.student, threads=taken.threads)
