"""`edgefm bench memory`: does the cloud's memory grow with the requests it answers?

A real cloud with its real FM, 64 devices asking as fast as they are answered, and the process's resident memory sampled twenty
times on the way. The growth is the slope of a line through the samples after the first quarter, by which allocators, pools
and caches have reached their size.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from ..demo_results import describe_environment
from .clouds import cloud_without_learning, register
from .cost import resident_mb
from .load import Load, load_cloud
from .pictures import LABELS, pictures

CLIENTS = 64
SAMPLES = 20
_PICTURES = 32
_SETTLED = 0.25


def bench_memory(requests: int, keep: bool, seed: int, console: Console, clients: int = CLIENTS) -> dict[str, Any]:
    """Resident memory against requests.

    Args:
        requests: in all; each part of a twentieth has connections of its own, so what devices leave behind counts.
        keep: the cloud stores every sample, each of them new.

    Raises:
        EdgeFMError: the cloud does not start, or fails to answer.
    """
    images = pictures(64, 64, _PICTURES, seed)
    points: list[tuple[int, float]] = []
    seconds = 0.0
    with (
        tempfile.TemporaryDirectory() as folder,
        cloud_without_learning(Path(folder)) as cloud,
        ProcessPoolExecutor(1, get_context("spawn")) as process,
    ):
        register(cloud, "bench", LABELS)
        answered = 0
        for number in track(range(SAMPLES), "Asking ...", console=console, transient=True):
            first = number * (requests // SAMPLES)
            load = Load(images, clients, 0.0, requests=requests // SAMPLES, distinct_from=first if keep else None)
            done = process.submit(load_cloud, cloud.port, "bench", keep, load).result()
            answered += done.all_requests
            seconds += done.seconds
            points.append((answered, resident_mb(cloud.pid)))
    result = {
        "keep": keep,
        "clients": clients,
        "requests": answered,
        "seconds": round(seconds, 1),
        "resident_mb": [[count, round(memory, 1)] for count, memory in points],
        "growth_mb_per_10000_requests": round(_slope(points) * 10_000, 3),
        "environment": describe_environment(seed),
    }
    console.print(
        f"{answered} requests in {seconds:.0f} s: {points[0][1]:.0f} MB after the first {points[0][0]}, "
        f"{points[-1][1]:.0f} MB in the end; {result['growth_mb_per_10000_requests']:+.2f} MB for 10,000 requests"
    )
    return result


def _slope(points: list[tuple[int, float]]) -> float:
    """10⁶ bytes a request, by least squares, once settled."""
    settled = np.array(points[int(_SETTLED * len(points)) :])  # (N, 2)
    return float(np.polyfit(settled[:, 0], settled[:, 1], 1)[0])
