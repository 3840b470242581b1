"""DAPE and DAPE V2: blocks against everything at once, prefill against a cache, and the cut that keeps the future out."""

from __future__ import annotations

import pytest
import torch
from edgefm.models import native
from edgefm.models.attention import api, dape_cpu
from edgefm.models.attention.api import tell
from edgefm.models.attention.dape import Bias, Dape, Network, attend, blocks, choose, reference
from edgefm.models.errors import ConfigError, KernelError

BIASES: tuple[Bias, ...] = ("alibi", "kerple", "fire")
NETWORKS: tuple[Network, ...] = ("none", "pointwise", "convolution")


def made(tokens: int, heads: int = 4):
    random = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, h, tokens, 16, dtype=torch.float64, generator=random) for h in (heads, heads // 2, heads // 2)
    ]


def layer(bias: Bias, network: Network, **settings) -> Dape:
    torch.manual_seed(0)
    return Dape(4, bias, network, **settings).double()


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("network", NETWORKS)
def test_blocks_of_queries_equal_everything_at_once_with_its_gradients(bias: Bias, network: Network):
    dape, inputs = layer(bias, network), made(90)
    for x in inputs:
        x.requires_grad_()
    learned = [*inputs, *dape.parameters()]
    grad = torch.randn(2, 4, 90, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = reference(*inputs, dape)  # pyright: ignore[reportCallIssue]
    found = blocks(*inputs, dape, block=32)  # pyright: ignore[reportCallIssue, reportArgumentType]
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(x, learned, grad) for x in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("network", NETWORKS)
def test_decoding_with_a_cache_equals_prefill(bias: Bias, network: Network):
    dape, (q, k, v) = layer(bias, network), made(40)
    whole = blocks(q, k, v, dape, block=16)
    steps = [attend(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], dape) for i in range(40)]
    torch.testing.assert_close(torch.cat(steps, dim=2), whole)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_future_token_changes_nothing_and_without_the_cut_it_does(network: Network):
    @torch.no_grad()
    def difference(cut: bool) -> float:
        dape, (q, k, v) = layer("kerple", network, cut=cut), made(40)
        before = reference(q, k, v, dape)
        k[:, :, 30:], v[:, :, 30:] = -k[:, :, 30:], -v[:, :, 30:]
        return float((reference(q, k, v, dape)[:, :, :30] - before[:, :, :30]).abs().max())

    assert difference(cut=True) == 0
    assert (difference(cut=False) > 1e-3) == (network == "convolution")


def test_no_scores_of_all_heads_and_positions_exist_at_once():
    """The largest tensor that a forward or backward pass keeps or makes is a block's, not (H, T, T)."""
    tokens, heads, block = 1024, 4, 64
    dape, (q, k, v) = layer("kerple", "convolution"), made(tokens, heads)
    q.requires_grad_()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    with Watch():
        blocks(q, k, v, dape, block).sum().backward()
    assert largest <= 2 * 32 * block * (tokens + 1)  # the hidden layer of a block, for the batch of two
    assert largest < 2 * heads * tokens * tokens


def smooth(dape: Dape) -> Dape:
    """Hidden units of both signs, none so near 0 that float32 and float64 may disagree on which."""
    if dape.network is not None:
        first: torch.nn.Conv2d = dape.network[0]  # pyright: ignore[reportAssignmentType]
        with torch.no_grad():
            first.weight *= 0.05
            first.bias.copy_(torch.tensor([3.0, -3.0]).repeat(16))
    return dape


@pytest.mark.parametrize("bias", ["alibi", "kerple"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "queries", "keys"),
    [
        (1, 4, 2, 1, 1),
        (2, 4, 4, 17, 17),
        (2, 9, 3, 112, 112),
        (1, 9, 3, 130, 130),
        (2, 4, 2, 250, 250),
        (1, 5, 1, 40, 290),
        (1, 4, 2, 1, 240),
    ],
)
def test_the_kernel_equals_the_equations_with_all_gradients(bias, network, batch, heads, key_heads, queries, keys):
    """Over the borders of chunks and of blocks, heads in groups, and a cache."""
    torch.manual_seed(0)
    exact = smooth(Dape(heads, bias, network)).double()
    rounded = Dape(heads, bias, network)
    rounded.load_state_dict(exact.state_dict())
    inputs = [torch.randn(batch, h, t, 32) for h, t in ((heads, queries), (key_heads, keys), (key_heads, keys))]
    grad = torch.randn(batch, heads, queries, 32)
    assert choose(inputs[0], rounded, key_heads).name == "c++"
    found, expected = [], []
    for dape, dtype, run, into in (
        (rounded, torch.float32, attend, found),
        (exact, torch.float64, reference, expected),
    ):
        tensors = [x.to(dtype).requires_grad_() for x in inputs]
        out = run(*tensors, dape)  # pyright: ignore[reportCallIssue, reportArgumentType]
        into += [out.detach(), *torch.autograd.grad(out, [*tensors, *dape.parameters()], grad.to(dtype))]
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        scale = (
            other.abs().max().clamp(min=1)
        )  # some of the parameters' are 0 but for rounding, such as the last constant's
        torch.testing.assert_close(one / scale, (other / scale).float(), rtol=0, atol=1e-5 if i < 4 else 2e-4)


@pytest.mark.parametrize("network", ["pointwise", "convolution"])
def test_the_kernel_tells_a_unit_s_sign_at_every_place(network: Network):
    torch.manual_seed(0)
    dape, (q, k, v) = Dape(4, "kerple", network), (x.float().requires_grad_() for x in made(40))
    learned = [q, k, v, *list(dape.parameters())[:-1]]  # the last constant's gradient is 0 but for rounding
    found, expected = (torch.autograd.grad(run(q, k, v, dape).square().sum(), learned) for run in (attend, reference))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("network", NETWORKS)
def test_in_the_kernel_a_future_token_changes_no_bit_and_decoding_equals_prefill(network: Network):
    torch.manual_seed(0)
    dape, (q, k, v) = Dape(4, "kerple", network), (x.float() for x in made(150))
    whole = attend(q, k, v, dape)
    steps = [attend(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], dape) for i in range(0, 150, 7)]
    torch.testing.assert_close(torch.cat(steps, dim=2), whole[:, :, ::7])
    k[:, :, 115:], v[:, :, 115:] = -1e3 * k[:, :, 115:], 1e9
    assert attend(q, k, v, dape)[:, :, :115].equal(whole[:, :, :115])


def test_the_kernel_s_gradients_have_the_same_bits_each_time_and_halves_keep_their_dtype():
    torch.manual_seed(0)
    dape, inputs = Dape(4, "kerple", "convolution"), [x.bfloat16().requires_grad_() for x in made(200)]
    learned = [*inputs, *dape.parameters()]
    runs = []
    for _ in range(3):
        out = attend(*inputs, dape)  # pyright: ignore[reportArgumentType, reportCallIssue]
        runs.append([out, *torch.autograd.grad(out.float().sum(), learned)])
    assert [x.dtype for x in runs[0]] == [torch.bfloat16] * 4 + [x.dtype for x in dape.parameters()]
    assert all(x.equal(y) for run in runs[1:] for x, y in zip(runs[0], run, strict=True))


def test_a_layer_in_half_precision_tells_far_distances_apart():
    """Its parameters are rounded, what is made of them is not: bfloat16 has the distances 1,000 and 1,001 alike."""
    torch.manual_seed(0)
    half = Dape(4, "alibi", "convolution").bfloat16()
    wide = Dape(4, "alibi", "convolution")
    wide.load_state_dict(half.state_dict())
    assert half.bias.at(torch.tensor([1000, 1001]))[0].unique().numel() == 2
    inputs = [x.bfloat16() for x in made(100)]
    assert attend(*inputs, half).equal(attend(*inputs, wide))  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_what_the_kernel_cannot_do_runs_by_blocks_and_says_why(monkeypatch, caplog):
    q = torch.zeros(1, 4, 8, 16)
    assert "more than the distance" in choose(q, Dape(4, "fire"), 4).why
    assert "nothing is cut" in choose(q, Dape(4, network="convolution", cut=False), 4).why
    assert "float64" in choose(q.double(), Dape(4), 4).why and "multiple of 16" in choose(q[..., :9], Dape(4), 4).why

    def none() -> None:
        raise KernelError("no compiler at all")

    monkeypatch.setattr(dape_cpu, "library", none)
    dape = Dape(4)
    expected = reference(q, q, q, dape)
    try:
        torch.testing.assert_close(attend(q, q, q, dape), expected)
    finally:
        native.missing.cache_clear()
        tell.cache_clear()
    (said,) = [r.getMessage() for r in caplog.records if "no compiler at all" in r.getMessage()]
    assert said.startswith("event=attention implementation=blocks form=dape device=cpu")


def test_shapes_that_do_not_fit_are_refused_before_a_kernel_reads_them():
    dape, (q, k, v) = Dape(4), (x.float() for x in made(20))
    with pytest.raises(ConfigError, match="a layer of 4 heads cannot place queries of 2"):
        attend(q[:, :2], k, v, dape)
    for keys, values in ((k[:, :, 1:], v), (k[:, :, 1:], v[:, :, 1:]), (k[..., :8], v[..., :8])):
        with pytest.raises(ConfigError, match=r"wants q|do not fit"):
            attend(q, keys, values, dape)
    with pytest.raises(ConfigError, match="different devices: cpu, meta, cpu"):
        attend(q, k.to("meta"), v, dape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_kernels_room_is_float32_whatever_the_default_is(dtype: torch.dtype):
    dape, inputs = Dape(4), [x.float().requires_grad_() for x in made(60)]

    def both() -> list[torch.Tensor]:
        outs = [attend(*inputs, dape), api.attend(*inputs, form="sa_normalised")]  # pyright: ignore[reportCallIssue, reportArgumentType]
        return [*outs, *(x for out in outs for x in torch.autograd.grad(out.sum(), inputs))]

    expected = both()
    torch.set_default_dtype(dtype)
    try:
        found = both()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivatives_are_refused():
    dape, inputs = Dape(4), [x.float().requires_grad_() for x in made(20)]
    for out in (attend(*inputs, dape), api.attend(*inputs, form="sa")):  # pyright: ignore[reportCallIssue, reportArgumentType]
        (grad,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_an_unknown_bias_is_refused():
    with pytest.raises(ConfigError, match="alibi, kerple, fire"):
        Dape(4, "rope")  # pyright: ignore[reportArgumentType]
