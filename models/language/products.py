"""Products with weights as they lie in memory, by the kernels of products.h, and what they call a matrix."""

from __future__ import annotations

import ctypes
import functools

import torch

from ..native import load, pointer

FEW = 16
"""Up to so many rows of activations the kernels' own product is faster than making a matrix float32."""

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.int8: 3}


class Matrix(ctypes.Structure):
    """`Matrix` of products.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "scale", "least")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
        ("kind", ctypes.c_int32),
    )

    @classmethod
    def of(
        cls, weights: torch.Tensor, inputs: int, scale: torch.Tensor | None = None, least: torch.Tensor | None = None
    ) -> Matrix:
        """Of contiguous tensors, which must live as long as it; `inputs` is a multiple of 32."""
        tensors = (pointer(x) for x in (weights, scale, least))
        return cls(*tensors, inputs, weights.shape[0], _KINDS[weights.dtype])


@functools.cache
def library() -> ctypes.CDLL:
    """Raises KernelError, StoreError: see `edgefm.models.native.load`."""
    functions = ("few_product", "unpack", "norm_rows", "rotate_rows", "gate_rows")
    return load("language/kernels.cpp", functions, ("vectors.h", "language/products.h", "language/rows.h"))


def product(matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    """x (rows, in) float32 times the matrix transposed: (rows, out)."""
    x = x.contiguous()
    found, sums = torch.empty(len(x), matrix.outputs), torch.empty(len(x), matrix.inputs // 32)
    arguments = (pointer(x), ctypes.c_int64(len(x)), pointer(sums), pointer(found), torch.get_num_threads())
    library().few_product(ctypes.byref(matrix), *arguments)
    return found
