"""The C++ kernels for the CPU: built with the machine's own compiler, in seconds, and called through ctypes.

Built once for a processor and kept in the cache, at first use or ahead by `edgefm kernels`. Without a compiler the reference
runs, and `edgefm.models.attention.attend` says so once.
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
from importlib.resources import files
from pathlib import Path

import torch

from ..cache import cache_dir
from ..errors import KernelError, StoreError, disk_reason
from .pattern import EPSILON, Form, Pattern

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_FORMS: dict[Form, int] = {"softmax": 0, "sa": 1, "sa_normalised": 2}
_ABI = 1
_WIDTH = 16
"""Head sizes are multiples of this: of every vector width that the kernels are built for."""
_EVERYTHING = 2**40


class _Shape(ctypes.Structure):
    """`Shape` of kernels.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "key_heads", "queries", "keys", "dim", "window", "kept_stride")
        ),
        *((name, ctypes.c_void_p) for name in ("kept", "kept_count", "visible")),
        *((name, ctypes.c_float) for name in ("scale", "epsilon")),
        *((name, ctypes.c_int32) for name in ("form", "threads")),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Builds the kernels unless they are in the cache, and loads them.

    Raises:
        KernelError: no compiler, or one that fails; says what to install.
        StoreError: the cache cannot be written.
    """
    source = files("edgefm.models.attention") / "kernels.cpp"
    text = source.read_bytes()
    key = hashlib.sha256(text + " ".join((*_FLAGS, *_compiler(), _processor())).encode()).hexdigest()[:16]
    path = cache_dir() / f"attention-{key}.so"
    if not path.exists():
        _build(text, path)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"cannot load {path}: {error}; delete it and it is built again") from error
    for name in ("attention_forward", "attention_backward"):
        getattr(loaded, name).restype = None
    return loaded


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


def _build(text: bytes, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="edgefm-kernels-", dir=path.parent) as folder:
            source, built = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
            source.write_bytes(text)
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


def fits(q: torch.Tensor) -> str | None:
    """Why the kernels cannot serve such queries; None where they can."""
    if q.device.type != "cpu":
        return f"the tensors are on {q.device.type}"
    if q.dtype == torch.float64:
        return "they compute in float32 and the tensors are float64"
    if q.shape[-1] % _WIDTH:
        return f"the head size {q.shape[-1]} is no multiple of {_WIDTH}"
    return None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    form: Form,
    separators: torch.Tensor | None,
    visible: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """See `edgefm.models.attention.attend`. Extra memory is O(T D). Computes in float32 whatever the dtype."""
    kept = pattern.kept(k.shape[2], separators)
    window = _EVERYTHING if pattern.neighbours is None else pattern.neighbours
    return _Attention.apply(q, k, v, kept, window, form, visible, scale)  # pyright: ignore[reportReturnType]


class _Call:
    """The arguments of a call, and what must live as long as it."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, kept: torch.Tensor | None, visible: torch.Tensor | None
    ) -> None:
        self._batch, self._keys = q.shape[0], k.shape[2]
        if kept is None:
            self.positions, self.counts = (
                torch.zeros(self._batch, 1, dtype=torch.int32),
                torch.zeros(self._batch, dtype=torch.int32),
            )
        else:
            rows = kept.expand(self._batch, -1)
            self.counts = rows.sum(dim=1, dtype=torch.int32)
            self.positions = torch.zeros(self._batch, max(int(self.counts.max()), 1), dtype=torch.int32)
            for row, into in zip(rows, self.positions, strict=True):
                found = row.nonzero()[:, 0]
                into[: len(found)] = found
        self.visible = None if visible is None else visible.to(torch.uint8).contiguous()

    def shape(self, q: torch.Tensor, k: torch.Tensor, window: int, form: Form, scale: float) -> _Shape:
        batch, heads, queries, dim = q.shape
        return _Shape(
            *(batch, heads, k.shape[1], queries, k.shape[2], dim, window, self.positions.shape[1]),
            *(
                self.positions.data_ptr(),
                self.counts.data_ptr(),
                None if self.visible is None else self.visible.data_ptr(),
            ),
            *(scale, EPSILON, _FORMS[form], torch.get_num_threads()),
        )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, kept, window, form, visible, scale):
        q32, k32, v32 = (x.detach().to(torch.float32).contiguous() for x in (q, k, v))
        call = _Call(q32, k32, kept, visible)
        shape = call.shape(q32, k32, window, form, scale)
        learns = any(x.requires_grad for x in (q, k, v))
        out = torch.empty_like(q32)
        stats = torch.empty(*q32.shape[:3], 5) if learns else None
        plain = torch.empty_like(q32) if learns and form == "sa_normalised" else None
        library().attention_forward(ctypes.byref(shape), *map(_pointer, (q32, k32, v32, out, stats, plain)))
        if learns:
            ctx.save_for_backward(q32, k32, v32, out, stats, plain)
            ctx.call, ctx.rest, ctx.dtypes = call, (window, form, scale), (q.dtype, k.dtype, v.dtype)
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, stats, plain = ctx.saved_tensors
        shape = ctx.call.shape(q, k, *ctx.rest)
        grad = grad.to(torch.float32).contiguous()
        batch, heads, keys, dim = q.shape[0], q.shape[1], k.shape[2], q.shape[3]
        dq, dk, dv = torch.zeros_like(q), torch.zeros(batch, heads, keys, dim), torch.zeros(batch, heads, keys, dim)
        tensors = (q, k, v, out, stats, plain, grad, dq, dk, dv)
        library().attention_backward(ctypes.byref(shape), *map(_pointer, tensors))
        dk, dv = (x.view(batch, k.shape[1], -1, keys, dim).sum(dim=2) for x in (dk, dv))
        found = (x.to(dtype) for x, dtype in zip((dq, dk, dv), ctx.dtypes, strict=True))
        return (*found, None, None, None, None, None)


def _pointer(x: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())
