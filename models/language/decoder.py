"""A Llama-family decoder: what the next token is, for sequences that grow at their own pace.

Pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU network, as transformers' `LlamaForCausalLM`. A
sequence's past lives in a `SequenceState`; a step takes one sequence with many new tokens, or many with one each.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from ..attention.api import attend, choose
from ..attention.cache import GrowingCache
from ..attention.pattern import Form, Pattern
from ..errors import ConfigError, InputError
from . import rows
from .dense import Dense, multiplies_halves
from .quantised import Blocks, joined, quantised
from .step import FusedStep, unfit
from .weights import Checkpoint

_LOG = logging.getLogger(__name__)

_ALL = Pattern()


Precision = Literal["float32", "bfloat16", "quantised"]
"""Of weights; `quantised`: in blocks of few bits. Beside bfloat16 weights keys and values are bfloat16, and queries where
PyTorch's own kernel attends a prompt; all else is float32."""

Matrix = Dense | Blocks
"""(rows, in) -> (rows, out)"""

Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""A layer's number, q (heads, rows, D), k and v (key heads, rows, D) without positions -> (heads, rows, D)"""


@dataclass(frozen=True)
class _Layer:
    norm: torch.Tensor  # (dim,)
    qkv: Matrix  # to (heads + 2 key heads) * head size
    out: Matrix
    ffn_norm: torch.Tensor
    gate_up: Matrix  # to 2 hidden
    down: Matrix


@dataclass
class SequenceState:
    """The past of one sequence.

    Attributes:
        caches: of every layer.
        length: tokens so far.
    """

    caches: list[GrowingCache] = field(repr=False)
    length: int = 0

    @property
    def held(self) -> int:
        """Key-value entries, over all layers."""
        return sum(len(cache) for cache in self.caches)

    def fork(self) -> SequenceState:
        """A copy that is continued independently: a prompt that many share is prefilled once."""
        return SequenceState([cache.fork() for cache in self.caches], self.length)


class Decoder:
    """Weights in memory, and one step of them.

    Args:
        precision: logits are float32 whatever it is.
        pattern: which past tokens a query sees.
        form: how scores become weights: that of the model's training. The fused step knows softmax.
        full_layers: layers that see all of them whatever the pattern.
        separators: (vocabulary,) bool, for a pattern that keeps them.
        device: of weights, caches and logits. A CPU has a fused step; elsewhere PyTorch's operators and the kernels of
            attention do all.

    Raises:
        ConfigError: quantised weights that are not to be on a CPU.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        precision: Precision = "float32",
        pattern: Pattern = _ALL,
        full_layers: Sequence[int] = (),
        separators: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
        form: Form = "softmax",
    ) -> None:
        config, device = checkpoint.config, torch.device(device)
        if precision == "quantised" and device.type != "cpu":
            raise ConfigError(f"quantised weights are for CPUs; on {device} use bfloat16 or float32")
        self.config, self.device = config, device
        self.form: Form = form
        self._cached = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._patterns = [_ALL if layer in full_layers else pattern for layer in range(config.layers)]
        self._separators = separators
        self._embedding = _matrix(checkpoint, ("model.embed_tokens",), precision, device)
        self._layers = [
            _layer(checkpoint, f"model.layers.{number}", precision, device) for number in range(config.layers)
        ]
        self._norm = checkpoint.read("model.norm.weight").to(device, torch.float32)
        self._head = self._embedding if config.tied else _matrix(checkpoint, ("lm_head",), precision, device)
        powers = torch.arange(0, config.head_size, 2, dtype=torch.float64) / config.head_size
        self._frequencies = (config.rope_base**-powers).to(device, torch.float32)
        why = unfit(config)
        if device.type != "cpu" or form != "softmax":
            why = f"the fused step is for softmax on CPUs, and this is {form} on {device}"
        _tell(why)
        self._fused = None if why else FusedStep(config, self._layers, self._norm, self._head, self._cached)

    def begin(self) -> SequenceState:
        return SequenceState([GrowingCache(pattern) for pattern in self._patterns])

    @torch.inference_mode()
    def prefill(self, state: SequenceState, tokens: Sequence[int] | torch.Tensor, every: bool = False) -> torch.Tensor:
        """Appends tokens to a sequence.

        Returns:
            float32 logits of what follows the last token, (vocabulary,); with `every`, of what follows each, (T, vocabulary).

        Raises:
            InputError: no token, one that is not in the vocabulary, or more than the model's context.
        """
        tokens = self.checked(tokens)
        self.check_context(state.length + len(tokens))
        positions = torch.arange(state.length, state.length + len(tokens))
        separators = self._separating(tokens)
        cos, sin = self._rotation(positions)
        x = self._embedding.rows(tokens).dense()  # (T, dim)
        for layer, cache, pattern in zip(self._layers, state.caches, self._patterns, strict=True):
            q, k, v = self._projected(layer, x, cos, sin)  # (heads, T, D)
            keys, values, kept = cache.with_new(k, v, separators)
            attended = self._attended(q, keys, values, Pattern(0, pattern.neighbours), kept)
            cache.append(k, v, separators)
            x = self._finished(layer, x, attended)
        state.length += len(tokens)
        found = self._logits(x if every else x[-1:])
        return found if every else found[0]

    @torch.inference_mode()
    def step(self, states: Sequence[SequenceState], tokens: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Appends one token to each of B sequences of any lengths.

        Returns:
            float32 logits (B, vocabulary); of the fused step each row's bits are those of the sequence alone.

        Raises:
            InputError: as `prefill`; no sequence has grown then.
        """
        tokens = self.checked(tokens)
        self.check_context(1 + max(state.length for state in states))
        cos, sin = self._rotation(torch.tensor([state.length for state in states]))  # (B, D / 2)
        separators = self._separating(tokens)
        x = self._embedding.rows(tokens).dense()  # (B, dim)
        if self._fused:
            is_one = [False] * len(states) if separators is None else separators.tolist()
            logits = self._fused(x, [state.caches for state in states], is_one, cos, sin)
        else:
            for number, layer in enumerate(self._layers):
                q, k, v = self._projected(layer, x, cos, sin)  # (heads, B, D)
                attended = torch.empty_like(q)
                for i, state in enumerate(states):
                    cache, here = state.caches[number], slice(i, i + 1)
                    cache.append(k[:, here], v[:, here], None if separators is None else separators[here])
                    attended[:, here] = self._attended(q[:, here], cache.k, cache.v)
                x = self._finished(layer, x, attended)
            logits = self._logits(x)
        for state in states:
            state.length += 1
        return logits

    def through(self, tokens: Sequence[int] | torch.Tensor, attention: Attention, last: bool = False) -> torch.Tensor:
        """Rows of tokens through all layers, which meet each other and a past in `attention` alone; differentiable.

        Returns:
            float32 logits (rows, vocabulary); with `last`, of the last row only, (1, vocabulary).

        Raises:
            InputError: no token, or one that is not in the vocabulary.
        """
        x = self._embedding.rows(self.checked(tokens)).dense()  # (rows, dim)
        for number, layer in enumerate(self._layers):
            whole = layer.qkv(rows.normed(x, layer.norm, self.config.norm_epsilon))
            q, k, v = rows.split(whole, self.config.heads, self.config.key_heads, self.config.head_size)
            x = self._finished(layer, x, attention(number, q, k, v))
        return self._logits(x[-1:] if last else x)

    def rotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(heads, T, D) at (T,) positions."""
        return rows.turned(x, *self._rotation(positions))

    def parameters(self) -> Iterator[torch.Tensor]:
        """Weights as they lie in memory, each once. Raises ConfigError: they are quantised, and cannot learn."""
        for matrix in (self._embedding,) if self._head is self._embedding else (self._embedding, self._head):
            yield _learnable(matrix)
        for layer in self._layers:
            yield from (layer.norm, layer.ffn_norm)
            yield from map(_learnable, (layer.qkv, layer.out, layer.gate_up, layer.down))
        yield self._norm

    def check_context(self, length: int) -> None:
        """Raises InputError: a sequence of so many tokens has positions that the model was not trained on."""
        if length > self.config.context:
            raise InputError(
                f"a sequence would have {length} tokens and the model's context has {self.config.context}; shorten it, or let "
                "it run on a streaming cache"
            )

    def checked(self, tokens: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """(T,) int64 on the device. Raises InputError: no token, or one that is not in the vocabulary."""
        tokens = torch.as_tensor(tokens, dtype=torch.long)
        if not len(tokens):
            raise InputError("there is no token; an empty prompt has no next word")
        if tokens.min() < 0 or tokens.max() >= self.config.vocabulary:
            raise InputError(
                f"tokens are numbers below {self.config.vocabulary}, got {int(tokens.max())}; another tokenizer?"
            )
        return tokens.to(self.device)

    def _separating(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """(T,) bool where the caches do their bookkeeping, on the CPU."""
        return None if self._separators is None else self._separators[tokens.cpu()]

    def _projected(
        self, layer: _Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries, rotated keys and values, (heads or key heads, T, D); the latter as they are cached."""
        config = self.config
        whole = layer.qkv(rows.normed(x, layer.norm, config.norm_epsilon))
        q, k, v = rows.split_rotated(whole, cos, sin, config.heads, config.key_heads)
        return q, k.to(self._cached), v.to(self._cached)

    def _attended(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pattern: Pattern = _ALL,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # PyTorch's kernel attends halves in half the time; ours computes in float32 whatever it is given.
        own = multiplies_halves(q.device) and choose(q[None], pattern, self.form, k.shape[1], kept).name == "sdpa"
        dtype = k.dtype if own else q.dtype
        found = attend(q[None].to(dtype), k[None].to(dtype), v[None].to(dtype), pattern, self.form, kept)[0]
        return found.to(q.dtype)

    def _finished(self, layer: _Layer, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = x + layer.out(attended.transpose(0, 1).reshape(len(x), -1))
        return x + layer.down(rows.gated(layer.gate_up(rows.normed(x, layer.ffn_norm, self.config.norm_epsilon))))

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return self._head(rows.normed(x, self._norm, self.config.norm_epsilon))

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, D / 2) each."""
        angles = positions.to(self.device, torch.float32)[:, None] * self._frequencies[None, :]
        return angles.cos(), angles.sin()


@functools.cache
def _tell(why: str | None) -> None:
    if why:
        _LOG.warning("event=decoder step=operators why=%r", why)
    else:
        _LOG.info("event=decoder step=fused")


def _layer(checkpoint: Checkpoint, name: str, precision: Precision, device: torch.device) -> _Layer:
    def norm(part: str) -> torch.Tensor:
        return checkpoint.read(f"{name}.{part}.weight").to(device, torch.float32)

    def matrix(*parts: str) -> Matrix:
        return _matrix(checkpoint, [f"{name}.{part}" for part in parts], precision, device)

    return _Layer(
        norm("input_layernorm"),
        matrix("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        matrix("self_attn.o_proj"),
        norm("post_attention_layernorm"),
        matrix("mlp.gate_proj", "mlp.up_proj"),
        matrix("mlp.down_proj"),
    )


def _matrix(checkpoint: Checkpoint, parts: Sequence[str], precision: Precision, device: torch.device) -> Matrix:
    """Matrices one under another."""
    names = [f"{part}.weight" for part in parts]
    if precision == "quantised":
        found = joined([checkpoint.blocks(name) for name in names])
        return found or quantised(torch.cat([checkpoint.read(name) for name in names]))
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return Dense(torch.cat([checkpoint.read(name).to(device, dtype) for name in names]))


def _learnable(matrix: Matrix) -> torch.Tensor:
    if not isinstance(matrix, Dense):
        raise ConfigError("quantised weights cannot be trained; load the model in float32")
    return matrix.weight
