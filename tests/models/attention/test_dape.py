"""DAPE and DAPE V2: blocks against everything at once, prefill against a cache, and the cut that keeps the future out."""

from __future__ import annotations

import pytest
import torch
from edgefm.models.attention.dape import Bias, Dape, Network, attend, reference
from edgefm.models.errors import ConfigError

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
    found = attend(*inputs, dape, block=32)  # pyright: ignore[reportCallIssue, reportArgumentType]
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(x, learned, grad) for x in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("network", NETWORKS)
def test_decoding_with_a_cache_equals_prefill(bias: Bias, network: Network):
    dape, (q, k, v) = layer(bias, network), made(40)
    whole = attend(q, k, v, dape, block=16)
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
        attend(q, k, v, dape, block).sum().backward()
    assert largest <= 2 * 32 * block * (tokens + 1)  # the hidden layer of a block, for the batch of two
    assert largest < 2 * heads * tokens * tokens


def test_an_unknown_bias_is_refused():
    with pytest.raises(ConfigError, match="alibi, kerple, fire"):
        Dape(4, "rope")  # pyright: ignore[reportArgumentType]
