"""The Triton kernels: under Triton's interpreter against the reference, compiled for sm_90, and run where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from edgefm.models.attention import reference
from edgefm.models.attention.api import attend, choose
from edgefm.models.attention.pattern import Form, Pattern

from .triton_process import ON_GPU, compiles, errors_of

pytest.importorskip("triton")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from edgefm.models.attention import gpu

KINDS = {"POSITION": "*i32", "COUNT": "*i32", "AT": "*i32", "SEEN": "*u8", "scale": "fp32", "epsilon": "fp32"}
KINDS |= dict.fromkeys(("STATS", "DELTA", "PLAIN", "DQ", "DK", "DV"), "*fp32")
KINDS |= dict.fromkeys(("heads", "key_heads", "queries", "keys", "kept", "held", "window"), "i32")
CONSTANTS = {"FORM": 2, "VISIBLE": True, "D": 64, "BQ": gpu.BLOCK_Q, "BK": gpu.BLOCK_K, "KEPT": True}
for kernel in (gpu._forward, gpu._queries_backward, gpu._keys_backward):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in CONSTANTS else KINDS.get(name, "*bf16") for name in names}
    constants = {(names.index(name),): value for name, value in CONSTANTS.items() if name in names}
    made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert b"ELF" in made.asm["cubin"][:8] and ".target sm_90" in made.asm["ptx"]
    assert made.metadata.shared <= 227 * 1024  # of a streaming multiprocessor
print("compiled")
"""


COMPARE = """
import json, sys
import torch
from edgefm.models.attention import reference
from edgefm.models.attention.api import fused
from edgefm.models.attention.pattern import Pattern

torch.set_num_threads(1)
device = "cuda" if torch.cuda.is_available() else "cpu"

def worst(found, expected):  # in units of 2e-4, or a thousandth of what is expected
    return float(((found.detach().double().cpu() - expected).abs() / (2e-4 + 1e-3 * expected.abs())).max())

def compare(form, initial, neighbours, shape, masked):
    batch, heads, key_heads, queries, keys, dim = shape
    random, pattern = torch.Generator().manual_seed(0), Pattern(initial, neighbours)
    exact = [
        torch.randn(batch, h, t, dim, dtype=torch.float64, generator=random).requires_grad_()
        for h, t in ((heads, queries), (key_heads, keys), (key_heads, keys))
    ]
    separators = torch.rand(batch, keys, generator=random) < 0.2 if masked else None
    visible = torch.rand(batch, keys, generator=random) < 0.9 if masked else None
    expected = reference.attend(*exact, pattern, form, separators, visible)
    grad = torch.randn(expected.shape, dtype=torch.float64, generator=random)
    grads = torch.autograd.grad(expected, exact, grad)
    single = [x.detach().float().to(device).requires_grad_() for x in exact]
    masks = [None if mask is None else mask.to(device) for mask in (separators, visible)]
    torch.set_default_dtype(torch.float16)  # the kernels' room is float32 whatever the default is
    found = fused("triton", *single, pattern, form, *masks, dim**-0.5)
    found_grads = torch.autograd.grad(found, single, grad.float().to(device))
    torch.set_default_dtype(torch.float32)
    return [worst(found, expected.detach()), *map(worst, found_grads, grads)]

print(json.dumps([compare(*case) for case in json.loads(sys.argv[1])]))
"""

CASES = [
    (form, initial, neighbours, shape, masked)
    for form in ("softmax", "sa", "sa_normalised")
    for initial, neighbours in ((0, None), (3, 20), (0, 70))
    for shape in ((1, 2, 1, 70, 133, 16), (2, 2, 2, 40, 40, 16))
    for masked in (False, True)
]


@pytest.fixture(scope="module")
def errors() -> list[list[float]]:
    """Of output and gradients, by case."""
    return errors_of(COMPARE, CASES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_the_kernels_compute_the_equations_and_their_gradients(errors: list[list[float]], number: int):
    assert len(errors[number]) == 4 and max(errors[number]) < 1


def test_they_compile_for_sm_90():
    assert compiles(COMPILE)


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["softmax", "sa", "sa_normalised"])
def test_half_precision_keeps_its_digits(form: Form, dtype: torch.dtype):
    """Beside the equations in float64 on the same halves: no more apart than the equations in those halves, by half again."""
    random, pattern = torch.Generator().manual_seed(0), Pattern(4, 64)
    halves = [torch.randn(2, h, 600, 64, generator=random).to("cuda", dtype).requires_grad_() for h in (9, 3, 3)]
    separators = (torch.rand(2, 600, generator=random) < 0.15).cuda()
    exact = [x.detach().double().requires_grad_() for x in halves]
    grad = torch.randn(2, 9, 600, 64, generator=random).to("cuda", dtype)

    def both(inputs: list[torch.Tensor], attend: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        out = attend(*inputs, pattern, form, separators)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    expected, plain = both(exact, reference.attend), both(halves, reference.attend)
    assert choose(halves[0], pattern, form, 600, separators).name == "triton"
    for found, other, right in zip(both(halves, attend), plain, expected, strict=True):
        assert found.dtype == dtype
        apart, usual = ((x.double() - right).norm() / right.norm() for x in (found, other))
        assert apart < 1.5 * usual + 1e-3 and apart < 2e-2


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
def test_a_gpu_s_tensors_go_to_the_kernels():
    assert choose(torch.zeros(1, 2, 40, 64, device="cuda"), Pattern(), "sa", 40).name == "triton"
    assert choose(torch.zeros(1, 2, 40, 48, device="cuda"), Pattern(), "sa", 40).name == "reference"
