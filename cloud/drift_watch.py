"""The drift monitors of all environments: kept over restarts, and their alarms told."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ..models.cache import write_atomic
from ..models.errors import StoreError
from .config import DriftConfig
from .drift import Agreement, Alarm, DriftMonitor, Observation, State

log = logging.getLogger("edgefm.cloud.drift")
_STATE: TypeAdapter[State] = TypeAdapter(State)


class DriftWatch:
    """One folder, one file an environment.

    Attributes:
        raised: alarms since the start, by (environment, kind).
    """

    def __init__(self, folder: Path, config: DriftConfig) -> None:
        self._folder = folder
        self._config = config
        self._monitors: dict[str, DriftMonitor] = {}
        self.raised: Counter[tuple[str, str]] = Counter()

    def clear_leftovers(self) -> None:
        """Removes what a killed process had half written; only for the one process that writes. Raises `StoreError`."""
        try:
            for leftover in self._folder.glob(".*"):
                leftover.unlink()
        except OSError as error:
            raise StoreError(f"cannot clear {self._folder}: {error.strerror}; check its permissions") from error

    def begin(self, environment: str, student_version: int, pool_version: str) -> None:
        """Watches this student and pool from now on: goes on with what is on the disk if it is of them."""
        known = self._monitors.get(environment)
        if known is not None and _is_of(known.state, student_version, pool_version):
            return
        state = self._load(environment) if known is None else None
        if state is None or not _is_of(state, student_version, pool_version):
            state = State(student_version, pool_version)
        self._monitors[environment] = DriftMonitor(self._config, state)

    def observe(
        self, environment: str, student_version: int, pool_version: str, observation: Observation
    ) -> Alarm | None:
        """Takes in what a device's student said; a device that is a version behind is left out."""
        monitor = self._monitors.get(environment)
        if monitor is None or not _is_of(monitor.state, student_version, pool_version):
            return None
        alarm = monitor.observe(observation)
        if alarm is not None:
            self.raised[environment, alarm.kind] += 1
            log.warning(
                "event=drift environment=%s kind=%s student=%d pool=%s statistic=%.4g limit=%.4g agreement=%.4f "
                "agreement_standard_error=%.4f samples=%d baseline_agreement=%.4f baseline_samples=%d since=%.0f",
                environment,
                alarm.kind,
                alarm.student_version,
                alarm.pool_version,
                alarm.statistic,
                alarm.limit,
                alarm.agreement.share,
                alarm.agreement.standard_error,
                alarm.agreement.samples,
                alarm.baseline_agreement.share,
                alarm.baseline_agreement.samples,
                alarm.since,
            )
        return alarm

    def agreement(self, environment: str) -> Agreement | None:
        monitor = self._monitors.get(environment)
        return monitor.agreement if monitor else None

    def baseline(self, environment: str) -> Agreement | None:
        monitor = self._monitors.get(environment)
        return monitor.state.baseline.agreement if monitor and monitor.state.baseline else None

    def alarms(self, environment: str) -> list[Alarm]:
        """Those that are raised now."""
        monitor = self._monitors.get(environment)
        return list(monitor.state.alarms) if monitor else []

    def worth_saving(self, environment: str) -> bool:
        """A baseline or a window has just been completed."""
        return self._monitors[environment].window_begins

    def snapshot(self, environment: str) -> bytes:
        return _STATE.dump_json(self._monitors[environment].state)

    def save(self, environment: str, snapshot: bytes) -> None:
        """Raises `StoreError`."""
        write_atomic(self._path(environment), snapshot)

    def _path(self, environment: str) -> Path:
        return self._folder / f"{environment}.json"

    def _load(self, environment: str) -> State | None:
        path = self._path(environment)
        try:
            return _STATE.validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            log.warning("event=drift_state_unreadable path=%s reason=%s", path, error)
            return None


def _is_of(state: State, student_version: int, pool_version: str) -> bool:
    return state.student_version == student_version and state.pool_version == pool_version
