"""The same replay on real sockets: `edgefm agent` and `edgefm cloud` as processes, and a link shaped by the same trace."""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...models.errors import ConfigError, EdgeFMError
from ..bench.clouds import cloud_without_learning, register
from ..processes import child_process, edgefm, follow_records, last_words
from ..shaper import LinkShaper, ShaperThread
from .settings import Outcome, ReplaySettings
from .stream import Stream

_ENVIRONMENT = "replay"
_POLL_S = 0.005


@dataclass(frozen=True)
class LiveRun:
    """`begin_ms`: where on the traces the first frame came. `parts_ms`: means over all samples of what was spent where.
    `query_framing_bytes`, `answer_bytes`: means, on the link."""

    outcome: Outcome
    parts_ms: dict[str, float]
    begin_ms: float
    query_framing_bytes: float
    answer_bytes: float


def run_live(stream: Stream, settings: ReplaySettings, student: str, console: Console) -> LiveRun:
    """Runs it in real time: as long as the frames take to come, and the cloud's start.

    Raises:
        EdgeFMError: a process failed; its last words are in the message.
    """
    with tempfile.TemporaryDirectory(prefix="edgefm-live-") as name:
        folder = Path(name)
        images = folder / "stream.tar"
        _write_stream(images, stream, settings)
        with cloud_without_learning(folder) as cloud:
            register(cloud, _ENVIRONMENT, stream.labels, student)
            command = _command(folder, images, settings)
            # Once past the link, so that fetching the student is none of the replay's.
            _run_agent([*command, f"--cloud={cloud.target}", "--limit=1", f"--output={folder / 'first'}"], folder)
            shaper = LinkShaper(
                "127.0.0.1",
                "127.0.0.1",
                cloud.port,
                settings.uplink,
                settings.downlink,
                settings.propagation_ms,
                reset_after_ms=settings.reset_after_ms,
            )
            with ShaperThread(shaper) as link:
                answers = folder / "answers.jsonl"
                command += [f"--cloud=127.0.0.1:{link.port}", f"--fps={settings.rate}", f"--output={answers}"]
                console.print(f"Live: {settings.samples} frames at {settings.rate:g} a second ...")
                records, began_ms = _follow(command, folder, answers, shaper)
                traffic = link.bytes_up, link.bytes_down
    outcome = Outcome.of(np.array([r["total_ms"] for r in records]), [r["route"] for r in records])
    asked = [r["bytes_sent"] for r in records if r["bytes_sent"]]
    first_ms = min(r["time_s"] * 1e3 - r["total_ms"] for r in records)
    return LiveRun(
        outcome,
        _parts(records),
        began_ms + first_ms,
        (traffic[0] - sum(asked)) / max(len(asked), 1),
        traffic[1] / max(len(asked), 1),
    )


def _parts(records: list[dict[str, Any]]) -> dict[str, float]:
    parts = {
        "device": ("decode_ms", "preprocess_ms", "student_ms"),
        "network": ("transit_ms",),
        "queue": ("queue_ms",),
        "compute": ("compute_ms",),
    }
    return {
        name: round(float(np.mean([sum(record[key] for key in keys) for record in records])), 3)
        for name, keys in parts.items()
    }


def _write_stream(path: Path, stream: Stream, settings: ReplaySettings) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(settings.samples):
            data = padded(stream.encoded[number % len(stream.encoded)], settings.payload_bytes)
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = len(data)
            tar.addfile(member, BytesIO(data))


def padded(image: bytes, size_bytes: int | None) -> bytes:
    """An encoded image of that size: decoders stop at its end and ignore what follows.

    Raises:
        ConfigError: the image is larger.
    """
    if size_bytes is None:
        return image
    if len(image) > size_bytes:
        raise ConfigError(f"a payload of {size_bytes} bytes is smaller than an image of {len(image)}")
    return image.ljust(size_bytes, b"\0")


def _command(folder: Path, images: Path, settings: ReplaySettings) -> list[str]:
    switcher = settings.switcher
    return edgefm(
        "agent",
        str(images),
        f"--environment={_ENVIRONMENT}",
        f"--state-dir={folder / 'agent'}",
        f"--objective={switcher.objective}",
        f"--accuracy-target={switcher.accuracy_target}",
        f"--latency-bound-ms={switcher.latency_bound_ms}",
        f"--audit-share={switcher.audit_share}",
        f"--deadline-ms={settings.deadline_ms}",
        "--upload=never",
    )


def _run_agent(command: list[str], folder: Path) -> None:
    log = folder / "agent.log"
    with child_process(command, log, stdout=subprocess.DEVNULL) as child:
        _check(child, log)


def _follow(command: list[str], folder: Path, answers: Path, shaper: LinkShaper) -> tuple[list[dict[str, Any]], float]:
    """Runs the agent; returns its records, and where on the traces its clock began, in ms.

    A record tells when it was written on the agent's clock, and it is read soon after: the earliest it can have begun is the
    truth, to the few ms that reading takes.
    """
    log, records, began_ms = folder / "agent.log", [], float("inf")
    with child_process(command, log, stdout=subprocess.DEVNULL) as child:
        for record in follow_records(answers, child, _POLL_S):
            records.append(record)
            began_ms = min(began_ms, shaper.elapsed_ms() - record["time_s"] * 1e3)
        _check(child, log)
    if not records:
        raise EdgeFMError(f"the agent answered nothing: {last_words(log)}")
    return records, began_ms


def _check(child: subprocess.Popen[str], log: Path) -> None:
    if child.wait() != 0:
        raise EdgeFMError(f"the agent failed with exit code {child.returncode}: {last_words(log)}")
