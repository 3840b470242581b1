"""What SepLLM's measurements share: the model, the books and how much of everything is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...models.language.tokenizer import TextTokenizer, tokenizer_of
from ...models.language.weights import Checkpoint, open_checkpoint
from .books import longest_passage, read_books, shelve
from .questions import conversations, read_questions


@dataclass(frozen=True)
class Sizes:
    """Attributes:
    neighbours: n of SepLLM's masks; the first, which loses most without training, is trained first.
    window, rounds, books: tokens of a window that is scored, windows of a book, books.
    trained: tokens of a window that is trained on.
    stream, reported: tokens through the fixed caches, and how many make a row.
    questions, shots: how many, and how many stand with their answers before each.
    answer: tokens of an answer, at most.
    """

    neighbours: tuple[int, ...] = (64, 128, 256)
    window: int = 2048
    rounds: int = 5
    books: int = 4
    trained: int = 2048
    stream: int = 51_200
    reported: int = 10_240
    questions: int = 8
    shots: int = 4
    answer: int = 160


@dataclass(frozen=True)
class Material:
    """Attributes:
    scored: (books, rounds, T) tokens.
    names: of those books.
    others: texts of the other books.
    long: a book's name, and its (stream,) tokens.
    asked: tokens of prompts.
    """

    checkpoint: Checkpoint
    tokenizer: TextTokenizer
    sizes: Sizes
    seed: int
    scored: torch.Tensor
    names: list[str]
    others: Mapping[str, str]
    long: tuple[str, torch.Tensor]
    asked: list[list[int]]

    @property
    def separators(self) -> torch.Tensor:
        """(vocabulary,) bool"""
        return self.tokenizer.separators


def load_material(weights: Path, books: Path, questions: Path, seed: int, sizes: Sizes) -> Material:
    """Raises InputError: books or questions cannot be read, or are too few. ModelError: the model cannot be read."""
    texts, worked = read_books(books), read_questions(questions)
    asked = conversations(worked, sizes.questions, sizes.shots, seed)
    checkpoint = open_checkpoint(weights)
    tokenizer = tokenizer_of(checkpoint)
    shelf = shelve(texts, sizes.books, sizes.window * sizes.rounds, tokenizer.encode, seed)
    return Material(
        checkpoint,
        tokenizer,
        sizes,
        seed,
        torch.stack(list(shelf.scored.values())).view(sizes.books, sizes.rounds, sizes.window),
        list(shelf.scored),
        shelf.others,
        longest_passage(texts, sizes.stream, tokenizer.encode, seed),
        [tokenizer.chat(messages) for messages in asked],
    )
