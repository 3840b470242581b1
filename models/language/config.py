"""The shape of a Llama-family decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError


@dataclass(frozen=True)
class DecoderConfig:
    """Attributes:
    dim: of the residual stream.
    hidden: of the feed-forward network.
    tied: the output layer is the embedding.
    context: tokens that it was trained on at once.
    """

    layers: int
    dim: int
    hidden: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    context: int
    rope_base: float
    norm_epsilon: float
    tied: bool

    def __post_init__(self) -> None:
        if self.heads % self.key_heads or self.head_size % 2:
            raise ModelError(
                f"a decoder needs heads in groups and an even head size, got {self.heads} on {self.key_heads} of {self.head_size}"
            )

    @classmethod
    def from_transformers(cls, folder: Path) -> DecoderConfig:
        """Of a directory's config.json. Raises ModelError: another architecture than Llama's, or features it has not here."""
        try:
            found: dict[str, Any] = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise ModelError(
                f"cannot read {folder / 'config.json'}: {error}; a model is a folder of transformers' files"
            ) from error
        if found.get("model_type") != "llama":
            raise ModelError(
                f"{folder} holds a model of type {found.get('model_type')!r}; Llama's architecture is wanted"
            )
        unusual = [name for name in ("rope_scaling", "attention_bias", "mlp_bias") if found.get(name)]
        if unusual or found.get("hidden_act", "silu") != "silu":
            raise ModelError(
                f"{folder} needs {', '.join(unusual) or found['hidden_act']}, which this decoder does not have"
            )
        try:
            rope = found.get("rope_parameters") or {}
            if rope.get("rope_type", "default") != "default":
                raise ModelError(
                    f"{folder} scales its rotary positions ({rope['rope_type']}), which this decoder does not"
                )
            return cls(
                layers=found["num_hidden_layers"],
                dim=found["hidden_size"],
                hidden=found["intermediate_size"],
                heads=found["num_attention_heads"],
                key_heads=found.get("num_key_value_heads", found["num_attention_heads"]),
                head_size=found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"],
                vocabulary=found["vocab_size"],
                context=found["max_position_embeddings"],
                rope_base=float(found.get("rope_theta") or rope.get("rope_theta") or 10000.0),
                norm_epsilon=float(found["rms_norm_eps"]),
                tied=bool(found.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise ModelError(f"{folder / 'config.json'} does not say {error}") from None

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], tied: bool) -> DecoderConfig:
        """Of a GGUF file's metadata. Raises ModelError: another architecture, or no whole description."""
        if fields.get("general.architecture") != "llama":
            raise ModelError(
                f"the GGUF file holds {fields.get('general.architecture')!r}; Llama's architecture is wanted"
            )
        if any(name.startswith("llama.rope.scaling") for name in fields):
            raise ModelError("the GGUF file scales its rotary positions, which this decoder does not")
        try:
            dim, heads = int(fields["llama.embedding_length"]), int(fields["llama.attention.head_count"])
            return cls(
                layers=int(fields["llama.block_count"]),
                dim=dim,
                hidden=int(fields["llama.feed_forward_length"]),
                heads=heads,
                key_heads=int(fields.get("llama.attention.head_count_kv", heads)),
                head_size=int(fields.get("llama.attention.key_length", dim // heads)),
                vocabulary=len(fields["tokenizer.ggml.tokens"]),
                context=int(fields["llama.context_length"]),
                rope_base=float(fields.get("llama.rope.freq_base", 10000.0)),
                norm_epsilon=float(fields["llama.attention.layer_norm_rms_epsilon"]),
                tied=tied,
            )
        except KeyError as error:
            raise ModelError(f"the GGUF file's metadata do not say {error}") from None
