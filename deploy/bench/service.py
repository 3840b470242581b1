"""`edgefm bench service`: requests a second and latency of the cloud, beside LitServe and beside the FM without a service.

Three rivals with the same FM, decoder, pool and largest batch take turns within each repeat; figures are medians over repeats.

- `edgefm`: `edgefm cloud` as a process, gRPC over loopback. `edgefm keep`: the same, every picture new and kept in the store.
- `litserve`: see `edgefm.deploy.bench.litserve_server`; HTTP over loopback.
- `direct`: see `edgefm.deploy.bench.direct`. It has no clients, and both cores to itself. `direct, beside`: the same beside
  a process that takes as much CPU time as EdgeFM's clients took in that repeat: what a service could reach at most on this
  machine while its clients run here too.

Clients are closed loops in a process of their own (`edgefm.deploy.bench.load`) on the servers' machine. `server_cpu_ms` and
`client_cpu_ms` are CPU time per request. They depend less than throughput on what else the machine does: a busy kernel
shares its cores among processes, and a server with its clients is more of them than the bare FM.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ...cloud.config import CloudConfig
from ...models.errors import ConfigError, EdgeFMError
from ..demo_results import describe_environment
from ..processes import child_process, last_words
from .clouds import cloud_without_learning, register
from .cost import cpu_s
from .direct import compute, occupy
from .load import Answered, Load, load_cloud, load_http
from .pictures import LABELS, pictures

ENVIRONMENT = "bench"
SIZES = ((64, 64), (640, 480))
_PICTURES = 32
_STARTUP_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class ServiceOptions:
    """How to measure.

    Attributes:
        clients: numbers of concurrent clients.
        sizes: width and height of the pictures.
        warm_up_s, seconds: of every measurement.
        fm: URI of the foundation model, see `edgefm.models.foundation`.
    """

    clients: tuple[int, ...] = (1, 8, 64)
    sizes: tuple[tuple[int, int], ...] = SIZES
    repeats: int = 7
    warm_up_s: float = 1.0
    seconds: float = 3.0
    seed: int = 0
    fm: str = CloudConfig().foundation_model

    def __post_init__(self) -> None:
        if self.repeats < 1 or not 0 < self.seconds <= 3600:
            raise ConfigError(
                f"repeats must be at least 1, seconds in (0, 3600], got {self.repeats} and {self.seconds:g}"
            )


class _Rivals:
    """The servers and the processes that put load on them; only one works at a time."""

    def __init__(self, stack: ExitStack, folder: Path, fm: str) -> None:
        self._fm = fm
        self._cloud = stack.enter_context(cloud_without_learning(folder, fm))
        register(self._cloud, ENVIRONMENT, LABELS)
        self._litserve = stack.enter_context(_litserve(folder, fm))
        os.killpg(self._litserve[0], signal.SIGSTOP)  # its worker polls, which would cost the others a part of a core
        spawn = get_context("spawn")
        self._load, self._direct, self._beside = (
            stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in ("load", "direct", "beside")
        )

    def edgefm(self, load: Load, keep: bool = False) -> dict[str, Any]:
        ask = self._load.submit
        return _served(
            self._cloud.pid, load, lambda: ask(load_cloud, self._cloud.port, ENVIRONMENT, keep, load).result()
        )

    def litserve(self, load: Load) -> dict[str, Any]:
        pid, port = self._litserve
        os.killpg(pid, signal.SIGCONT)
        try:
            return _served(pid, load, lambda: self._load.submit(load_http, port, "/predict", load).result())
        finally:
            os.killpg(pid, signal.SIGSTOP)

    def direct(self, load: Load, beside: float = 0.0) -> dict[str, Any]:
        """`beside`: cores' worth of time that another process takes meanwhile."""
        config = CloudConfig()
        other = self._beside.submit(occupy, beside, load.warm_up_s + load.seconds)
        done = self._direct.submit(
            compute, self._fm, LABELS, load.images, config.max_batch, load.warm_up_s, load.seconds
        ).result()
        other.result()
        return {
            "requests": done.samples,
            "requests_per_s": done.samples / done.seconds,
            "server_cpu_ms": done.cpu_s * 1e3 / done.samples,
        }


@contextmanager
def _litserve(folder: Path, fm: str) -> Iterator[tuple[int, int]]:
    """Process (and session) id, and port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = folder / "litserve.log"
    command = [sys.executable, "-m", "edgefm.deploy.bench.litserve_server", str(port), fm, *LABELS]
    with log.open("a") as out, child_process(command, log, stdout=out) as child:
        deadline = time.monotonic() + _STARTUP_TIMEOUT_S
        while not _healthy(port):
            if child.poll() is not None or time.monotonic() > deadline:
                raise EdgeFMError(f"LitServe did not start; {log} ends with: {last_words(log)}")
            time.sleep(0.2)
        try:
            yield child.pid, port
        finally:
            os.killpg(child.pid, signal.SIGKILL)  # its workers outlive an interrupt


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1.0) as answer:
            return answer.status == 200
    except OSError:
        return False


def _served(session: int, load: Load, run: Callable[[], Answered]) -> dict[str, Any]:
    before_s = cpu_s(session)
    answered = run()
    used_s = cpu_s(session) - before_s
    count = len(answered.latencies_ms)
    if not count:
        raise EdgeFMError(f"no answer within {load.seconds} s; measure for longer")
    p50, p99 = np.percentile(answered.latencies_ms, (50, 99))
    return {
        "requests": count,
        "requests_per_s": count / answered.seconds,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "server_cpu_ms": used_s * 1e3 / answered.all_requests,
        "client_cpu_ms": answered.cpu_s * 1e3 / answered.all_requests,
        "labels": len(answered.labels),
    }


def bench_service(options: ServiceOptions, console: Console) -> dict[str, Any]:
    """Measures all three, interleaved.

    Raises:
        EdgeFMError: a server does not start, or fails to answer.
    """
    rows: dict[tuple[str, str, int | None], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        with console.status("Starting the servers ..."):
            rivals = _Rivals(stack, Path(folder), options.fm)
        for repeat in range(options.repeats):
            for size in options.sizes:
                with console.status(f"Repeat {repeat + 1} of {options.repeats}, pictures of {_name(size)} ..."):
                    images = pictures(*size, _PICTURES, options.seed)
                    for system, clients, measured in _round(rivals, images, options):
                        rows.setdefault((_name(size), system, clients), []).append(measured)
    result = {
        "foundation_model": options.fm,
        "rows": [
            {"picture": picture, "system": system, "clients": clients, **_summary(measured)}
            for (picture, system, clients), measured in rows.items()
        ],
        "repeats": options.repeats,
        "seconds": options.seconds,
        "max_batch": CloudConfig().max_batch,
        "max_delay_ms": CloudConfig().max_delay_ms,
        "environment": describe_environment(options.seed, "litserve"),
    }
    result["ratios"] = {_name(size): _ratios(rows, _name(size), options.clients) for size in options.sizes}
    console.print(_table(result))
    for picture, ratios in result["ratios"].items():
        told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        console.print(f"{picture}, edgefm over the others, medians of the repeats' ratios: {told}")
    return result


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _round(
    rivals: _Rivals, images: Sequence[bytes], options: ServiceOptions
) -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    for clients in options.clients:
        load = Load(images, clients, options.warm_up_s, options.seconds)
        edgefm = rivals.edgefm(load)
        yield "edgefm", clients, edgefm
        yield "litserve", clients, rivals.litserve(load)
        if clients == max(options.clients):
            yield "edgefm keep", clients, rivals.edgefm(replace(load, distinct_from=time.time_ns()), keep=True)
            yield "direct", None, rivals.direct(load)
            share = edgefm["client_cpu_ms"] * edgefm["requests_per_s"] / 1e3
            yield "direct, beside", None, rivals.direct(load, min(share, 1.0))


def _summary(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repeats, and every repeat's throughput."""
    medians = {name: round(float(np.median([one[name] for one in measured])), 3) for name in measured[0]}
    return {**medians, "requests_per_s_each": [round(one["requests_per_s"], 1) for one in measured]}


def _ratios(
    rows: Mapping[tuple[str, str, int | None], list[dict[str, Any]]], picture: str, clients: Sequence[int]
) -> dict[str, float]:
    """EdgeFM's figures over the others' of the same repeat, medians: the machine's speed wanders from one to the next. Below 1 is
    better for `p99_litserve`, above 1 elsewhere; the bare FM stands beside the most clients."""

    def ratio(figure: str, rival: str, rival_clients: int | None, count: int) -> float:
        pairs = zip(rows[picture, "edgefm", count], rows[picture, rival, rival_clients], strict=True)
        return round(float(np.median([ours[figure] / theirs[figure] for ours, theirs in pairs])), 3)

    most = max(clients)
    return {
        "direct": ratio("requests_per_s", "direct", None, most),
        "direct_beside": ratio("requests_per_s", "direct, beside", None, most),
        **{f"litserve_{count}": ratio("requests_per_s", "litserve", count, count) for count in clients},
        **{f"p99_litserve_{count}": ratio("p99_ms", "litserve", count, count) for count in clients},
    }


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"Medians of {result['repeats']} repeats; CPU: server + client, a request", box=SIMPLE_HEAD)
    for heading in ("picture", "system", "clients", "requests/s", "p50 ms", "p99 ms", "CPU ms"):
        table.add_column(heading, justify="left" if heading in ("picture", "system") else "right")
    for row in result["rows"]:
        latencies = [f"{row[name]:.1f}" if name in row else "" for name in ("p50_ms", "p99_ms")]
        cpu = " + ".join(f"{row[name]:.2f}" for name in ("server_cpu_ms", "client_cpu_ms") if name in row)
        rate = f"{row['requests_per_s']:.0f}"
        table.add_row(row["picture"], row["system"], str(row["clients"] or ""), rate, *latencies, cpu)
    return table
