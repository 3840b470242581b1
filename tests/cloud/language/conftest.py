"""A small model of random weights, with the real one's tokenizer, behind an engine and alone.

Its answers are nonsense that ends after some tokens; who gets which is what these tests are about.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from edgefm.cloud.language.engine import LanguageEngine
from edgefm.cloud.language.lengths import LearnedLengths
from edgefm.cloud.language.machine import DecoderMachine
from edgefm.cloud.language.scheduling import policy_named
from edgefm.models.language.decoder import Decoder
from edgefm.models.language.generate import Sampling, generate
from edgefm.models.language.tokenizer import Message, TextTokenizer, tokenizer_of
from edgefm.models.language.weights import open_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 512


@pytest.fixture(scope="session")
def tokenizer(smollm2) -> TextTokenizer:
    return tokenizer_of(smollm2)


@pytest.fixture(scope="session")
def folder(smollm2, tokenizer: TextTokenizer, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer._tokenizer.save(str(folder / "tokenizer.json"))
    described = {"chat_template": smollm2.metadata["tokenizer.chat_template"], "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    settings = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [*tokenizer.ends]}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def decoder(folder: Path) -> Decoder:
    return Decoder(open_checkpoint(folder))


@pytest.fixture(scope="session")
def ends(tokenizer: TextTokenizer) -> frozenset[int]:
    """One token in twenty-five ends an answer."""
    return frozenset(range(7, len(tokenizer), 25))


@pytest.fixture
def machine(decoder: Decoder, ends: frozenset[int]) -> DecoderMachine:
    return DecoderMachine(decoder, ends)


@pytest.fixture(scope="session")
def alone(decoder: Decoder, tokenizer: TextTokenizer, ends: frozenset[int]) -> Callable[[str, int], list[int]]:
    """What a question gets from a decoder that does nothing else."""

    def answer(question: str, most: int) -> list[int]:
        messages: list[Message] = [{"role": "user", "content": question}]
        return list(generate(decoder, tokenizer.chat(messages), ends, Sampling(most)))

    return answer


@pytest.fixture
def run(machine: DecoderMachine, decoder: Decoder, tokenizer: TextTokenizer) -> Callable[..., None]:
    """Runs a test's work with an engine; keywords: its settings, and whether answers never end."""

    def within_a_minute(
        work: Callable[[LanguageEngine], Awaitable[None]],
        policy: str = "continuous",
        places: int = 4,
        cache_blocks: int = 64,
        max_queue: int = 32,
        asks: bool = False,
        endless: bool = False,
    ) -> None:
        runs = DecoderMachine(decoder, frozenset()) if endless else machine

        async def all_of_it() -> None:
            engine = LanguageEngine(
                runs, tokenizer, policy_named(policy, places), cache_blocks, CONTEXT, max_queue, LearnedLengths(), asks
            )
            engine.start()
            try:
                await asyncio.wait_for(work(engine), 60)
            finally:
                await engine.close()

        asyncio.run(all_of_it())

    return within_a_minute
