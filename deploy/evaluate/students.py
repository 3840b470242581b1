"""`students`: what each student costs on a device and gives, and which one is chosen under which limit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.console import Console

from ...edge.profiler import ProfileOptions
from ...models.device_profile import DeviceProfile, Limits
from ...models.foundation import load_foundation_model
from ...models.selection import select_student
from ...models.students import INT8_SUFFIX, PROFILES, measured_accuracy
from ..device import profile_device
from ..export import export_students
from .experiment import Chart, Data, Experiment, Material, Shown, Table

_LIMITS = 12
_RUNS = 60


def profile_here(runs: int, console: Console) -> DeviceProfile:
    """Measures every student on this machine."""
    with tempfile.TemporaryDirectory(prefix="edgefm-students-") as name:
        export_students(Path(name), load_foundation_model("synclip"), list(PROFILES), lambda _: None)
        return profile_device(Path(name), "", Limits(), ProfileOptions(frame_size=(64, 64), runs=runs), console)


def measure(material: Material) -> dict[str, Any]:
    """Milliseconds are this device's; the accuracies are those of `edgefm bench students` that ship with the package."""
    profile = material.profile
    assert profile is not None
    rows = []
    for name in PROFILES:
        costs = [cost for cost in profile.students if cost.student == name]
        accuracies = {found.data: [found.version0, found.customized] for found in measured_accuracy(name)}
        if costs:
            best = min(costs, key=lambda cost: cost.frame_ms)
            rows.append(
                {"student": name, "accuracy": accuracies, **best.model_dump(), "frame_ms": round(best.frame_ms, 3)}
            )
    slowest = max(row["frame_ms"] for row in rows)
    limits = np.geomspace(min(row["frame_ms"] for row in rows) * 0.9, slowest * 1.2, _LIMITS)
    return {
        "device": profile.device,
        "source": profile.source,
        "rows": rows,
        "selection": [[round(float(limit), 2), _taken(profile, float(limit))] for limit in limits],
    }


def _taken(profile: DeviceProfile, limit_ms: float) -> str | None:
    taken = select_student(profile, Limits(latency_ms=limit_ms)).taken
    return None if taken is None else taken.student


def _mean(row: Data) -> float:
    return float(np.mean([customized for _, customized in row["accuracy"].values()]))


def show(data: Data) -> Shown:
    sets = list(data["rows"][0]["accuracy"])
    table = Table(
        ("student", "threads", "ms a frame, p95", "memory, MB", *(f"{name}: version 0 → customized" for name in sets)),
        [
            (
                row["student"],
                str(row["threads"]),
                f"{row['frame_ms']:.2f}",
                f"{row['peak_rss_mb']:.0f}",
                *("{:.3f} → {:.3f}".format(*row["accuracy"][name]) for name in sets),
            )
            for row in data["rows"]
        ],
        f"{data['device']}; {data['source']}. Preprocessing and student, one frame at a time.",
    )
    chosen = Table(
        ("limit, ms (95th percentile)", "chosen"),
        [(f"{limit:.1f}", taken or "none fits") for limit, taken in data["selection"]],
        "The most accurate student that keeps the limit.",
    )
    order = list(dict.fromkeys(taken for _, taken in data["selection"] if taken))
    findings = [f"On this device, as the limit grows, selection takes {', then '.join(order)}."] if order else []

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for int8, mark, colour, label in ((False, "o", "#1f5a96", "float"), (True, "s", "#b3261e", "INT8")):
            rows = [row for row in data["rows"] if row["student"].endswith(INT8_SUFFIX) == int8]
            ax.plot(
                [r["frame_ms"] for r in rows], [100 * _mean(r) for r in rows], mark, color=colour, ms=7, label=label
            )
            for row in rows:
                place = (5, -11) if int8 else (5, 4)
                at = (row["frame_ms"], 100 * _mean(row))
                ax.annotate(row["student"], at, xytext=place, textcoords="offset points", fontsize=7)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set(xlabel="ms a frame (95th percentile, log scale)", ylabel="accuracy, customized (%)")
        ax.legend(loc="lower right")

    caption = f"Accuracy (mean of {' and '.join(sets)}) against time on {data['device']}."
    return Shown(findings, [table, chosen], [Chart("students-plane", caption, draw)])


EXPERIMENT = Experiment(
    "students",
    "Which student for which device",
    lambda m: (
        "the most accurate student within a latency limit; accuracies at 1,600 samples labelled by the FM; no link in it"
    ),
    measure,
    show,
)
