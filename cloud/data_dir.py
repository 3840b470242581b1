"""One cloud for each data_dir."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from ..models.errors import StoreError, disk_reason


class DataDirLock:
    """Keeps a second cloud out: its repairs would remove what the first is writing. Ends with the process at the latest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handle: int | None = None

    def take(self) -> None:
        """Raises `StoreError` when another process has it or the disk refuses."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise StoreError(f"another cloud works in {self._folder}; stop it or choose another --data-dir") from error
        except OSError as error:
            self.release()
            raise StoreError(f"cannot lock {self._folder}: {disk_reason(error)}") from error

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
