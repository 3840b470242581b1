"""Benchmarks of attention and of the language model, as small as they come: every cell is there and was measured."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from edgefm.deploy.bench import attention
from edgefm.deploy.bench.language import BATCH, bench_language
from edgefm.models.language.config import DecoderConfig
from edgefm.models.language.weights import names, save_directory
from rich.console import Console


def test_every_variant_of_attention_is_timed_and_weighed(monkeypatch: pytest.MonkeyPatch):
    def refused(*_):
        raise NotImplementedError("no compiler here")

    monkeypatch.setattr(attention._Flex, "_compile", refused)  # it would take half a minute
    console = Console(file=io.StringIO(), width=200)
    result = attention.bench_attention((256,), 1, console)
    assert console.file.getvalue().count("no flex for sepllm: NotImplementedError: no compiler here") == 2
    cells = {(row["variant"], row["implementation"], row["direction"]) for row in result["rows"]}
    variants = {"sepllm", "streaming", "sa_softmax", "sa_softmax_normalised", "dape", "dape_v2"}
    directions = ("forward", "forward and backward")
    both = {(v, i, d) for v in variants for i in ("fused", "eager") for d in directions}
    assert cells == both | {("softmax", "sdpa", direction) for direction in directions}
    assert all(row["ms"] > 0 and row["of_sdpa"] > 0 for row in result["rows"])
    assert len(result["memory"]) == 13 and all(row["extra_mib"] >= 0 for row in result["memory"])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = DecoderConfig(2, 64, 96, 4, 2, 16, 300, 1024, 10000.0, 1e-5, True)
    shapes = {
        "embed_tokens": (300, 64), "norm": (64,), "q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64),
        "gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96), "layernorm": (64,),
    }  # fmt: skip
    torch.manual_seed(0)
    tensors = {
        name: 0.1 * torch.randn(next(shape for part, shape in shapes.items() if f"{part}.weight" in name))
        for name in names(config)
    }
    save_directory(tmp_path / "model", config, tensors)
    return tmp_path / "model"


def test_the_language_model_stands_beside_transformers(model: Path):
    result = bench_language(model, 1, Console(quiet=True))
    assert result["logits_apart"] < 1e-4
    systems = {(row["system"], row["dtype"]) for row in result["rows"]}
    ours = {
        (name, dtype)
        for name in ("edgefm", f"edgefm, {BATCH} at once")
        for dtype in ("float32", "bfloat16", "quantised")
    }
    assert systems == ours | {("transformers", "float32"), ("transformers", "bfloat16")}
    assert all(row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0 for row in result["rows"])
    assert len(result["loads"]) == 5 and all(load["load_s"] > 0 and load["peak_mib"] > 0 for load in result["loads"])
    long = {(row["dtype"], row["cache"]) for row in result["long_context"]["rows"]}
    assert long == {(dtype, cache) for dtype in ("float32", "bfloat16", "quantised") for cache in ("full", "capped")}
    assert all(row["step_ms"] > 0 for row in result["long_context"]["rows"])
