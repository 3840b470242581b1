"""The demo's held-back label: added by its text while an agent runs, then described by the cloud's language model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..edge.operator import Operator
from ..models.errors import CloudError
from .demo_scoring import ask_fm

_EVERY_S = 0.5


@dataclass
class AddedLabel:
    """Attributes:
    before: share of its scoring images that the FM called so before it was added; None: it has none.
    plain: after it was added by its text.
    descriptions: what the language model wrote.
    described: the FM's share once the pool had taken them in; None: they never came.
    """

    name: str
    before: float | None
    plain: float | None
    descriptions: tuple[str, ...] = ()
    described: float | None = None


class LabelAddition:
    """Adds a label and watches what becomes of it.

    Args:
        cloud: host:port.
        images: the label's own scoring images, encoded.
        describe: the cloud has a language model.
    """

    def __init__(
        self, operator: Operator, cloud: str, place: str, name: str, images: Sequence[bytes], describe: bool
    ) -> None:
        self._operator, self._cloud, self._place = operator, cloud, place
        self._images, self._describe = images, describe
        self._name = name
        self._next_s = 0.0
        self._pending = False
        self.result: AddedLabel | None = None

    def add(self) -> int:
        """Returns how many labels there are then."""
        before = self._share()
        pool = self._operator.add_labels(self._place, [self._name], self._describe)
        self.result = AddedLabel(self._name, before, self._share())
        self._pending = self._describe
        return len(pool.labels)

    def wait(self, patience_s: float) -> None:
        """Until descriptions have come, or will not."""
        until = time.monotonic() + patience_s
        while self._pending and time.monotonic() < until:
            self.described()
            time.sleep(_EVERY_S)

    def described(self) -> bool:
        """Whether descriptions have come since the last look."""
        if not self._pending or self.result is None or time.monotonic() < self._next_s:
            return False
        self._next_s = time.monotonic() + _EVERY_S
        try:
            (found,) = self._operator.descriptions(self._place, self._name)
            if not found.pending and found.texts:
                self.result.descriptions, self.result.described = found.texts, self._share()
        except CloudError:  # the demo goes on; the next look may succeed
            return False
        self._pending = found.pending
        return bool(self.result.descriptions)

    def _share(self) -> float | None:
        if not self._images:
            return None
        return float((ask_fm(self._cloud, self._place, self._images) == self._name).mean())
