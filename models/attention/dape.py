"""Data-adaptive positional encoding: CAPE/DAPE (arXiv 2405.14722) and DAPE V2 (arXiv 2410.04798).

The scores A (scaled, before the softmax) and a bias B of the distance go through a small network over the heads of a layer,
f([A; B]), and the attention is softmax(A + B + f([A; B])). V1's network works on each pair of positions alone, V2's convolves
three neighbouring keys, causally cut first: without the cut a score would see the key behind the query.

`reference` holds all (H, T, T) scores, as written in the papers. `attend` never does: kernels work on a block of queries and a
tile of keys at a time, and where none serves, PyTorch on a block of queries, to the last key that it sees; all compute scores
again in the backward pass.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError
from ..native import missing
from . import cpu, dape_cpu
from .api import ROW, Choice, check, tell, triton_unfit
from .reference import repeated, scores

Bias = Literal["alibi", "kerple", "fire"]
Network = Literal["none", "pointwise", "convolution"]

_HIDDEN = 32
_LEAST = 1e-2
_BLOCK = {"cpu": 128, "cuda": 1024}
"""Queries at once. On a CPU a block's scores should stay in the caches; a GPU wants fewer and larger kernels."""


class DistanceBias(nn.Module):
    """B (H, TQ, TK) of the distance i - j >= 0 between query and key.

    `alibi`: -slope_h (i - j), slopes 2^(-8h/H). `kerple`: -p_h log(1 + a_h (i - j)), learned, p from U(0, 2), a from U(0, 1),
    both kept at 1e-2 at least. `fire`: f(psi(i - j) / psi(max(L, i))), psi(x) = log(1 + c x), f a network of one hidden layer.
    """

    slopes: torch.Tensor

    def __init__(self, kind: Bias, heads: int) -> None:
        super().__init__()
        self.kind: Bias = kind
        if kind == "alibi":
            self.register_buffer("slopes", 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads))
        elif kind == "kerple":
            self.p = nn.Parameter(2 * torch.rand(heads))
            self.a = nn.Parameter(torch.rand(heads))
        elif kind == "fire":
            self.network = nn.Sequential(nn.Linear(1, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, heads))
            self.c = nn.Parameter(torch.tensor(0.1))
            self.length = nn.Parameter(torch.tensor(512.0))
        else:
            raise ConfigError(f"there is no bias {kind!r}; there are alibi, kerple, fire")

    def forward(self, here: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Args: consecutive positions, (TQ,) of queries and (TK,) of keys. Keys behind a query count as distance 0."""
        if self.kind != "fire":
            return self._of_distance(here, there)
        far = (here[:, None] - there[None, :]).clamp(min=0)
        c = self.c.abs() + 1e-6
        whole = torch.log(1 + c * torch.maximum(here.to(self.length.dtype), self.length.abs()))
        share = torch.log(1 + c * far) / (whole[:, None] + 1e-6)
        return self.network(share[..., None]).permute(2, 0, 1)

    def _of_distance(self, here: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Biases of the distance alone: each of the TQ + TK - 1 distances of consecutive positions once, along diagonals."""
        steps = torch.arange(1 - len(there), len(here), device=here.device)
        far = (steps + (here[0] - there[0])).clamp(min=0)  # no number leaves a GPU for it
        return self.at(far).unfold(1, len(there), 1).flip(2)

    def at(self, far: torch.Tensor) -> torch.Tensor:
        """(H, N) biases of (N,) distances; of `alibi` and `kerple`, which depend on nothing else."""
        p, a = self.rates()
        return -p[:, None] * (far if self.kind == "alibi" else torch.log(1 + a[:, None] * far))

    def rates(self) -> tuple[torch.Tensor, torch.Tensor]:
        """p and a (H,) of `at`, in float32 at least: half precision cannot tell distances apart. Of `alibi` p are the slopes."""
        if self.kind == "alibi":
            p = a = self.slopes
        else:
            p, a = self.p.clamp(min=_LEAST), self.a.clamp(min=_LEAST)
        wide = torch.promote_types(p.dtype, torch.float32)
        return p.to(wide), a.to(wide)


class Dape(nn.Module):
    """What a layer adds to its scores: a bias, and a network over heads; see the module.

    Args:
        network: `none` leaves A + B; `pointwise` is DAPE, `convolution` DAPE V2 (1 x 3 along keys).
        cut: V2's causal cut of what the network sees. False is the control that leaks, for tests.
    """

    def __init__(self, heads: int, bias: Bias = "kerple", network: Network = "pointwise", cut: bool = True) -> None:
        super().__init__()
        self.bias = DistanceBias(bias, heads)
        self.heads = heads
        self.cut = cut
        self.reach = 1 if network == "convolution" else 0
        kernel = (1, 2 * self.reach + 1)
        self.network = (
            None
            if network == "none"
            else nn.Sequential(
                nn.Conv2d(2 * heads, _HIDDEN, kernel, padding=(0, self.reach)),
                nn.LeakyReLU(inplace=True),
                nn.Conv2d(_HIDDEN, heads, kernel, padding=(0, self.reach)),
            )
        )

    def forward(self, a: torch.Tensor, here: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """(B, H, TQ, TK) scores -> scores with positions in them.

        Args:
            here, there: (TQ,), (TK,) consecutive positions of queries and of keys; with a cache a query stands far behind the
                first key.
        """
        b = self.bias(here, there).to(a.dtype).expand_as(a)
        if self.network is None:
            return a + b
        seen = torch.cat((a, b), dim=1)
        if self.cut and self.reach:  # without a convolution what stands behind a query touches nothing else
            seen = torch.where(there[None, :] <= here[:, None], seen, 0)
        # A key more, so that the second convolution sees for the last key what it sees for every other: the paper's zero padding
        # there would make a score depend on how many keys follow.
        return a + b + self.network(nn.functional.pad(seen, (0, self.reach)))[..., : a.shape[-1]]

    def tables(self, keys: int) -> tuple[torch.Tensor, ...]:
        """What the kernel of dape.cpp wants of a layer whose bias is of the distance alone. Differentiable.

        Returns:
            `bias` (H, keys), `units` (C, keys + 1), `units_at_0` (C, keys), `w1` (taps, C, H), `w2` (taps, H, C).
        """
        bias, heads = self.bias.at(torch.arange(keys)), self.heads
        if self.network is None:
            no_unit = [bias.new_zeros(shape) for shape in ((0, keys + 1), (0, keys), (1, 0, heads), (1, heads, 0))]
            return bias, *no_unit
        first, constant, last, last_constant = (x.to(bias.dtype) for x in self.network.parameters())
        of_scores, of_bias = first[:, :, 0].permute(2, 0, 1).split(heads, dim=2)  # (taps, C, H) each
        near = nn.functional.pad(bias, (1, 0))  # of distances -1, 0, ...: a key behind the query is cut
        units = at_key_0 = of_bias[self.reach] @ near + constant[:, None]
        if self.reach:
            # A unit at distance d sees the key behind it at d - 1 and the one before it at d + 1, which key 0 has not.
            at_key_0 = units + of_bias[2] @ nn.functional.pad(near, (1, 0))[:, :-1]
            units = at_key_0 + of_bias[0] @ nn.functional.pad(near, (0, 1))[:, 1:]
        return bias + last_constant[:, None], units, at_key_0[:, 1:], of_scores, last[:, :, 0].permute(2, 0, 1)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dape: Dape) -> torch.Tensor:
    """Causal attention with every score at once; shapes as in `edgefm.models.attention.attend`."""
    here, there = _positions(q.shape[2], k.shape[2], q.device)
    x = dape(scores(q, k), here, there)
    x = torch.where(there[None, :] <= here[:, None], x, -torch.inf)
    return torch.softmax(x, dim=-1) @ repeated(v, q.shape[1])


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dape: Dape) -> torch.Tensor:
    """The same without (H, T, T) scores; differentiable.

    Raises:
        ConfigError: shapes that do not fit each other, or the layer.
    """
    check(q, k, v)
    if q.shape[1] != dape.heads:
        raise ConfigError(f"a layer of {dape.heads} heads cannot place queries of {q.shape[1]}")
    choice = choose(q, dape, k.shape[1])
    tell(choice, "dape_v2" if dape.reach else "dape", q.device.type)
    if choice.name == "c++":
        return dape_cpu.Attention.apply(q, k, v, *dape.tables(k.shape[2]))  # pyright: ignore[reportReturnType]
    if choice.name == "triton":
        return on_triton(q, k, v, dape)
    return blocks(q, k, v, dape, _BLOCK.get(q.device.type, _BLOCK["cpu"]))


def choose(q: torch.Tensor, dape: Dape, key_heads: int) -> Choice:
    """What `attend` would run."""
    if q.device.type == "cuda" and q.shape[2] == 1:
        return ROW
    if dape.bias.kind == "fire":
        why = "the bias depends on more than the distance"
    elif dape.reach and not dape.cut:
        why = "nothing is cut"
    elif q.device.type == "cuda":
        why = triton_unfit("dape_gpu", q, key_heads)
    else:
        why = cpu.fits(q) or missing(dape_cpu.library)
    if why:
        return Choice("blocks", f"PyTorch, as {why}")
    return Choice("triton", "fused") if q.device.type == "cuda" else Choice("c++", "fused, in float32")


def on_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dape: Dape) -> torch.Tensor:
    """`attend` by the kernels for GPUs, which must serve such tensors."""
    from . import dape_gpu  # Triton comes with PyTorch's builds for GPUs alone

    chosen = dape_gpu.tile(q, k.shape[1])
    return dape_gpu.Attention.apply(q, k, v, chosen, *dape_gpu.tables(dape, chosen, *k.shape[1:3]))  # pyright: ignore[reportReturnType]


def blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dape: Dape, block: int) -> torch.Tensor:
    """By blocks of queries, in PyTorch: no scores exist at once beyond a block's, (H, block, T).

    A block of queries takes the keys up to its last query: the halo that the convolution reaches behind it is cut to 0, as the
    padding is. Differentiable; blocks are computed again in the backward pass.
    """
    queries, keys = q.shape[2], k.shape[2]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *dape.parameters()))
    done = []
    for start in range(0, queries, block):
        rows, end = q[:, :, start : start + block], keys - queries + min(start + block, queries)
        part = (rows, k[:, :, :end], v[:, :, :end], dape)
        done.append(checkpoint(reference, *part, use_reentrant=False) if learns else reference(*part))
    return torch.cat(done, dim=2)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _positions(queries: int, keys: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(keys - queries, keys, device=device), torch.arange(keys, device=device)
