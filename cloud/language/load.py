"""From settings to an engine: weights from the disk, decoder, policy."""

from __future__ import annotations

from pathlib import Path

from ...models.errors import ConfigError
from ...models.language.decoder import Decoder
from ...models.language.tokenizer import tokenizer_of
from ...models.language.weights import open_checkpoint
from ..config import LanguageConfig
from .engine import LanguageEngine
from .generation import blocks
from .lengths import LearnedLengths
from .machine import DecoderMachine
from .scheduling import policy_named


def load_engine(config: LanguageConfig, data_dir: Path) -> LanguageEngine:
    """What it learns of its answers' lengths is kept in `data_dir`.

    Raises ModelError: the weights are missing, damaged or of another architecture, or the model has no chat template."""
    if config.model is None:
        raise ConfigError("no language model is set; give the cloud one with --language")
    checkpoint = open_checkpoint(config.model)
    tokenizer = tokenizer_of(checkpoint)
    tokenizer.chat([{"role": "user", "content": "?"}])  # no template is an error now, not at the first request
    machine = DecoderMachine(Decoder(checkpoint, config.precision), tokenizer.ends)
    return LanguageEngine(
        machine,
        tokenizer,
        policy_named(config.policy, config.places),
        blocks(config.cache_tokens),
        checkpoint.config.context,
        config.max_queue,
        LearnedLengths(data_dir / "language-lengths.json", config.model.name),
        config.lengths == "asked",
    )
