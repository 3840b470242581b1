"""The demo's eye on the cloud: drift alarms as they are raised."""

from __future__ import annotations

import time
from typing import Any

from ..edge.operator import Operator
from ..models.errors import CloudError

_EVERY_S = 1.0


class AlarmWatch:
    """Asks the cloud now and then; an alarm that has come and gone between two looks is missed."""

    def __init__(self, operator: Operator, place: str) -> None:
        self._operator = operator
        self._place = place
        self._seen: set[tuple[str, int]] = set()
        self._next_s = 0.0

    def new_alarms(self) -> list[dict[str, Any]]:
        """Alarms not told before: kind, agreement with the FM since the evidence began, and the baseline's."""
        if time.monotonic() < self._next_s:
            return []
        self._next_s = time.monotonic() + _EVERY_S
        try:
            (status,) = self._operator.status(self._place).environments
        except CloudError:  # the demo goes on; the next look may succeed
            return []
        alarms = [alarm for alarm in status.alarms if (alarm.kind, alarm.student_version) not in self._seen]
        self._seen |= {(alarm.kind, alarm.student_version) for alarm in alarms}
        baseline = status.baseline.share if status.HasField("baseline") else None
        return [{"kind": alarm.kind, "agreement": alarm.agreement.share, "baseline": baseline} for alarm in alarms]
