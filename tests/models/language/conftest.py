"""A small decoder of random weights, as files, and as transformers' own model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = 160


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def theirs(request) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_theta=5000.0,
        tie_word_embeddings=request.param,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def folder(theirs: LlamaForCausalLM, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return folder
