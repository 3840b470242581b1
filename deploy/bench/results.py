"""Where a benchmark's results go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...models.cache import write_atomic
from ...models.errors import StoreError, disk_reason


def make_folder(path: Path) -> None:
    """Before a measurement of minutes: raises `StoreError` unless there is a folder for the file of its results."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {disk_reason(error)}; choose another folder") from error


def save(result: dict[str, Any], path: Path) -> None:
    """Raises `StoreError` when the disk refuses."""
    write_atomic(path, (json.dumps(result, indent=2) + "\n").encode())
