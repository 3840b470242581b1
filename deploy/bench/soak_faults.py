"""What goes wrong in a soak: each fault is done, undone, and waited for until its target is well again."""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from ...cloud.registry import Registry
from ...edge.operator import Operator
from ...models.errors import CloudError, EdgeFMError, InputError
from .soak_agent import SoakAgent
from .soak_cloud import SoakCloud, SoakLink
from .soak_requests import MutatedRequests

_BURST = 20
_EXTRA_LABEL = "zebra"

T = TypeVar("T")
Fault = Callable[[np.random.Generator], float | None]
"""Does it and undoes it; returns the seconds from there until the target was well, None where there is nothing to wait
for. Raises `EdgeFMError` when the target does not recover."""


@dataclass
class Journal:
    """What was done, in seconds from the start, and what of it went wrong for good."""

    began_s: float = field(default_factory=time.monotonic)
    faults: list[tuple[float, str, str, float | None]] = field(default_factory=list)
    """(at_s, fault, target, recovered_s)"""
    broken: list[str] = field(default_factory=list)
    requests: Counter[str] = field(default_factory=Counter)
    operator: Counter[str] = field(default_factory=Counter)


class Lane(threading.Thread):
    """One target's faults, one after another with pauses; each comes once before any comes twice.

    Args:
        pause_s: mean of the exponential pauses.
    """

    def __init__(
        self, target: str, faults: dict[str, Fault], pause_s: float, seed: Sequence[int], journal: Journal
    ) -> None:
        super().__init__(name=f"faults of {target}", daemon=True)
        self._target = target
        self._faults = list(faults.items())
        self._pause_s = pause_s
        self._rng = np.random.default_rng(seed)
        self._journal = journal
        self._stop_asked = threading.Event()

    def end(self) -> None:
        """After the fault under way."""
        self._stop_asked.set()

    def run(self) -> None:
        turn = self._rng.permutation(len(self._faults)).tolist()
        while not self._stop_asked.wait(self._rng.exponential(self._pause_s)):
            name, fault = self._faults[turn.pop() if turn else int(self._rng.integers(len(self._faults)))]
            at_s = time.monotonic() - self._journal.began_s
            try:
                recovered_s = fault(self._rng)
            except Exception as error:  # a broken promise of the product, or a mistake of this benchmark: both are told
                self._journal.broken.append(f"{self._target}, {name}, at {at_s:.0f} s: {error}")
                recovered_s = None
            self._journal.faults.append((at_s, name, self._target, recovered_s))


# ---- the cloud's


def cloud_faults(cloud: SoakCloud, environments: Sequence[str]) -> dict[str, Fault]:
    def killed(rng: np.random.Generator) -> float:
        cloud.end(signal.SIGKILL)
        time.sleep(rng.uniform(0, 5))
        return cloud.start()

    def stopped(rng: np.random.Generator) -> float:
        code = cloud.end(signal.SIGTERM)
        if code != 0:
            raise EdgeFMError(f"the cloud ended with exit code {code} after SIGTERM")
        time.sleep(rng.uniform(0, 5))
        return cloud.start()

    def frozen(rng: np.random.Generator) -> float:
        cloud.process.send_signal(signal.SIGSTOP)
        time.sleep(rng.uniform(2, 8))
        cloud.process.send_signal(signal.SIGCONT)
        return cloud.wait_until_serving()

    def disk_full(rng: np.random.Generator) -> float:
        _fill_disk(cloud.process.pid, rng.uniform(4, 10))
        return cloud.wait_until_serving()

    def blob_damaged(rng: np.random.Generator) -> float:
        cloud.end(signal.SIGKILL)
        registry, name = Registry(cloud.data_dir / "registry"), _choose(environments, rng)
        refs = [*registry.current(name).files, registry.pool(name)[1]]
        _flip_byte(registry.blob_path(_choose(refs, rng).sha256), rng)
        return cloud.start()

    faults = {
        "killed": killed,
        "stopped": stopped,
        "frozen": frozen,
        "disk full": disk_full,
        "killed, blob damaged": blob_damaged,
    }
    return {name: _holding(fault, cloud) for name, fault in faults.items()}


def operator_acts(cloud: SoakCloud, environments: Sequence[str], journal: Journal) -> dict[str, Fault]:
    """Nothing breaks, but what devices run changes under them. A cloud that is away is the operator's problem."""

    def acting(name: str, act: Callable[[Operator, str], None]) -> Fault:
        def acted(rng: np.random.Generator) -> None:
            try:
                with Operator(cloud.target) as operator:
                    act(operator, _choose(environments, rng))
                journal.operator[f"{name}: done"] += 1
            except (CloudError, InputError) as error:
                journal.operator[f"{name}: {type(error).__name__}"] += 1

        return acted

    def relabel(operator: Operator, environment: str) -> None:
        there = _EXTRA_LABEL in operator.list_labels(environment).labels
        (operator.remove_labels if there else operator.add_labels)(environment, [_EXTRA_LABEL])

    def roll_back(operator: Operator, environment: str) -> None:
        operator.rollback(environment)

    return {"labels changed": acting("labels changed", relabel), "rolled back": acting("rolled back", roll_back)}


def request_faults(requests: MutatedRequests, journal: Journal) -> dict[str, Fault]:
    def burst(rng: np.random.Generator) -> None:
        for _ in range(_BURST):
            outcome = requests.send(rng)
            journal.requests[outcome] += 1
            if outcome.endswith("UNAVAILABLE"):  # the cloud is away
                return

    return {"burst of mutated requests": burst}


# ---- a device's


def agent_faults(agent: SoakAgent, cloud: SoakCloud) -> dict[str, Fault]:
    def answering(since_s: float) -> float:
        waited_s = agent.wait_for_answer(since_s)
        if waited_s is None:
            raise EdgeFMError(f"{agent.spec.name} does not answer any more")
        return waited_s

    def killed(rng: np.random.Generator) -> float:
        agent.kill()
        return answering(time.monotonic())

    def stopped(rng: np.random.Generator) -> float:
        agent.stop()
        return answering(time.monotonic())

    def disk_full(rng: np.random.Generator) -> float:
        pid, began_s = agent.pid, time.monotonic()
        if pid is not None:
            _fill_disk(pid, rng.uniform(4, 10))
        agent.disk_full.append((began_s, time.monotonic()))
        return answering(time.monotonic())

    def blob_damaged(rng: np.random.Generator) -> float:
        # A fresh device has nothing before its last good student: then the cloud has to be there.
        with cloud.changing, agent.link.changing:
            with agent.between_legs:
                agent.kill()
                blobs = sorted((agent.state_dir / "blobs").iterdir())
                _flip_byte(_choose(blobs, rng), rng)
            return answering(time.monotonic())

    return {"killed": killed, "stopped": stopped, "disk full": disk_full, "killed, blob damaged": blob_damaged}


def link_faults(agent: SoakAgent) -> dict[str, Fault]:
    """Recovery is an answer that is no fallback; there may be none for long while the cloud is away too."""
    link = agent.link

    def cut_for(seconds: float) -> float | None:
        link.cut()
        time.sleep(seconds)
        link.mend()
        return agent.wait_for_answer(time.monotonic(), "edge", "cloud")

    def cut(rng: np.random.Generator) -> float | None:
        return cut_for(rng.uniform(0.5, 10))

    def reset(rng: np.random.Generator) -> float | None:
        return cut_for(0)

    return {name: _holding(fault, link) for name, fault in {"cut": cut, "reset": reset}.items()}


def _holding(fault: Fault, target: SoakCloud | SoakLink) -> Fault:
    def held(rng: np.random.Generator) -> float | None:
        with target.changing:
            return fault(rng)

    return held


def _fill_disk(pid: int, seconds: float) -> None:
    """For so long, no file of the process can grow: the kernel refuses each write as it would on a full disk."""
    with suppress(ProcessLookupError):
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
        time.sleep(seconds)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def _choose(among: Sequence[T], rng: np.random.Generator) -> T:
    return among[int(rng.integers(len(among)))]


def _flip_byte(path: Path, rng: np.random.Generator) -> None:
    with path.open("r+b") as file:
        at = int(rng.integers(path.stat().st_size))
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ 0xFF]))
