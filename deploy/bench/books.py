"""Books to measure language models on: whole texts in a tar, as PG-19's."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from ...models.errors import InputError

Encode = Callable[[str], list[int]]

_MATTER = 0.1
"""Share of a book that is skipped at its beginning: licences, title pages, tables of contents."""
_CHARACTERS = 12
"""A token has no more than these, on average over thousands of them."""


@dataclass(frozen=True)
class Shelf:
    """Attributes:
    scored: tokens of passages, (tokens,) each, by book.
    others: texts of the books that nothing is scored on.
    """

    scored: Mapping[str, torch.Tensor]
    others: Mapping[str, str]


def read_books(path: Path) -> dict[str, str]:
    """Texts of the .txt files in a tar, by name, in order of their names.

    Raises:
        InputError: no such file, no whole tar, no text in it or text that is not UTF-8.
    """
    books = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith(".txt") else None
                if file is not None:
                    books[PurePosixPath(member.name).stem] = file.read().decode()
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read books from {path}: {error}; it is a tar of .txt files") from error
    except UnicodeDecodeError as error:
        raise InputError(f"a book in {path} is not UTF-8: {error}") from error
    if not books:
        raise InputError(f"there is no .txt file in {path}; it is a tar of books")
    return dict(sorted(books.items()))


def passage(text: str, tokens: int, encode: Encode) -> torch.Tensor | None:
    """The first `tokens` tokens behind the matter at a book's front, (tokens,); None where the book is too short."""
    start = text.find("\n\n", int(_MATTER * len(text))) + 2
    found = encode(text[start : start + _CHARACTERS * tokens])
    return torch.tensor(found[:tokens]) if len(found) >= tokens else None


def shelve(books: Mapping[str, str], count: int, tokens: int, encode: Encode, seed: int) -> Shelf:
    """Draws the books to score, among those that are long enough. Raises InputError: there are too few."""
    scored: dict[str, torch.Tensor] = {}
    for name in drawn(books, seed):
        if len(scored) == count:
            break
        found = passage(books[name], tokens, encode)
        if found is not None:
            scored[name] = found
    if len(scored) < count:
        raise InputError(f"{count} books of {tokens} tokens are wanted and {len(scored)} of {len(books)} are so long")
    return Shelf(scored, {name: text for name, text in books.items() if name not in scored})


def longest_passage(books: Mapping[str, str], tokens: int, encode: Encode, seed: int) -> tuple[str, torch.Tensor]:
    """Of the first book drawn that has so many tokens. Raises InputError: none has."""
    for name in drawn(books, seed):
        found = passage(books[name], tokens, encode)
        if found is not None:
            return name, found
    raise InputError(f"no book has {tokens} tokens; the longest has {max(map(len, books.values()))} characters")


def windows(books: Mapping[str, str], count: int, tokens: int, encode: Encode, seed: int) -> torch.Tensor:
    """(count, tokens) from random places of the books in turn. Raises InputError: no book is so long."""
    random, long = (
        np.random.default_rng(seed),
        [name for name in drawn(books, seed) if passage(books[name], tokens, encode) is not None],
    )
    if not long:
        raise InputError(f"no book to train on has {tokens} tokens")
    rows = []
    while len(rows) < count:
        text = books[long[len(rows) % len(long)]]
        start = int(random.integers(int(_MATTER * len(text)), len(text)))
        found = encode(text[start : start + _CHARACTERS * tokens])
        if len(found) >= tokens:
            rows.append(torch.tensor(found[:tokens]))
    return torch.stack(rows)


def drawn(books: Mapping[str, str], seed: int) -> Sequence[str]:
    names = list(books)
    return [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
