"""A long measurement in parts that are written down as they come: one that was cut short goes on where it ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ...models.errors import InputError
from .results import save


class Cells:
    """Attributes:
    values: of the parts that were measured, JSON data by name.
    seconds: that each took.
    devices: that each was measured on.
    """

    def __init__(
        self,
        path: Path | None,
        settings: Mapping[str, Any],
        console: Console,
        minutes: float | None = None,
    ) -> None:
        """Args:
            path: where parts are kept; None: nowhere.
            settings: JSON data that the parts depend on.
            minutes: no part begins later than that; None: no limit.

        Raises:
            InputError: the file is none of this measurement, or of other settings.
        """
        self._path, self._console = path, console
        self._settings: Any = json.loads(json.dumps(settings))  # as it comes back from the file
        self._until = None if minutes is None else time.monotonic() + 60 * minutes
        self.values: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.devices: dict[str, str] = {}
        self.complete = True
        if path is not None and path.exists():
            self._load(path)

    def cell(self, name: str, measure: Callable[[], Any], device: str = "cpu") -> Any | None:
        """The value of a part, measured on that device unless it is there; None where the time is over."""
        if name not in self.values:
            if self._until is not None and time.monotonic() > self._until:
                self.complete = False
                return None
            began = time.perf_counter()
            with self._console.status(f"{name} ..."):
                self.values[name] = measure()
            self.seconds[name], self.devices[name] = round(time.perf_counter() - began, 1), device
            if self._path is not None:
                kept = {"values": self.values, "seconds": self.seconds, "devices": self.devices}
                save({"settings": self._settings, **kept}, self._path)
        return self.values[name]

    def _load(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text())
            settings, self.values = found["settings"], found["values"]
            self.seconds, self.devices = found["seconds"], found["devices"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no parts of a measurement: {error!r}; move it away") from error
        if settings != self._settings:
            raise InputError(
                f"{path} holds parts of a measurement with other settings ({settings}); move it away, or use those"
            )
