"""The demo's timeline (one record per answer) in time bins: small enough to plot however long the run was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Record = Mapping[str, Any]

ROUTES = ("edge", "cloud", "fallback")
MAX_BINS = 120


@dataclass(frozen=True)
class Bins:
    """A timeline gathered into N equal time bins; NaN where a bin holds no value."""

    edges_s: np.ndarray  # (N + 1,)
    share: dict[str, np.ndarray]  # per route (N,): fraction of the bin's answers
    threshold: np.ndarray  # (N,) median
    margin: np.ndarray  # (N,) median
    bandwidth_mbps: np.ndarray  # (N,) median
    bands: list[tuple[float, float, str]]  # (start_s, end_s, environment), in order
    new_students: list[
        tuple[float, str]
    ]  # (time_s, version): its first answer, versions an environment began with left out


def bin_timeline(timeline: Sequence[Record], max_bins: int = MAX_BINS) -> Bins | None:
    """Gather the answers into at most `max_bins` bins; None for an empty timeline."""
    if not timeline:
        return None
    time_s = _column(timeline, "time_s")  # (T,)
    n = min(max_bins, max(1, len(timeline) // 5))
    start = float(time_s.min())
    edges = np.linspace(start, max(float(time_s.max()), start + 1e-3), n + 1)
    index = np.clip(np.searchsorted(edges, time_s, side="right") - 1, 0, n - 1)  # (T,)
    members = [np.flatnonzero(index == i) for i in range(n)]
    total = np.bincount(index, minlength=n).astype(float)
    total[total == 0] = np.nan
    routes = np.array([record["route"] for record in timeline])
    environments = [str(record["environment"]) for record in timeline]
    return Bins(
        edges_s=edges,
        share={route: np.bincount(index[routes == route], minlength=n) / total for route in ROUTES},
        threshold=_medians(_column(timeline, "threshold"), members),
        margin=_medians(_column(timeline, "margin"), members),
        bandwidth_mbps=_medians(_column(timeline, "bandwidth_mbps"), members),
        bands=_bands(edges, environments, members),
        new_students=_new_students(timeline),
    )


def _column(timeline: Sequence[Record], key: str) -> np.ndarray:
    """(T,) float64; None becomes NaN."""
    return np.array([np.nan if record[key] is None else record[key] for record in timeline], dtype=float)


def _medians(values: np.ndarray, members: Sequence[np.ndarray]) -> np.ndarray:
    finite = [values[m][np.isfinite(values[m])] for m in members]
    return np.array([np.median(v) if v.size else np.nan for v in finite])


def _bands(
    edges: np.ndarray, environments: Sequence[str], members: Sequence[np.ndarray]
) -> list[tuple[float, float, str]]:
    """Runs of bins with the same most frequent environment; an empty bin belongs to the run before it."""
    bands: list[tuple[float, float, str]] = []
    for start, end, member in zip(edges[:-1], edges[1:], members, strict=True):
        names = Counter([environments[int(i)] for i in member])
        name: str = names.most_common(1)[0][0] if names else bands[-1][2]
        if bands and bands[-1][2] == name:
            bands[-1] = (bands[-1][0], float(end), name)
        else:
            bands.append((float(start), float(end), name))
    return bands


def _new_students(timeline: Sequence[Record]) -> list[tuple[float, str]]:
    # a slow cloud answer may complete after the swap: only a version's first answer counts
    seen: dict[Any, set[Any]] = {}
    changes: list[tuple[float, str]] = []
    for record in timeline:
        versions = seen.setdefault(record["environment"], set())
        version = record["student_version"]
        if versions and version not in versions:
            changes.append((float(record["time_s"]), str(version)))
        versions.add(version)
    return changes
