"""`edgefm bench agent`: what the agent adds around the bare ONNX session, for frames that the edge answers.

A real agent (its state folder, a cloud process that it has registered with, the default objective, answers written as JSON
Lines) and the bare session of the same student take turns in one process, block by block, on the same JPEG frames. The
bare loop decodes and preprocesses each frame as the agent does, so that the session starts with the same caches; its time
is taken around the session alone. A session has the product's options (`edgefm.models.runtime`).

The accuracy target is so low that the edge answers all frames once agreement is known; a frame that goes to the cloud all
the same is counted and left out. The cloud does not learn meanwhile.

    overhead = from handing a frame to the agent until it asks for the next - decode - preprocess - session

with that frame's own session, so that the noise of sessions, which is ten times the overhead, is not in it. That the agent does
not make the session itself slower is seen beside the bare one (`session_in_agent_ms`, `session_ms`), and in
`overhead_beside_bare_ms`, which subtracts the bare session's median for the same picture instead.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ...edge.agent import Agent
from ...edge.config import AgentConfig, SwitcherConfig
from ...edge.frames import Frame
from ...edge.local_state import LocalState, no_fetch
from ...edge.sinks import JsonLines
from ...models.errors import EdgeFMError
from ...models.images import decode_image
from ...models.runtime import OnnxModel
from ...models.students import StudentProfile, student_profile
from ...models.versions import GRAPH_FILE
from ..demo_results import describe_environment
from .clouds import cloud_without_learning
from .pictures import LABELS, pictures

FRAME_SIZE = (640, 480)
_PICTURES = 30
_SETTLED = 30
"""Answers of the edge in a row after which the cold start is over."""
_COLD_START = 1500
"""Frames that it may take."""


@dataclass
class _Timed:
    """Milliseconds of one student; P pictures, R rounds."""

    walls: dict[str, float] = field(default_factory=dict)  # by sample id
    in_frame: dict[str, float] = field(default_factory=dict)  # the session's, by sample id
    session: list[list[float]] = field(default_factory=list)  # (R, P), of the bare loop
    hot: list[list[float]] = field(default_factory=list)  # (R, P), the session again and again


class _Rounds:
    """A source that measures: its consumer's time for each frame, and between its blocks the bare session's."""

    def __init__(
        self,
        encoded: Sequence[bytes],
        profile: StudentProfile,
        state: LocalState,
        answers: Path,
        rounds: int,
        sessions: Sequence[float],
    ):
        self._sessions = sessions
        self._encoded, self._preprocess, self._rounds = encoded, profile.preprocess, rounds
        self._state, self._answers = state, answers
        self.cold_start = 0
        self.timed = _Timed()

    def __iter__(self) -> Iterator[Frame]:
        yield from self._until_settled()
        session = self._bare_session()
        tensors = [self._preprocess(decode_image(data))[None] for data in self._encoded]
        for number in range(self._rounds + 1):
            for place, data in enumerate(self._encoded):
                sample_id = f"{number}/{place}"
                began = time.perf_counter()
                yield Frame(sample_id, data)
                self.timed.walls[sample_id] = (time.perf_counter() - began) * 1e3
                self.timed.in_frame[sample_id] = self._sessions[-1]
            self.timed.session.append([self._bare(session, data) for data in self._encoded])
            self.timed.hot.append([_ms(session, tensor) for tensor in tensors])

    def _until_settled(self) -> Iterator[Frame]:
        while self.cold_start < _COLD_START:
            for data in self._encoded[:_SETTLED]:
                self.cold_start += 1
                yield Frame(f"cold/{self.cold_start}", data)
            routes = [record["route"] for record in _records(self._answers)[-_SETTLED:]]
            if routes.count("edge") >= 0.9 * len(routes):
                return
        raise EdgeFMError(f"the edge does not answer after {_COLD_START} frames")

    def _bare_session(self) -> OnnxModel:
        last = self._state.last_good()
        assert last is not None  # the agent runs from it
        return OnnxModel(self._state.student_folder(last[0], no_fetch) / GRAPH_FILE)

    def _bare(self, session: OnnxModel, data: bytes) -> float:
        return _ms(session, self._preprocess(decode_image(data))[None])


@contextmanager
def _watched_sessions() -> Iterator[list[float]]:
    """Milliseconds of each session that runs in this process meanwhile, in their order."""
    run, times = OnnxModel.__call__, []

    def timed(self: OnnxModel, batch: np.ndarray, output: str | None = None) -> np.ndarray:
        began = time.perf_counter()
        result = run(self, batch, output)
        times.append((time.perf_counter() - began) * 1e3)
        return result

    OnnxModel.__call__ = timed
    try:
        yield times
    finally:
        OnnxModel.__call__ = run


def _ms(session: OnnxModel, batch: np.ndarray) -> float:
    began = time.perf_counter()
    session(batch)
    return (time.perf_counter() - began) * 1e3


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def bench_agent(students: Sequence[str], rounds: int, seed: int, console: Console) -> dict[str, Any]:
    """Each student's overhead.

    Args:
        rounds: how often every picture is answered, after one round that does not count.

    Raises:
        ConfigError: there is no such student.
        EdgeFMError: the cloud does not start, or the edge does not come to answer.
    """
    profiles = [student_profile(name) for name in students]
    encoded = pictures(*FRAME_SIZE, _PICTURES, seed)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with cloud_without_learning(folder) as cloud:
            for profile in profiles:
                with console.status(f"Measuring {profile.name} ..."):
                    rows.append(_measure(profile, cloud.target, folder, encoded, rounds))
    result = {
        "frame": {
            "width": FRAME_SIZE[0],
            "height": FRAME_SIZE[1],
            "mean_bytes": sum(map(len, encoded)) // len(encoded),
        },
        "pictures": len(encoded),
        "rounds": rounds,
        "students": rows,
        "environment": describe_environment(seed),
    }
    console.print(_table(result))
    return result


def _measure(
    profile: StudentProfile, cloud: str, folder: Path, encoded: Sequence[bytes], rounds: int
) -> dict[str, Any]:
    config = AgentConfig(
        cloud=cloud,
        environment=profile.name,
        labels=LABELS,
        student=profile.name,
        state_dir=folder / "device",
        deadline_ms=10_000.0,
        switcher=SwitcherConfig(accuracy_target=0.01, audit_share=0.0),
    )
    answers = folder / f"{profile.name}.jsonl"
    sink = JsonLines(answers)
    with _watched_sessions() as sessions, Agent(config) as agent:
        state = LocalState(config.state_dir, profile.name)
        source = _Rounds(encoded, profile, state, answers, rounds, sessions)
        agent.run(source, sink)
    sink.close()
    return _row(profile, source, [r for r in _records(answers) if not r["sample_id"].startswith(("cold/", "0/"))])


def _row(profile: StudentProfile, source: _Rounds, records: list[dict[str, Any]]) -> dict[str, Any]:
    timed = source.timed
    bare_ms = np.array(timed.session[1:])  # (R, P)
    edge = [record for record in records if record["route"] == "edge"]
    wall, session = (
        np.array([times[record["sample_id"]] for record in edge]) for times in (timed.walls, timed.in_frame)
    )
    beside = np.median(bare_ms, axis=0)[[int(record["sample_id"].split("/")[1]) for record in edge]]
    parts = {name: np.array([record[name] for record in edge]) for name in ("decode_ms", "preprocess_ms", "student_ms")}
    total = np.array([record["total_ms"] for record in edge])
    before = parts["decode_ms"] + parts["preprocess_ms"]
    overhead = wall - before - session
    return {
        "student": profile.name,
        "frames": len(records),
        "routes": dict(Counter(record["route"] for record in records)),
        "cold_start_frames": source.cold_start,
        "decode_ms": _percentiles(parts["decode_ms"]),
        "preprocess_ms": _percentiles(parts["preprocess_ms"]),
        "session_ms": _percentiles(bare_ms),
        "session_in_agent_ms": _percentiles(session),
        "session_hot_ms": _percentiles(np.array(timed.hot[1:])),
        "overhead_ms": _percentiles(overhead),
        "overhead_share": round(float(np.median(overhead) / np.median(bare_ms)), 4),
        "overhead_beside_bare_ms": _percentiles(wall - before - beside),
        "overhead_by_part_ms": {  # medians
            "recognition": _median(parts["student_ms"] - session),
            "decision": _median(total - before - parts["student_ms"]),
            "record_and_sink": _median(wall - total),
        },
        "frame_ms": _percentiles(wall),
    }


def _percentiles(values: np.ndarray) -> dict[str, float]:
    p50, p95 = np.percentile(values, (50, 95))
    return {"p50": round(float(p50), 4), "p95": round(float(p95), 4)}


def _median(values: np.ndarray) -> float:
    return round(float(np.median(values)), 4)


def _table(result: dict[str, Any]) -> Table:
    frame = result["frame"]
    table = Table(title=f"JPEG {frame['width']}x{frame['height']}, median milliseconds", box=SIMPLE_HEAD)
    for heading in ("student", "decode", "prepare", "session", "overhead", "p95", "share", "on edge"):
        left = heading == "student"
        table.add_column(heading, justify="left" if left else "right", no_wrap=left)
    for row in result["students"]:
        parts = ("decode_ms", "preprocess_ms", "session_ms", "overhead_ms")
        cells = [*(f"{row[part]['p50']:.3f}" for part in parts), f"{row['overhead_ms']['p95']:.3f}"]
        answered = f"{row['routes'].get('edge', 0) / row['frames']:.0%}"
        table.add_row(row["student"], *cells, f"{100 * row['overhead_share']:.1f} %", answered)
    return table
