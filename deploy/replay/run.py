"""`edgefm replay`: one stream over one link, on a virtual clock and, if wanted, on real sockets."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ...models.device_profile import DeviceProfile
from ...models.errors import ConfigError, EdgeFMError
from ..demo_results import describe_environment
from .arrivals import fixed_rate, poisson, recorded
from .engine import Replayed
from .recording import Recording
from .settings import Outcome, ReplaySettings, disagreements
from .systems import System
from .timing import CloudProfile, Timing, student_timing
from .virtual import outcome_of, run_virtual

_RECORDING_SUFFIX = ".npz"


@dataclass(frozen=True)
class ReplayOptions:
    """See `edgefm replay --help`."""

    source: Path
    settings: ReplaySettings
    student: str
    labels: tuple[str, ...] = ()
    arrivals: str = "fixed"
    device_profile: Path | None = None
    cloud_profile: Path | None = None
    record_to: Path | None = None
    profile_to: Path | None = None
    live: bool = False

    def __post_init__(self) -> None:
        if self.live and (self.arrivals != "fixed" or self.is_recording):
            raise ConfigError("a live replay takes images, at a fixed rate")
        if self.is_recording and (self.labels or self.record_to or self.profile_to):
            raise ConfigError("a recording is said and done: --labels, --record-to and --cloud-profile-to need images")
        if self.settings.reset_after_ms is not None and not self.live:
            raise ConfigError("on the virtual clock outages stall; --reset-after-ms needs --live")

    @property
    def is_recording(self) -> bool:
        return self.source.suffix == _RECORDING_SUFFIX


def run_replay(options: ReplayOptions, console: Console) -> dict[str, Any]:
    """Prints what came out; returns it. `disagreements` of the result names what live and virtual differ in.

    Raises:
        InputError, ConfigError: bad images, recording, profile or arrival times. EdgeFMError: a live process failed.
    """
    recording, device, cloud, stream = _inputs(options, console)
    settings, arrivals_ms = options.settings, _arrivals(options)
    if len(arrivals_ms) < settings.samples:
        settings = replace(settings, samples=len(arrivals_ms))
    live, begin_ms = None, 0.0
    if options.live and stream is not None:
        from .live import run_live

        live = run_live(stream, settings, options.student, console)
        begin_ms = live.begin_ms
    began = time.perf_counter()
    replayed, system = run_virtual(recording, device, cloud, settings, arrivals_ms[: settings.samples], begin_ms)
    seconds = time.perf_counter() - began
    virtual = outcome_of(replayed)
    found = [] if live is None else disagreements(live.outcome, virtual)
    result = {
        "virtual": virtual.as_dict(),
        "predicted_mean_ms": _predicted(replayed),
        "parts_ms": _parts(replayed),
        "accuracy": _accuracy(system, replayed),
        "live": None if live is None else live.outcome.as_dict(),
        "live_parts_ms": None if live is None else live.parts_ms,
        "live_query_framing_bytes": None if live is None else round(live.query_framing_bytes, 1),
        "live_answer_bytes": None if live is None else round(live.answer_bytes, 1),
        "disagreements": found,
        "samples_per_second": round(settings.samples / seconds),
        "settings": _described(options, settings, device, cloud),
        "environment": describe_environment(settings.seed),
    }
    console.print(_table(result, None if live is None else live.outcome, virtual))
    return result


def _inputs(options: ReplayOptions, console: Console) -> tuple[Recording, Timing, CloudProfile, Any]:
    """Recording, timings of device and cloud, and the images if there are any."""
    device = cloud = stream = None
    if options.device_profile is not None:
        device = student_timing(DeviceProfile.load(options.device_profile), options.student)
    if options.cloud_profile is not None:
        cloud = CloudProfile.load(options.cloud_profile)
    if options.is_recording:
        if device is None or cloud is None:
            raise ConfigError("a recording has no times: give --device-profile and --cloud-profile")
        return Recording.load(options.source), device, cloud, None
    from .stream import Stream, measure_cloud, record

    # Errors of the images come before the slow part, and not after minutes of measuring.
    stream = Stream.open(options.source, options.settings.samples, options.labels)
    if options.live:
        from .live import padded

        padded(max(stream.encoded, key=len), options.settings.payload_bytes)
    with console.status("Asking student and FM ..."):
        from ...models.foundation import load_foundation_model

        model = load_foundation_model("synclip")
        recording, measured = record(stream, model, options.student)
        cloud = cloud or measure_cloud(stream, model, options.student)
    if options.record_to is not None:
        recording.save(options.record_to)
    if options.profile_to is not None:
        cloud.save(options.profile_to)
    return recording, device or measured, cloud, stream


def _arrivals(options: ReplayOptions) -> np.ndarray:
    settings = options.settings
    if options.arrivals == "fixed":
        return fixed_rate(settings.samples, settings.rate)
    if options.arrivals == "poisson":
        return poisson(settings.samples, settings.rate, settings.seed)
    return recorded(Path(options.arrivals))


def _predicted(replayed: Replayed) -> float | None:
    predicted = replayed.predicted_ms[np.isfinite(replayed.predicted_ms)]
    return round(float(predicted.mean()), 3) if len(predicted) else None


def _parts(replayed: Replayed) -> dict[str, float]:
    """Means over all samples: what of the latency was spent where."""
    names = {"device": "device_ms", "network": "transit_ms", "queue": "queue_ms", "compute": "compute_ms"}
    return {part: round(float(getattr(replayed, name).mean()), 3) or 0.0 for part, name in names.items()}


def _accuracy(system: System, replayed: Replayed) -> dict[str, float]:
    each = {"system": replayed.right(system), "fm": system.cloud_right, "student": system.edge_right}
    return {name: round(float(values.mean()), 4) for name, values in each.items()}


def _described(options: ReplayOptions, settings: ReplaySettings, device: Timing, cloud: CloudProfile) -> dict[str, Any]:
    return {
        "source": options.source.name,
        "student": options.student,
        "uplink": settings.uplink.name,
        "downlink": settings.downlink.name,
        "arrivals": options.arrivals if options.arrivals in ("fixed", "poisson") else Path(options.arrivals).name,
        "rate": settings.rate,
        "payload_bytes": settings.payload_bytes,
        "propagation_ms": settings.propagation_ms,
        "deadline_ms": settings.deadline_ms,
        "objective": settings.switcher.objective,
        "accuracy_target": settings.switcher.accuracy_target,
        "caution": settings.switcher.caution,
        "latency_bound_ms": settings.switcher.latency_bound_ms,
        "device_ms": {"p50": device.p50_ms, "p95": device.p95_ms},
        "cloud": cloud.model_dump(mode="json", exclude={"machine"}),
    }


def _table(result: dict[str, Any], live: Outcome | None, virtual: Outcome) -> Table:
    settings, parts = result["settings"], result["parts_ms"]
    payload = settings["payload_bytes"]
    predicted = result["predicted_mean_ms"]
    table = Table(
        title=f"{settings['source']} over {settings['uplink']}, {_rate(settings)}",
        caption=f"{'images as they are' if payload is None else f'{payload} bytes an image'}, "
        f"{2 * settings['propagation_ms']:g} ms of propagation both ways. Mean of "
        + ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
        + " ms"
        + ("" if predicted is None else f"; the switcher predicted {predicted:.1f} ms")
        + f". Accuracy {result['accuracy']['system']:.3f}, FM {result['accuracy']['fm']:.3f}, "
        f"student {result['accuracy']['student']:.3f}. {result['samples_per_second']} samples a second replayed.",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("")
    table.add_column("virtual", justify="right")
    if live is not None:
        table.add_column("live", justify="right")
    for name, text, form in (
        ("samples", "samples", "{:d}"),
        ("mean_ms", "latency, mean, ms", "{:.1f}"),
        ("p50_ms", "median", "{:.1f}"),
        ("p95_ms", "95th percentile", "{:.1f}"),
        ("edge_share", "edge share", "{:.1%}"),
        ("cloud_share", "answered by the FM", "{:.1%}"),
        ("fallback_share", "fallback", "{:.1%}"),
    ):
        cells = [form.format(getattr(outcome, name)) for outcome in (virtual, live) if outcome is not None]
        table.add_row(text, *cells)
    return table


def _rate(settings: dict[str, Any]) -> str:
    if settings["arrivals"] in ("fixed", "poisson"):
        return f"{settings['rate']:g} frames a second"
    return f"frames at the times of {settings['arrivals']}"


def raise_if_disagreeing(result: dict[str, Any]) -> None:
    """Raises `EdgeFMError` naming what live and virtual replay differ in by more than they may."""
    if result["disagreements"]:
        raise EdgeFMError("live and virtual replay disagree: " + "; ".join(result["disagreements"]))
