"""A step of many sequences in one call of the kernel of step.cpp, which `Decoder.step` is made of where it can be built."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from ..attention.cache import GrowingCache
from ..native import load, missing, pointer
from .config import DecoderConfig
from .dense import Dense
from .products import Matrix
from .quantised import Blocks

_WIDTH = 32
"""Sizes are multiples of this: of a block of weights, and of every vector width that the kernel is built for."""


class Layer(Protocol):
    """Norms (dim,) float32, and the matrices between them."""

    @property
    def norm(self) -> torch.Tensor: ...
    @property
    def ffn_norm(self) -> torch.Tensor: ...
    @property
    def qkv(self) -> Dense | Blocks: ...
    @property
    def out(self) -> Dense | Blocks: ...
    @property
    def gate_up(self) -> Dense | Blocks: ...
    @property
    def down(self) -> Dense | Blocks: ...


class _Layer(ctypes.Structure):
    """`Layer` of step.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("norm", "ffn_norm")),
        *((name, Matrix) for name in ("qkv", "out", "gate_up", "down")),
    )


class _Model(ctypes.Structure):
    """`Model` of step.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "norm")),
        ("head", Matrix),
        *((name, ctypes.c_int64) for name in ("count", "dim", "hidden", "heads", "key_heads", "head_size")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("half", "threads")),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Raises KernelError, StoreError: see `edgefm.models.native.load`."""
    return load("language/step.cpp", ("decode_step",), ("vectors.h", "language/products.h", "language/rows.h"))


def unfit(config: DecoderConfig) -> str | None:
    """Why the kernel cannot step such a model; None where it can."""
    sizes = (config.dim, config.hidden, config.heads * config.head_size)
    if any(size % _WIDTH for size in sizes) or config.head_size % (_WIDTH // 2):
        return f"the kernel wants sizes in multiples of {_WIDTH} and heads in {_WIDTH // 2}, got {sizes} and {config.head_size}"
    return missing(library)


class FusedStep:
    """Holds pointers to a model's weights.

    Args:
        norm: (dim,) float32, before the head.
        cached: of keys and values, float32 or bfloat16.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layers: Sequence[Layer],
        norm: torch.Tensor,
        head: Dense | Blocks,
        cached: torch.dtype,
    ) -> None:
        self._like = torch.empty(config.key_heads, 0, config.head_size, dtype=cached)
        self._weights = (layers, norm, head)  # alive as long as the pointers
        self._layers = (_Layer * len(layers))(
            *(
                _Layer(
                    *(layer.norm.data_ptr(), layer.ffn_norm.data_ptr()),
                    *(matrix.described for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down)),
                )
                for layer in layers
            )
        )
        self._model = _Model(
            *(ctypes.addressof(self._layers), norm.data_ptr(), head.described),
            *(len(layers), config.dim, config.hidden, config.heads, config.key_heads, config.head_size),
            *(config.norm_epsilon, cached == torch.bfloat16),
        )

    def __call__(
        self,
        x: torch.Tensor,
        caches: Sequence[Sequence[GrowingCache]],
        separators: Sequence[bool],
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """Appends an entry to every cache.

        Args:
            x: (B, dim) float32 embeddings of the tokens; overwritten.
            caches: of each sequence, by layers.
            separators: (B,), whether a token is one.
            cos, sin: (B, D / 2) float32.

        Returns:
            float32 logits (B, vocabulary); each row's bits do not depend on the others.
        """
        rows = [
            [cache.extend(self._like, separator) for cache in of_layers]
            for of_layers, separator in zip(caches, separators, strict=True)
        ]
        entries = np.array(rows, np.int64).transpose(1, 0, 2).copy()  # (layers, B, 6)
        logits = torch.empty(len(x), self._model.head.outputs)
        self._model.threads = torch.get_num_threads()
        tensors = (pointer(x), ctypes.c_void_p(entries.ctypes.data), *map(pointer, (cos, sin, logits)))
        library().decode_step(ctypes.byref(self._model), ctypes.c_int64(len(x)), *tensors)
        return logits
