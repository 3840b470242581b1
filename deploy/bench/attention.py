"""`edgefm bench attention`: every variant of attention, fused beside eager beside PyTorch's own, in time and memory.

One layer of SmolLM2-135M (9 heads on 3 of keys, 64 each), one sequence, float32. Repeats are interleaved, so that whatever else
the machine does meets all of them. Separators lie at random, as often as in English text.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from ...models.attention import api, dape, reference
from ...models.attention.pattern import Form, Pattern
from ..demo_results import describe_environment
from .high_water import lowered, risen_mib

HEADS, KEY_HEADS, DIM = 9, 3, 64
SEPARATORS = 0.155
"""Share of tokens that are separators; 15 to 16 % of SmolLM2's on books."""
SEPLLM, SINKS = Pattern(4, 256), Pattern(4, 256)
_EAGER_TOKENS = 4096
"""Eager attention holds (H, T, T) scores, several times over."""
_MEMORY_TOKENS = 4096
_BACKWARD_TOKENS = 4096
_DAPE_TOKENS = 1024
"""DAPE's networks take a second a forward pass there."""
_WARM_TOKENS = 128

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def calls(tokens: int) -> dict[str, dict[str, Call]]:
    """By variant and implementation; `sdpa`, PyTorch's causal softmax, is the peer of all."""
    separators = torch.rand(1, tokens, generator=torch.Generator().manual_seed(0)) < SEPARATORS
    torch.manual_seed(0)
    networks = {"dape": dape.Dape(HEADS, "kerple", "pointwise"), "dape_v2": dape.Dape(HEADS, "kerple", "convolution")}
    found: dict[str, dict[str, Call]] = {
        "softmax": {"sdpa": _sdpa},
        "sepllm": _both(SEPLLM, "softmax", separators),
        "streaming": _both(SINKS, "softmax"),
        "sa_softmax": _both(Pattern(), "sa"),
        "sa_softmax_normalised": _both(Pattern(), "sa_normalised"),
    }
    for name, network in networks.items():
        if tokens <= _DAPE_TOKENS:
            found[name] = {
                "fused": lambda q, k, v, network=network: dape.attend(q, k, v, network),
                "eager": lambda q, k, v, network=network: dape.reference(q, k, v, network),
            }
    if tokens > _EAGER_TOKENS:
        for implementations in found.values():
            implementations.pop("eager", None)
    return found


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _both(pattern: Pattern, form: Form, separators: torch.Tensor | None = None) -> dict[str, Call]:
    return {
        "fused": lambda q, k, v: api.attend(q, k, v, pattern, form, separators),
        "eager": lambda q, k, v: reference.attend(q, k, v, pattern, form, separators),
    }


def bench_attention(tokens: Sequence[int], repeats: int, console: Console) -> dict[str, Any]:
    """Median ms of forward, and of forward and backward, over interleaved repeats; peak extra memory of a forward pass."""
    rows = []
    for count in tokens:
        with console.status(f"{count} tokens ..."):
            rows += _timed(count, repeats)
    with console.status("Memory ..."):
        memory = _memory(min(_MEMORY_TOKENS, max(tokens)))
    result = {
        "heads": HEADS,
        "key_heads": KEY_HEADS,
        "head_size": DIM,
        "separators": SEPARATORS,
        "pattern": {"initial": SEPLLM.initial, "neighbours": SEPLLM.neighbours},
        "repeats": repeats,
        "rows": rows,
        "memory": memory,
        "threads": torch.get_num_threads(),
        "environment": describe_environment(0),
    }
    console.print(_table(rows))
    return result


def _inputs(tokens: int, learns: bool) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, tokens, DIM, generator=random).requires_grad_(learns)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def _timed(tokens: int, repeats: int) -> list[dict[str, Any]]:
    variants = calls(tokens)
    rows = []
    for direction in ("forward", "forward and backward"):
        learns = direction != "forward"
        if learns and tokens > _BACKWARD_TOKENS:
            continue
        inputs = _inputs(tokens, learns)
        grad = torch.randn(1, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(1))

        def run(
            call: Call, inputs: list[torch.Tensor] = inputs, learns: bool = learns, grad: torch.Tensor = grad
        ) -> float:
            gc.collect()
            began = time.perf_counter()
            if learns:
                torch.autograd.grad(call(*inputs), inputs, grad)
            else:
                with torch.no_grad():
                    call(*inputs)
            return (time.perf_counter() - began) * 1e3

        cells = [(variant, name, call) for variant, some in variants.items() for name, call in some.items()]
        for _, _, call in cells:
            run(call)  # warm-up, and what is built at first use
        taken = np.array([[run(call) for _, _, call in cells] for _ in range(repeats)])  # (repeats, cells)
        peer = taken[:, 0]
        for column, (variant, name, _) in enumerate(cells):
            ratio = float(np.median(taken[:, column] / peer))
            ms = float(np.median(taken[:, column]))
            row = {"tokens": tokens, "variant": variant, "implementation": name, "direction": direction}
            rows.append({**row, "ms": round(ms, 2), "of_sdpa": round(ratio, 3)})
    return rows


def _memory(tokens: int) -> list[dict[str, Any]]:
    """Each in a process of its own, forked from one that has loaded PyTorch: what the high-water mark rises by."""
    rows, context = [], multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    os.environ["MALLOC_MMAP_THRESHOLD_"] = (
        "65536"  # what is freed goes back to the system, and is seen when it comes again
    )
    try:
        for variant, implementations in calls(tokens).items():
            for name in implementations:
                with ProcessPoolExecutor(1, context) as one:
                    mib = one.submit(_risen, tokens, variant, name).result()
                rows.append({"tokens": tokens, "variant": variant, "implementation": name, "extra_mib": round(mib, 1)})
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return rows


def _risen(tokens: int, variant: str, name: str) -> float:
    """MiB beyond inputs and what was loaded, in a forward pass that gradients may follow."""
    calls(_WARM_TOKENS)[variant][name](*_inputs(_WARM_TOKENS, learns=True))
    call, inputs = calls(tokens)[variant][name], _inputs(tokens, learns=True)
    gc.collect()
    before = lowered()
    call(*inputs)
    return risen_mib(before)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Attention, ms (of causal SDPA)")
    for column in ("tokens", "direction", "variant", "implementation", "ms", "of SDPA"):
        table.add_column(column, justify="right" if column in ("tokens", "ms", "of SDPA") else "left")
    for row in rows:
        cells = (
            row["tokens"],
            row["direction"],
            row["variant"],
            row["implementation"],
            row["ms"],
            f"{row['of_sdpa']:.2f}",
        )
        table.add_row(*map(str, cells))
    return table
