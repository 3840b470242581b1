"""Files that are slow to make and the same every time: exported graphs, embedded class names."""

from __future__ import annotations

import fcntl
import io
import os
import secrets
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from .errors import ModelError, StoreError, disk_reason


def cache_dir() -> Path:
    """`$EDGEFM_CACHE`, or `edgefm` in the user's cache folder."""
    chosen = os.environ.get("EDGEFM_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edgefm"


def write_atomic(path: Path, data: bytes) -> None:
    """Writes beside the target, syncs and renames: a reader sees the old file or the new one, never half of it.

    A target that is no file, such as /dev/stdout, is written into.

    Raises:
        StoreError: the disk refused; the target is as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with temporary.open("xb") as file:  # with the mode that the user's umask gives a new file
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise StoreError(f"cannot write {path}: {disk_reason(error)}; free space or choose another folder") from error


def cached_file(name: str, make: Callable[[], bytes]) -> Path:
    """The cached file of that name, made once: of processes that want it at once, one makes it and the others wait. The name
    must carry everything the content depends on."""
    path = cache_dir() / name
    if not path.exists():
        with _alone(path.with_name(f".{name}.lock")):
            if not path.exists():
                write_atomic(path, make())
    return path


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Saves work and no more: where the folder allows no lock, several make the same file, and each write is whole."""
    with ExitStack() as opened:
        with suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context(lock.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
        with suppress(OSError):
            lock.unlink()  # once the file is made: who waits finds it; after a failure the next one tries


def cached_arrays(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The same for arrays, in a file of numpy's.

    Raises:
        StoreError: the file cannot be read or written. ModelError: it is damaged.
    """

    def pack() -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **make())  # pyright: ignore[reportArgumentType]
        return buffer.getvalue()

    path = cached_file(name, pack)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {disk_reason(error)}") from error
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, EOFError, OSError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} is damaged ({error}); delete it, it is made again") from error
