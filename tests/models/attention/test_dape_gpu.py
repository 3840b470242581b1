"""DAPE's Triton kernels: under Triton's interpreter against the equations, compiled for sm_90, and run where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from edgefm.models.attention.dape import Dape, Network, attend, choose, reference

from .triton_process import ON_GPU, compiles, errors_of

pytest.importorskip("triton")

from edgefm.models.attention import dape_gpu

COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from edgefm.models.attention import dape_gpu

SINGLE = ("BIAS", "A", "UNITS", "LOG_SUMS", "DELTA", "DK", "DV", "DP", "DA", "DW1", "DUNITS", "DW2")
KINDS = {"scale": "fp32"} | dict.fromkeys(SINGLE, "*fp32")
KINDS |= dict.fromkeys(("heads", "key_heads", "queries", "keys"), "i32")
SHAPES = ((9, 3, torch.bfloat16, 3), (9, 3, torch.float32, 1))
for heads, key_heads, dtype, taps in SHAPES:
    q = torch.empty(1, heads, 1, 64, dtype=dtype)
    assert dape_gpu.fits(q, key_heads) is None
    chosen = dape_gpu.tile(q, key_heads)
    constants = {"KERPLE": True, "COPIES": dape_gpu.COPIES, "TAPS": taps, "C": 32, "D": 64, **chosen.constants}
    for kernel in (dape_gpu._forward, dape_gpu._backward):
        names, inputs = kernel.arg_names, {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
        signature = {name: "constexpr" if name in constants else KINDS.get(name, inputs) for name in names}
        given = {(names.index(name),): value for name, value in constants.items() if name in names}
        aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if signature[n].startswith("*")}
        source, options = ASTSource(kernel, signature, given, aligned), {"num_warps": dape_gpu.WARPS, "num_stages": 1}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert b"ELF" in made.asm["cubin"][:8] and ".target sm_90" in made.asm["ptx"]
        assert made.metadata.shared <= dape_gpu.shared_memory(q, chosen) <= 227 * 1024
print("compiled")
"""

COMPARE = """
import json, sys
import torch
from edgefm.models.attention import dape_gpu
from edgefm.models.attention.dape import Dape, on_triton, reference

torch.set_num_threads(1)
dape_gpu.COPIES = 2  # fewer than there are blocks
device = "cuda" if torch.cuda.is_available() else "cpu"

def compare(bias, network, shape, half, frozen):
    batch, heads, key_heads, queries, keys, dim = shape
    torch.manual_seed(0)
    dtype, exact = torch.float16 if half else torch.float32, Dape(heads, bias, network).double()
    if exact.network is not None:  # hidden units of both signs, none so near 0 that rounding tells which
        with torch.no_grad():
            exact.network[0].weight *= 0.05
            exact.network[0].bias.copy_(torch.tensor([3.0, -3.0]).repeat(16))
    single = Dape(heads, bias, network).to(device)
    single.load_state_dict(exact.state_dict())
    shapes = ((heads, queries), (key_heads, keys), (key_heads, keys), (heads, queries))
    *inputs, grad = (torch.randn(batch, t, h, dim).to(dtype).transpose(1, 2) for h, t in shapes)
    results = []
    for layer, wide, run, place in ((single, dtype, on_triton, device), (exact, torch.float64, reference, "cpu")):
        tensors = [x.to(place, wide).requires_grad_() for x in inputs]
        torch.set_default_dtype(torch.float32 if layer is exact else torch.float16)
        if frozen:
            layer.get_parameter(frozen).requires_grad_(False)
        learned = [x for x in layer.parameters() if x.requires_grad]
        out = run(*tensors, layer)
        found = torch.autograd.grad(out, [*tensors, *learned], grad.to(place, wide))
        results.append([x.detach().double().cpu() for x in (out, *found)])
    return [float((one - other).abs().max() / other.abs().max().clamp(min=1)) for one, other in zip(*results)]

print(json.dumps([compare(*case) for case in json.loads(sys.argv[1])]))
"""

CASES = [
    ("kerple", "none", (1, 9, 3, 40, 40, 16), False, None),
    ("alibi", "none", (2, 12, 12, 37, 37, 16), True, None),
    ("kerple", "pointwise", (1, 9, 3, 40, 40, 16), False, None),
    ("alibi", "pointwise", (2, 4, 2, 33, 33, 16), False, None),
    ("kerple", "pointwise", (1, 4, 4, 9, 75, 32), False, "bias.p"),
    ("kerple", "convolution", (1, 9, 3, 40, 40, 16), False, None),
    ("alibi", "convolution", (2, 4, 2, 33, 33, 16), False, None),
    ("kerple", "convolution", (1, 4, 4, 9, 75, 32), False, "bias.p"),
    ("kerple", "convolution", (1, 5, 1, 2, 61, 16), False, "bias.a"),
    ("kerple", "convolution", (2, 12, 12, 37, 37, 16), True, None),
]


@pytest.fixture(scope="module")
def errors() -> list[list[float]]:
    """Of output and gradients, by case, of their greatest value."""
    return errors_of(COMPARE, CASES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_the_kernels_compute_the_equations_and_their_gradients(errors: list[list[float]], number: int):
    """Over the borders of tiles and blocks, heads in groups, padded heads, and a cache."""
    attended, learned = errors[number][:4], errors[number][4:]
    assert max(attended) < (2e-3 if CASES[number][3] else 1e-5)
    assert max(learned, default=0) < (5e-2 if CASES[number][3] else 1e-4)


def test_they_compile_for_sm_90_within_its_shared_memory():
    assert compiles(COMPILE)


@pytest.fixture
def deterministic() -> Iterator[Callable[[bool], None]]:
    """Asks PyTorch for deterministic algorithms or not; training that ran in this process before may have left them on."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(before)


def test_what_they_cannot_do_is_said(deterministic: Callable[[bool], None]):
    q = torch.empty(1, 12, 8, 64)
    assert dape_gpu.fits(q, 3) is None and dape_gpu.fits(q.half(), 12) is None
    assert "float64" in str(dape_gpu.fits(q.double(), 3))
    assert "no power of two" in str(dape_gpu.fits(q[..., :48], 3))
    assert dape_gpu.fits(q, 12) == "12 heads of 64 in torch.float32, 12 of keys, are too many for a program"
    assert "64 heads of 64 in torch.float16, 8 of keys, are too many" in str(
        dape_gpu.fits(q.half().repeat(1, 6, 1, 1)[:, :64], 8)
    )
    assert "want more shared memory than there is" in str(dape_gpu.fits(q.repeat(1, 1, 1, 2), 3))
    deterministic(True)
    assert "no fixed order" in str(dape_gpu.fits(q, 3))
    with torch.no_grad():
        assert dape_gpu.fits(q, 3) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_layer_of_another_dtype_comes_in_float32(dtype: torch.dtype):
    """Which the compiler wants and the interpreter does not."""
    bias, p, a, _, units, *_ = dape_gpu.tables(Dape(12).to(dtype), dape_gpu.tile(torch.empty(1, 12, 8, 64), 3), 3, 8)
    assert {x.dtype for x in (bias, p, a, units)} == {torch.float32}


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("network", ["pointwise", "convolution"])
def test_half_precision_keeps_its_digits(network: Network, dtype: torch.dtype):
    """Beside the equations in float64 on the same halves: no more apart than the equations in those halves, by half again."""
    torch.manual_seed(0)
    plain = Dape(9, "kerple", network).to("cuda", dtype)
    exact = Dape(9, "kerple", network).to("cuda", torch.float64)
    exact.load_state_dict(plain.state_dict())
    inputs = [torch.randn(2, h, 600, 64).to("cuda", dtype) for h in (9, 3, 3, 9)]
    assert choose(inputs[0], plain, 3).name == "triton"
    results = []
    for layer, run in ((plain, attend), (plain, reference), (exact, reference)):
        *tensors, grad = (x.detach().to(layer.bias.p.dtype) for x in inputs)
        for x in tensors:
            x.requires_grad_()
        out = run(*tensors, layer)  # pyright: ignore[reportCallIssue, reportArgumentType]
        found = torch.autograd.grad(out, tensors, grad)
        results.append([x.detach().double() for x in (out, *found)])
    for found, usual, right in zip(*results, strict=True):
        assert (found - right).norm() < 1.5 * (usual - right).norm() + 1e-3 * right.norm()
