"""`edgefm bench attention`: every variant of attention, fused beside eager beside PyTorch's own, in time and memory.

One layer of SmolLM2-135M (9 heads on 3 of keys, 64 each), one sequence. Repeats are interleaved, so that whatever else the
machine does meets all of them. Separators lie at random, as often as in English text. PyTorch's flex attention compiles the masks
that it can express; its block masks are made beforehand, which its time leaves out.
"""

from __future__ import annotations

import gc
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from ...models.attention import api, dape, reference
from ...models.attention.pattern import Form, Pattern
from ..demo_results import describe_environment
from ..processes import loaded
from .devices import told
from .high_water import freed_at_once, lowered, risen_mib

HEADS, KEY_HEADS, DIM = 9, 3, 64
SEPARATORS = 0.155
"""Share of tokens that are separators; 15 to 16 % of SmolLM2's on books."""
SEPLLM, SINKS = Pattern(4, 256), Pattern(4, 256)
_EAGER_TOKENS = 4096
"""Eager attention holds (H, T, T) scores, several times over."""
_MEMORY_TOKENS = 4096
_EAGER_DAPE_TOKENS = 2048
"""On a CPU, where eager DAPE V2 takes 10 GB at 4,096 tokens."""
_FLEX_TOKENS = 4096
"""On a CPU, where PyTorch makes block masks of (T, T) numbers, several times over: tens of GB at 16,384 tokens."""
_WARM_TOKENS = 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Place:
    """Where attention is measured, and on what: activations' dtype."""

    device: torch.device
    dtype: torch.dtype


CPU = Place(torch.device("cpu"), torch.float32)


def calls(tokens: int, place: Place) -> dict[str, dict[str, Call]]:
    """By variant and implementation; `sdpa`, PyTorch's causal softmax, is the peer of all."""
    separators = torch.rand(1, tokens, generator=torch.Generator().manual_seed(0)) < SEPARATORS
    separators = separators.to(place.device)
    torch.manual_seed(0)
    networks = {"dape": dape.Dape(HEADS, "kerple", "pointwise"), "dape_v2": dape.Dape(HEADS, "kerple", "convolution")}
    found: dict[str, dict[str, Call]] = {
        "softmax": {"sdpa": _sdpa},
        "sepllm": {**_both(SEPLLM, "softmax", separators), "flex": _Flex(SEPLLM, separators, place.device)},
        "streaming": {**_both(SINKS, "softmax"), "flex": _Flex(SINKS, None, place.device)},
        "sa_softmax": _both(Pattern(), "sa"),
        "sa_softmax_normalised": _both(Pattern(), "sa_normalised"),
    }
    for name, network in networks.items():
        network.to(place.device, place.dtype)
        found[name] = {"fused": lambda q, k, v, network=network: dape.attend(q, k, v, network)}
        if tokens <= _EAGER_DAPE_TOKENS or place.device.type != "cpu":
            found[name]["eager"] = lambda q, k, v, network=network: dape.reference(q, k, v, network)
    lacking = {"eager"} if tokens > _EAGER_TOKENS else set()
    if tokens > _FLEX_TOKENS and place.device.type == "cpu":
        lacking.add("flex")
    for implementations in found.values():
        for name in lacking:
            implementations.pop(name, None)
    return found


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class _Flex:
    """PyTorch's flex attention under a pattern, compiled at the first call for that length."""

    def __init__(self, pattern: Pattern, separators: torch.Tensor | None, device: torch.device) -> None:
        self._pattern, self._separators, self._device = pattern, separators, device
        self._compiled: Call | None = None

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self._compiled is None:
            self._compiled = self._compile(q.shape[2])
        return self._compiled(q, k, v)

    def _compile(self, tokens: int) -> Call:
        kept, window = self._pattern.kept(tokens, self._separators), self._pattern.neighbours
        assert kept is not None and window is not None
        always = kept[0].to(self._device)

        def sees(batch: Any, head: Any, here: Any, there: Any) -> Any:
            return (there <= here) & ((here - there < window) | always[there])

        torch.compiler.reset()  # after some lengths it would no longer compile, and say nothing
        mask = create_block_mask(sees, None, None, tokens, tokens, device=self._device.type)
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def _both(pattern: Pattern, form: Form, separators: torch.Tensor | None = None) -> dict[str, Call]:
    return {
        "fused": lambda q, k, v: api.attend(q, k, v, pattern, form, separators),
        "eager": lambda q, k, v: reference.attend(q, k, v, pattern, form, separators),
    }


def bench_attention(tokens: Sequence[int], repeats: int, console: Console, place: Place = CPU) -> dict[str, Any]:
    """Median ms of forward, and of forward and backward, over interleaved repeats; peak extra memory of a forward pass."""
    rows = []
    gc.freeze()  # what is there already would be looked through before every measurement
    try:
        for count in tokens:
            with console.status(f"{count} tokens ..."):
                rows += _timed(count, repeats, place, console)
    finally:
        gc.unfreeze()
    with console.status("Memory ..."):
        memory = _memory(min(_MEMORY_TOKENS, max(tokens)), place)
    result = {
        "heads": HEADS,
        "key_heads": KEY_HEADS,
        "head_size": DIM,
        "separators": SEPARATORS,
        "pattern": {"initial": SEPLLM.initial, "neighbours": SEPLLM.neighbours},
        "device": told(place.device),
        "dtype": str(place.dtype).removeprefix("torch."),
        "repeats": repeats,
        "rows": rows,
        "memory": memory,
        "threads": torch.get_num_threads(),
        "environment": describe_environment(0),
    }
    console.print(_table(rows))
    return result


def _inputs(tokens: int, learns: bool, place: Place) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, tokens, DIM, generator=random).to(place.device, place.dtype).requires_grad_(learns)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def _timed(tokens: int, repeats: int, place: Place, console: Console) -> list[dict[str, Any]]:
    variants = calls(tokens, place)
    rows = []
    for direction in ("forward", "forward and backward"):
        learns = direction != "forward"
        inputs = _inputs(tokens, learns, place)
        grad = torch.randn(1, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(1)).to(inputs[0])

        def run(
            call: Call, inputs: list[torch.Tensor] = inputs, learns: bool = learns, grad: torch.Tensor = grad
        ) -> float:
            gc.collect()
            _finish(place)
            began = time.perf_counter()
            if learns:
                torch.autograd.grad(call(*inputs), inputs, grad)
            else:
                with torch.no_grad():
                    call(*inputs)
            _finish(place)
            return (time.perf_counter() - began) * 1e3

        cells = []
        for variant, some in variants.items():
            for name, call in some.items():
                if why := _unfit(call, run):
                    console.print(f"{tokens} tokens, {direction}: no {name} for {variant}: {why}")
                else:
                    cells.append((variant, name, call))
        taken = np.array([[run(call) for _, _, call in cells] for _ in range(repeats)])  # (repeats, cells)
        peer = taken[:, 0]
        for column, (variant, name, _) in enumerate(cells):
            ratio = float(np.median(taken[:, column] / peer))
            ms = float(np.median(taken[:, column]))
            row = {"tokens": tokens, "variant": variant, "implementation": name, "direction": direction}
            rows.append({**row, "ms": round(ms, 3), "of_sdpa": round(ratio, 3)})
    return rows


def _finish(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)


def _unfit(call: Call, run: Callable[[Call], float]) -> str | None:
    """Warms up, and builds what is built at first use; says why PyTorch cannot compile flex attention here, if it cannot."""
    try:
        run(call)
    except Exception as error:
        if not isinstance(call, _Flex):
            raise
        return f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}"
    return None


def _memory(tokens: int, place: Place) -> list[dict[str, Any]]:
    """On a CPU each in a process of its own: what the high-water mark rises by."""
    rows, context = [], loaded()
    for variant, implementations in calls(tokens, place).items():
        for name in implementations:
            if place.device.type == "cuda":
                mib = _allocated(tokens, variant, name, place)
            elif name == "flex":
                continue  # its compiler's memory is more than its own
            else:
                with ProcessPoolExecutor(1, context, freed_at_once) as one:
                    mib = one.submit(_risen, tokens, variant, name).result()
            rows.append({"tokens": tokens, "variant": variant, "implementation": name, "extra_mib": round(mib, 1)})
    return rows


def _risen(tokens: int, variant: str, name: str) -> float:
    """MiB beyond inputs and what was loaded, in a forward pass that gradients may follow."""
    calls(_WARM_TOKENS, CPU)[variant][name](*_inputs(_WARM_TOKENS, True, CPU))
    call, inputs = calls(tokens, CPU)[variant][name], _inputs(tokens, True, CPU)
    gc.collect()
    before = lowered()
    call(*inputs)
    return risen_mib(before)


def _allocated(tokens: int, variant: str, name: str, place: Place) -> float:
    """The same of a GPU, by PyTorch's own account."""
    call, inputs = calls(tokens, place)[variant][name], _inputs(tokens, True, place)
    call(*inputs)
    gc.collect()
    torch.cuda.reset_peak_memory_stats(place.device)
    before = torch.cuda.memory_allocated(place.device)
    call(*inputs)
    return (torch.cuda.max_memory_allocated(place.device) - before) / 2**20


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
