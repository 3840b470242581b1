"""C++ kernels: built with the machine's own compiler, in seconds, kept in the cache, and called through ctypes.

Built once for a processor, at first use or ahead by `edgefm kernels`. They include no header of PyTorch's and depend on none of
its versions.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import torch

from .cache import cache_dir
from .errors import EdgeFMError, KernelError, StoreError, disk_reason

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


def load(name: str, functions: Sequence[str], headers: Sequence[str]) -> ctypes.CDLL:
    """Builds a source file unless it is in the cache, and loads it; its functions return nothing.

    Args:
        name, headers: below the package `edgefm.models`; a header is included by its file's name.

    Raises:
        KernelError: no compiler, or one that fails; says what to install.
        StoreError: the cache cannot be written.
    """
    texts = [(files("edgefm.models") / file).read_bytes() for file in (name, *headers)]
    key = hashlib.sha256(b"".join(texts) + " ".join((*_FLAGS, *_compiler(), _processor())).encode()).hexdigest()[:16]
    path = cache_dir() / f"{Path(name).stem}-{key}.so"
    if not path.exists():
        _build(dict(zip([Path(file).name for file in (name, *headers)], texts, strict=True)), path)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"cannot load {path}: {error}; delete it and it is built again") from error
    for function in functions:
        getattr(loaded, function).restype = None
    return loaded


@functools.cache
def missing(library: Callable[[], object]) -> str | None:
    """Why the kernels that a function loads cannot be had here; None where they can."""
    try:
        library()
    except EdgeFMError as error:
        return str(error)
    return None


def pointer(x: torch.Tensor | None) -> ctypes.c_void_p:
    """Of a contiguous tensor's data; null for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    found = chosen or next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if not found:
        raise KernelError("there is no C++ compiler (c++, g++ or clang++, or $CXX); on Debian: apt install g++")
    return found


def _processor() -> str:
    """What the compiler's -march=native depends on: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _build(texts: Mapping[str, bytes], path: Path) -> None:
    """Of texts by their files' names, the first is compiled."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="edgefm-kernels-", dir=path.parent) as folder:
            for name, text in texts.items():
                Path(folder, name).write_bytes(text)
            source, built = Path(folder, next(iter(texts))), Path(folder, "kernels.so")
            command = [*_compiler(), *_FLAGS, str(source), "-o", str(built)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise KernelError(f"cannot run the C++ compiler: {error}") from error
            if done.returncode:
                said = "\n".join(done.stderr.strip().splitlines()[:5])
                raise KernelError(f"the C++ compiler failed ({shlex.join(command)}):\n{said}")
            built.replace(path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {disk_reason(error)}; free space or set EDGEFM_CACHE") from error
