"""What must hold after a soak, whatever went wrong in it. Each check returns the promises it found broken."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from ...cloud.registry import Registry
from ...cloud.store import IMAGES_FOLDER, INDEX_FILE, image_path
from ...edge.spool import SPOOL_FILE
from ...models.errors import EdgeFMError
from .soak_agent import MAX_PENDING, STUCK_S, AnswerSeen, Leg, SoakAgent

_LAST_MOMENTS_S = 2.0
"""Between an answer and its sample in the spool, on a busy machine."""
_EVENT = re.compile(r" level=(warning|error|critical) .*?\bevent=(\S+)")
_TRACE = "Traceback (most recent call last)"


def check_agent(agent: SoakAgent) -> list[str]:
    """Every frame answered once, no process ended by itself or was stuck, and calm weather brings all back."""
    broken: list[str] = []
    name = agent.spec.name
    for number, leg in enumerate(agent.legs):
        broken += [f"{name}, leg {number}: {what}" for what in _broken_in(leg, agent.spec.stream.damaged)]
    last = agent.legs[-1]
    if agent.waiting != 0:
        broken.append(f"{name}: {agent.waiting} samples still wait for upload at the end")
    if all(answer.route == "fallback" for answer in last.answers):
        broken.append(f"{name}: nothing but fallbacks at the end")
    return broken


def _broken_in(leg: Leg, damaged: frozenset[int]) -> Iterator[str]:
    missing = leg.missing(damaged)
    expected = {0}
    if leg.killed_at_s is not None:
        expected |= {-9}
        if missing > MAX_PENDING:
            yield f"{missing} frames were under way when it was killed; at most {MAX_PENDING} may be"
    else:
        if leg.stopped:
            expected |= {-15}  # asked just after it had let go of its handlers
        if missing:
            yield f"{missing} frames lost"
        if leg.unparsed:
            yield f"{leg.unparsed} lines that are no JSON"
    if leg.duplicates:
        yield f"{leg.duplicates} frames answered more than once"
    if leg.exit_code not in expected:
        yield f"it ended by itself with exit code {leg.exit_code}"
    if leg.longest_gap_s() > STUCK_S:
        yield f"no answer for {leg.longest_gap_s():.0f} s"
    if leg.summary and leg.summary["frames"] != len(leg.answers) + leg.unreadable:
        yield f"{leg.summary['frames']} frames, but {len(leg.answers)} answers and {leg.unreadable} unreadable"


def check_store(data_dir: Path, visited: Collection[str]) -> list[str]:
    """The index is whole, every row has its image, every image its row; every environment runs a whole version.

    Args:
        visited: environments of devices. Another one, of a mutated registration, may have lost its versions to a damaged file:
            it starts anew when a device comes, and none does.
    """
    broken: list[str] = []
    store = data_dir / "store"
    with closing(sqlite3.connect(store / INDEX_FILE)) as db:
        verdict = db.execute("PRAGMA integrity_check").fetchone()[0]
        if verdict != "ok":
            broken.append(f"the store's index is damaged: {verdict}")
        rows = {row[0] for row in db.execute("SELECT DISTINCT sha256 FROM samples")}
    files = {path.name for path in (store / IMAGES_FOLDER).glob("*/*")}
    if rows - files:
        broken.append(f"{len(rows - files)} stored samples without an image")
    if files - rows:
        broken.append(f"{len(files - rows)} stored images without a sample")
    wrong = [sha for sha in rows & files if hashlib.sha256(image_path(store, sha).read_bytes()).hexdigest() != sha]
    if wrong:
        broken.append(f"{len(wrong)} stored images are not what their name says")
    registry = Registry(data_dir / "registry")
    for environment in registry.environments():
        if environment not in visited and not registry.versions(environment):
            continue
        try:
            registry.verify(registry.current(environment))
        except EdgeFMError as error:
            broken.append(f"{environment} ends with a version that is not whole: {error}")
    return broken


def check_uploads(agents: Sequence[SoakAgent], data_dir: Path) -> tuple[int, list[str]]:
    """Every sample that was to be uploaded is in the cloud's store, or waits on its device; returns how many that were.

    Not counted: those of a full disk, and of a device's last moments before it was killed.
    """
    with closing(sqlite3.connect(data_dir / "store" / INDEX_FILE)) as db:
        stored = set(db.execute("SELECT environment, sha256 FROM samples"))
    wanted, broken = 0, []
    for agent in agents:
        stream, hashes = agent.spec.stream, _wanted(agent)
        wanted += len(hashes)
        lost = {sha for sha in hashes if (stream.environment, sha) not in stored} - _waiting(agent)
        if lost:
            broken.append(f"{agent.spec.name}: {len(lost)} of {len(hashes)} samples never reached the cloud")
    return wanted, broken


def _wanted(agent: SoakAgent) -> set[str]:
    frames = agent.spec.stream.frames
    positions = {answer.position for leg in agent.legs for answer in leg.answers if _promised(agent, leg, answer)}
    return {hashlib.sha256(frames[position].read_bytes()).hexdigest() for position in positions}


def _promised(agent: SoakAgent, leg: Leg, answer: AnswerSeen) -> bool:
    """It was to be kept for upload, and nothing excuses that it was not."""
    if answer.route == "cloud" or (answer.route == "edge" and agent.spec.upload != "all"):
        return False
    if leg.killed_at_s is not None and answer.at_s > leg.killed_at_s - _LAST_MOMENTS_S:
        return False
    return not any(begin - _LAST_MOMENTS_S < answer.at_s < end + _LAST_MOMENTS_S for begin, end in agent.disk_full)


def _waiting(agent: SoakAgent) -> set[str]:
    with closing(sqlite3.connect(agent.state_dir / SPOOL_FILE)) as db:
        return {sha.hex() for (sha,) in db.execute("SELECT sha256 FROM samples")}


def read_logs(logs: Iterable[Path]) -> tuple[Counter[str], list[str]]:
    """Warnings and errors by kind, and what was logged with a traceback: nobody foresaw it."""
    kinds: Counter[str] = Counter()
    broken: list[str] = []
    for log in logs:
        text = log.read_text(encoding="utf-8", errors="replace")
        kinds.update(f"{level} {event}" for level, event in _EVENT.findall(text))
        at = text.find(_TRACE)
        if at >= 0:
            broken.append(f"{log.name} has {text.count(_TRACE)} tracebacks; the first: ...{text[at : at + 2000]!r}")
    return kinds, broken
