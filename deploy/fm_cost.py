"""What a foundation model costs on a device, and whether to run it there."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from ..edge.profiler import LEAST_RUNS, WARM_UP_RUNS, ProfileOptions, peak_memory_mb, picture_of, rounded
from ..models.device_profile import DeviceProfile, FoundationModelCost, Limits
from ..models.errors import ModelError


def measure_foundation_model(name: str, options: ProfileOptions) -> FoundationModelCost:
    """In a process of its own, on all cores. Needs the cloud's packages.

    Raises:
        ConfigError, ModelError: there is no such model, or it cannot be loaded or run here.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        try:
            return process.submit(_measure, name, options).result()
        except BrokenProcessPool as error:
            raise ModelError(f"the process that ran {name} was ended by the system; is the memory enough?") from error


def _measure(name: str, options: ProfileOptions) -> FoundationModelCost:
    from ..models.foundation import load_foundation_model

    model, taken_ms = load_foundation_model(name), []
    picture, began = picture_of(options.frame_size), time.perf_counter()
    while len(taken_ms) < options.runs + WARM_UP_RUNS:
        started = time.perf_counter()
        model.embed_images([picture])
        taken_ms.append((time.perf_counter() - started) * 1e3)
        if time.perf_counter() - began > options.patience_s and len(taken_ms) >= LEAST_RUNS + WARM_UP_RUNS:
            break
    kept = taken_ms[WARM_UP_RUNS:]
    return FoundationModelCost(
        name=name,
        frame_p50_ms=rounded(kept, 50),
        frame_p95_ms=rounded(kept, 95),
        peak_rss_mb=peak_memory_mb(),
    )


def advise(profile: DeviceProfile, limits: Limits) -> str | None:
    """Whether the FM belongs on the device, in words; None where it was not measured there."""
    fm = profile.foundation_model
    if fm is None:
        return None
    costs = (
        f"{fm.name} itself takes {fm.frame_p95_ms:.1f} ms a frame here (95th percentile) and {fm.peak_rss_mb:.0f} MB"
    )
    if not limits.keep(fm.frame_p95_ms, fm.peak_rss_mb):
        return f"{costs}: more than {limits}. A student here, and the FM in a cloud."
    return (
        f"{costs}, within {limits}. A query to a cloud takes its computation there and a round trip besides: where the device "
        "has nothing else to do, the FM's own accuracy is had sooner here. Run 'edgefm cloud' on the device, and the agent "
        "with --cloud 127.0.0.1:50061 --accuracy-target 1."
    )
