"""What the FM answered lately in each environment; forgotten when the cloud stops."""

from __future__ import annotations

from collections import OrderedDict, deque

RECENT = 100
_ENVIRONMENTS = 1000


class RecentAnswers:
    def __init__(self) -> None:
        self._labels: OrderedDict[str, deque[str]] = OrderedDict()

    def add(self, environment: str, label: str) -> None:
        self._labels.setdefault(environment, deque(maxlen=RECENT)).append(label)
        self._labels.move_to_end(environment)
        if len(self._labels) > _ENVIRONMENTS:
            self._labels.popitem(last=False)

    def of(self, environment: str) -> tuple[str, ...]:
        """Oldest first."""
        return tuple(self._labels.get(environment, ()))
