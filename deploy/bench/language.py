"""`edgefm bench language`: the decoder beside transformers' on the same weights, and beside llama.cpp where it is installed.

Prefill of one prompt and greedy decoding after it, in tokens per second; repeats of all take turns. Loading and memory are
measured in a process of its own for each. `quantised` is the GGUF file as it is, in its few bits, as llama.cpp runs it too; the
others run what those bits mean, in float32 or bfloat16.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console

from ...models.attention.pattern import Pattern
from ...models.language.decoder import Decoder, Precision
from ...models.language.weights import Checkpoint, names, open_checkpoint
from ..demo_results import describe_environment
from ..processes import loaded
from .high_water import lowered, risen_mib

PROMPT, NEW, BATCH = 512, 32, 4
LONG, LONG_NEW = 16_384, 8
CAPPED = Pattern(4, 320)
"""324 entries: as many as a streaming cache of 4 initial ones, 64 separators and a window of 256 has."""
_DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Run = Callable[[list[int]], tuple[float, float]]
"""A prompt -> seconds of prefill, seconds a decoded token."""


def bench_language(weights: Path, repeats: int, console: Console) -> dict[str, Any]:
    """Medians over interleaved repeats; `of_transformers` is the median ratio within a repeat, of the same dtype."""
    checkpoint = open_checkpoint(weights)
    random = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, checkpoint.config.vocabulary, (PROMPT,), generator=random).tolist()
    rows, error = [], 0.0
    for dtype in _DTYPES:
        with console.status(f"{dtype} ..."):
            runs, apart = _runs(checkpoint, dtype)
            error = max(error, apart) if dtype == "float32" else error
            rows += _timed(runs, prompt, repeats, dtype)
    with console.status("quantised ..."):
        few = _edgefm(Decoder(checkpoint, "quantised"))
        if weights.suffix == ".gguf" and find_spec("llama_cpp"):
            few["llama.cpp"] = _llama_cpp(weights)
        rows += _timed(few, prompt, repeats, "quantised")
    with console.status(f"{LONG:,} tokens of context ..."):
        long = _long(checkpoint, repeats)
    with console.status("Loading ..."):
        loads = [_load(weights, system, dtype) for dtype in _DTYPES for system in ("edgefm", "transformers")]
        loads.append(_load(weights, "edgefm", "quantised"))
    result = {
        "model": weights.name,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "logits_apart": float(f"{error:.2e}"),
        "rows": rows,
        "long_context": long,
        "loads": loads,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "environment": describe_environment(0),
    }
    for row in rows:
        console.print(
            f"{row['system']}, {row['dtype']}: prefill {row['prefill_tokens_per_s']:.0f}, decode "
            f"{row['decode_tokens_per_s']:.1f} tokens/s"
        )
    for row in long["rows"]:
        console.print(f"{row['cache']} cache, {row['dtype']}: {row['step_ms']:.0f} ms a token at {LONG:,} tokens")
    return result


def _long(checkpoint: Checkpoint, repeats: int) -> dict[str, Any]:
    """A step behind a long context, with all of it in the caches and with a capped part; what is in them is random.

    Ratios are medians within a repeat, to the full cache of the same precision and to the fastest full form of all.
    """
    # Beyond what the model was trained on: a step takes its time, whatever it says.
    config = replace(checkpoint.config, context=LONG + LONG_NEW + 1)
    wide = replace(checkpoint, config=config)
    systems = {
        (dtype, cache): Decoder(wide, dtype, pattern)
        for dtype in get_args(Precision)
        for cache, pattern in (("full", Pattern()), ("capped", CAPPED))
    }
    random = torch.Generator().manual_seed(0)
    entries = torch.randn(config.key_heads, LONG, config.head_size, generator=random)

    def run(system: tuple[Precision, str]) -> float:
        state = systems[system].begin()
        own = entries.to(torch.bfloat16 if system[0] == "bfloat16" else torch.float32)
        for layer in state.caches:
            layer.append(own, own)
        state.length = LONG
        systems[system].step([state], [1])
        began = time.perf_counter()
        for _ in range(LONG_NEW):
            systems[system].step([state], [1])
        return (time.perf_counter() - began) / LONG_NEW * 1e3

    taken = np.array([[run(system) for system in systems] for _ in range(repeats)])  # (repeats, systems)
    full = [column for column, (_, cache) in enumerate(systems) if cache == "full"]
    fastest = min(full, key=lambda column: np.median(taken[:, column]))
    rows = []
    for column, (dtype, cache) in enumerate(systems):
        row: dict[str, Any] = {"dtype": dtype, "cache": cache, "step_ms": round(float(np.median(taken[:, column])), 1)}
        if cache == "capped":
            for name, peer in (("full", column - 1), ("fastest_full", fastest)):
                row[f"faster_than_{name}"] = round(float(np.median(taken[:, peer] / taken[:, column])), 2)
        rows.append(row)
    return {"tokens": LONG, "capped_entries": CAPPED.initial + (CAPPED.neighbours or 0), "rows": rows}


def _runs(checkpoint: Checkpoint, dtype: Precision) -> tuple[dict[str, Run], float]:
    """Both, and how far their logits are apart, of the largest."""
    ours, theirs = Decoder(checkpoint, dtype), _transformers(checkpoint, _DTYPES[dtype])
    some = list(range(100, 200))
    with torch.inference_mode():
        expected = theirs(torch.tensor([some])).logits[0].float()
    found = ours.prefill(ours.begin(), some, every=True)
    apart = float((found - expected).abs().max() / expected.abs().max())

    def transformers(prompt: list[int]) -> tuple[float, float]:
        tokens = torch.tensor([prompt])
        with torch.inference_mode():
            began = time.perf_counter()
            theirs(tokens, use_cache=True, logits_to_keep=1)
            filled = time.perf_counter()
            theirs.generate(tokens, max_new_tokens=NEW + 1, do_sample=False)
            ended = time.perf_counter()
        return filled - began, (ended - filled - (filled - began)) / NEW

    return {**_edgefm(ours), "transformers": transformers}, apart


def _edgefm(ours: Decoder) -> dict[str, Run]:
    """One sequence, and several that step together."""

    def edgefm(prompt: list[int], sequences: int = 1) -> tuple[float, float]:
        states = [ours.begin() for _ in range(sequences)]
        began = time.perf_counter()
        logits = torch.stack([ours.prefill(state, prompt) for state in states])
        filled = time.perf_counter()
        for _ in range(NEW):
            logits = ours.step(states, logits.argmax(dim=-1))
        return (filled - began) / sequences, (time.perf_counter() - filled) / NEW / sequences

    return {"edgefm": edgefm, f"edgefm, {BATCH} at once": lambda prompt: edgefm(prompt, BATCH)}


def _transformers(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = checkpoint.config
    described = LlamaConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.dim,
        intermediate_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_heads,
        head_dim=config.head_size,
        max_position_embeddings=config.context,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        rms_norm_eps=config.norm_epsilon,
        tie_word_embeddings=config.tied,
    )
    model: Any = LlamaForCausalLM(described)
    model = model.to(dtype).eval()
    model.load_state_dict({name: checkpoint.read(name) for name in names(config)}, strict=False)
    model.tie_weights()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def _llama_cpp(weights: Path) -> Run:
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    model = Llama(str(weights), n_ctx=PROMPT + NEW + 8, n_threads=torch.get_num_threads(), verbose=False, seed=0)

    def run(prompt: list[int]) -> tuple[float, float]:
        model.reset()
        began = time.perf_counter()
        model.eval(prompt)
        filled = time.perf_counter()
        for _ in range(NEW):
            model.eval([int(model.sample(temp=0.0))])
        return filled - began, (time.perf_counter() - filled) / NEW

    return run


def _timed(runs: dict[str, Run], prompt: list[int], repeats: int, dtype: Precision) -> list[dict[str, Any]]:
    for run in runs.values():
        run(prompt[:16])
    taken = np.array([[run(prompt) for run in runs.values()] for _ in range(repeats)])  # (repeats, runs, 2)
    systems = list(runs)
    peer = taken[:, systems.index("transformers")] if "transformers" in systems else None
    rows = []
    for column, system in enumerate(systems):
        prefill, decode = np.median(taken[:, column], axis=0)
        row: dict[str, Any] = {"system": system, "dtype": dtype}
        row |= {"prefill_tokens_per_s": round(PROMPT / prefill, 1), "decode_tokens_per_s": round(1 / decode, 2)}
        if peer is not None:
            faster = np.median(peer / taken[:, column], axis=0)
            row["of_transformers"] = {"prefill": round(float(faster[0]), 2), "decode": round(float(faster[1]), 2)}
        rows.append(row)
    return rows


def _load(weights: Path, system: str, dtype: Precision) -> dict[str, Any]:
    with ProcessPoolExecutor(1, loaded()) as one:
        seconds, mib = one.submit(_loaded, weights, system, dtype).result()
    return {"system": system, "dtype": dtype, "load_s": round(seconds, 2), "peak_mib": round(mib)}


def _loaded(weights: Path, system: str, dtype: Precision) -> tuple[float, float]:
    """Seconds to a model that has answered one token, and MiB at the peak of the process; imports count in neither."""
    if system == "transformers":
        import transformers.models.llama.modeling_llama  # noqa: F401
    before = lowered()
    began = time.perf_counter()
    checkpoint = open_checkpoint(weights)
    if system == "transformers":
        with torch.inference_mode():
            _transformers(checkpoint, _DTYPES[dtype])(torch.tensor([[1]]))
    else:
        decoder = Decoder(checkpoint, dtype)
        decoder.prefill(decoder.begin(), [1])
    seconds = time.perf_counter() - began
    return seconds, risen_mib(before)
