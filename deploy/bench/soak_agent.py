"""The soak's agents: each runs leg after leg over its frames, whatever ends a leg, and every answer is accounted for."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..processes import child_process, edgefm
from .soak_cloud import SoakLink
from .soak_memory import Memory

FPS = 5.0
MAX_PENDING = 32
"""The agent's default: what may be under way when it is killed."""
STUCK_S = 20.0
"""Without an answer for so long, an agent that has begun to answer is stuck."""
_CALM_LEGS = 4
_CALM_FRAMES = 25
_RESTART_S = 1.0
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Stream:
    """The frames of one environment.

    Attributes:
        damaged: positions of the frames that cannot be decoded.
    """

    environment: str
    labels: tuple[str, ...]
    frames: list[Path]
    damaged: frozenset[int]


@dataclass(frozen=True)
class AgentSpec:
    name: str
    device_id: str
    upload: str
    stream: Stream


@dataclass(frozen=True)
class AnswerSeen:
    """One answer, by its frame's position in the stream; `at_s` by the monotonic clock."""

    position: int
    route: str
    reason: str
    version: int
    at_s: float


@dataclass
class Leg:
    """One process, from its start to its end.

    Attributes:
        asked: the positions it was given.
        killed_at_s: when this soak sent SIGKILL, by the monotonic clock.
    """

    asked: list[int]
    answers: list[AnswerSeen] = field(default_factory=list)
    unparsed: int = 0
    summary: dict[str, Any] | None = None
    stopped: bool = False
    killed_at_s: float | None = None
    exit_code: int | None = None

    @property
    def duplicates(self) -> int:
        return len(self.answers) - len({answer.position for answer in self.answers})

    @property
    def unreadable(self) -> int:
        return self.summary["unreadable"] if self.summary else 0

    def missing(self, damaged: frozenset[int]) -> int:
        """Frames without an answer; of a leg cut short, up to the last frame that has one."""
        answered = {answer.position for answer in self.answers}
        if self.killed_at_s is None and not self.stopped:
            return len(set(self.asked) - answered - damaged)
        last = max((self.asked.index(position) for position in answered), default=-1)
        return len(set(self.asked[: last + 1]) - answered - damaged)

    def longest_gap_s(self) -> float:
        """Between one answer and the next."""
        times = [answer.at_s for answer in self.answers]
        return max((late - early for early, late in pairwise(times)), default=0.0)


class SoakAgent:
    """`edgefm agent` with one state folder, behind one link. Its answers come over a pipe, which no full disk stops."""

    def __init__(self, spec: AgentSpec, folder: Path, link: SoakLink, leg_s: float, seed: int, memory: Memory) -> None:
        self.spec = spec
        self.link = link
        self.state_dir = folder / f"{spec.name}-state"
        self.legs: list[Leg] = []
        self.logs: list[Path] = []
        self.disk_full: list[tuple[float, float]] = []
        """From and to, by the monotonic clock."""
        self.between_legs = threading.Lock()
        """Held by whoever wants no process to run."""
        self._folder = folder
        self._leg_s = leg_s
        self._rng = np.random.default_rng(seed)
        self._memory = memory
        self._next = 0
        self._ending = False
        self._calm_legs = _CALM_LEGS
        self._process: subprocess.Popen[str] | None = None
        self._answered = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=spec.name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    # ---- what faults want

    @property
    def pid(self) -> int | None:
        """Of the process that runs, None between two."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def kill(self) -> bool:
        """SIGKILL, at whatever moment; returns whether there was a process."""
        process = self._process
        if process is None or process.poll() is not None:
            return False
        self.legs[-1].killed_at_s = time.monotonic()
        process.kill()
        process.wait()
        return True

    def stop(self) -> bool:
        """SIGTERM, once it answers; returns whether it ended."""
        process = self._process
        if process is None or not self.legs[-1].answers or process.poll() is not None:
            return False
        self.legs[-1].stopped = True
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait_for_answer(self, since_s: float, *routes: str) -> float | None:
        """Seconds until it answered after that moment, by one of the routes if any are given; None: it did not."""

        def found() -> float | None:
            for leg in self.legs[-2:]:
                for answer in leg.answers:
                    if answer.at_s > since_s and (not routes or answer.route in routes):
                        return answer.at_s - since_s
            return None

        with self._answered:
            self._answered.wait_for(lambda: found() is not None, _PATIENCE_S)
            return found()

    def finish(self) -> None:
        """Ends the leg, and goes on in short ones until nothing waits for upload, a few at most."""
        self._ending = True
        self.stop()
        self._thread.join()

    def close(self) -> None:
        """At once."""
        self._ending, self._calm_legs = True, 0
        while self._thread.is_alive():
            self.kill()
            self._thread.join(_RESTART_S)

    # ---- the thread

    def _run(self) -> None:
        while not self._ending or (self._calm_legs > 0 and self.waiting != 0):
            self._calm_legs -= self._ending
            frames = _CALM_FRAMES if self._ending else int(self._leg_s * FPS * self._rng.uniform(0.4, 1.0)) + 1
            with self.between_legs:
                leg, log = self._prepare(frames)
                life = ExitStack()
                self._process = life.enter_context(child_process(self._command(leg), log, stdout=subprocess.PIPE))
            with life:
                self._follow(leg, self._process)
                leg.exit_code = self._process.wait()
            self._memory.forget(self.spec.name)
            if leg.answers:
                self._next = max(leg.answers, key=lambda a: leg.asked.index(a.position)).position + 1
            if leg.exit_code != 0:
                time.sleep(_RESTART_S)

    @property
    def waiting(self) -> int | None:
        """Samples that waited for upload when the last leg ended; None: nobody knows."""
        summary = self.legs[-1].summary if self.legs else None
        return summary["uploads_left"] if summary else None

    def _prepare(self, frames: int) -> tuple[Leg, Path]:
        total, number = len(self.spec.stream.frames), len(self.legs)
        leg = Leg([(self._next + i) % total for i in range(min(frames, total))])
        source = self._source(number)
        source.write_text("".join(f"{self.spec.stream.frames[position]}\n" for position in leg.asked))
        log = self._folder / f"{self.spec.name}-{number}.log"
        self.legs.append(leg)
        self.logs.append(log)
        return leg, log

    def _source(self, number: int) -> Path:
        return self._folder / f"{self.spec.name}-{number}.txt"

    def _command(self, leg: Leg) -> list[str]:
        spec = self.spec
        return edgefm(
            "agent",
            str(self._source(len(self.legs) - 1)),
            "--output=/dev/stdout",
            f"--cloud=127.0.0.1:{self.link.port}",
            f"--environment={spec.stream.environment}",
            f"--labels={','.join(spec.stream.labels)}",
            f"--device-id={spec.device_id}",
            f"--state-dir={self.state_dir}",
            f"--upload={spec.upload}",
            f"--fps={FPS}",
        )

    def _follow(self, leg: Leg, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                record = json.loads(line)
            except ValueError:
                leg.unparsed += 1
                continue
            if "sample_id" not in record:
                leg.summary = record
                continue
            if not leg.answers:
                self._memory.watch(self.spec.name, process.pid)
            position = int(Path(record["sample_id"]).stem)
            answer = AnswerSeen(
                position, record["route"], record["reason"], record["student_version"], time.monotonic()
            )
            with self._answered:
                leg.answers.append(answer)
                self._answered.notify_all()


def count_routes(legs: list[Leg]) -> Counter[str]:
    return Counter(answer.route for leg in legs for answer in leg.answers)
