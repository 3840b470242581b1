"""Weights of a Llama-family model: a GGUF file, or a directory of transformers' files in safetensors.

Both come out under transformers' names. GGUF's blocks of few bits are dequantised by the `gguf` package; its rotary halves are
interleaved, and put back as transformers has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ModelError
from .config import DecoderConfig
from .quantised import Blocks, from_gguf, quantised

Read = Callable[[str], torch.Tensor]

_GGUF_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_GGUF = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, opened.

    Attributes:
        metadata: of a GGUF file, with its tokenizer; empty for a directory.
        read: a tensor by transformers' name, float32.
        blocks: a matrix by transformers' name, in the file's own few bits where these are known here, else in 8.
    """

    path: Path
    config: DecoderConfig
    metadata: Mapping[str, Any]
    read: Read
    blocks: Callable[[str], Blocks]


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a GGUF file or a directory with config.json and *.safetensors.

    Raises:
        ModelError: neither, or damaged, incomplete, of another architecture.
    """
    if path.is_dir():
        return _open_directory(path)
    if path.suffix == ".gguf" and path.is_file():
        return _open_gguf(path)
    raise ModelError(f"{path} is neither a .gguf file nor a directory with config.json and *.safetensors")


def _open_directory(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    config, where = DecoderConfig.from_transformers(path), {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                where |= dict.fromkeys(tensors.keys(), file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} is damaged: {error}; fetch it again") from error
    _complete(config, where, path)

    def read(name: str) -> torch.Tensor:
        try:
            with safe_open(where[name], "pt") as tensors:
                return tensors.get_tensor(name).to(torch.float32)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{where[name]} is damaged: {error}; fetch it again") from error

    return Checkpoint(path, config, {}, read, lambda name: quantised(read(name)))


def _open_gguf(path: Path) -> Checkpoint:
    from gguf import GGUFReader, dequantize

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError, EOFError) as error:
        raise ModelError(f"{path} is no whole GGUF file: {error}; fetch it again") from error
    tensors = {_transformers_name(tensor.name): tensor for tensor in reader.tensors}
    config = DecoderConfig.from_gguf(fields, tied="lm_head.weight" not in tensors)
    _complete(config, tensors, path)

    def read(name: str) -> torch.Tensor:
        values = torch.from_numpy(np.array(dequantize(tensors[name].data, tensors[name].tensor_type), dtype=np.float32))
        return values if (rows := halves(name)) is None else values[rows]

    def blocks(name: str) -> Blocks:
        found, rows = from_gguf(tensors[name].data, tensors[name].tensor_type.name), halves(name)
        if found is None:
            return quantised(read(name))
        return found if rows is None else found.rows(rows)

    def halves(name: str) -> torch.Tensor | None:
        """Rows in transformers' order: GGUF has a head's rotary pairs side by side, transformers has them in two halves."""
        heads = {"q_proj": config.heads, "k_proj": config.key_heads}.get(name.split(".")[-2])
        if heads is None:
            return None
        rows = torch.arange(heads * config.head_size)
        return rows.view(heads, config.head_size // 2, 2).transpose(1, 2).reshape(-1)

    return Checkpoint(path, config, fields, read, blocks)


def _transformers_name(name: str) -> str:
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        return f"model.layers.{found[1]}.{_GGUF_LAYER.get(found[2], found[2])}.weight"
    stem = name.removesuffix(".weight")
    return f"{_GGUF.get(stem, stem)}.weight"


def names(config: DecoderConfig) -> Iterator[str]:
    """Of all tensors."""
    yield "model.embed_tokens.weight"
    for layer in range(config.layers):
        yield from (f"model.layers.{layer}.{part}.weight" for part in _GGUF_LAYER.values())
    yield "model.norm.weight"
    if not config.tied:
        yield "lm_head.weight"


def _complete(config: DecoderConfig, found: Mapping[str, object], path: Path) -> None:
    missing = [name for name in names(config) if name not in found]
    if missing:
        raise ModelError(f"{path} has no tensor {missing[0]} (and {len(missing) - 1} more are missing); fetch it again")


def save_directory(path: Path, config: DecoderConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes weights as `open_checkpoint` reads them, in transformers' layout."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    described = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": config.layers,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_size,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
    }
    (path / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
