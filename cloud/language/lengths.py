"""How long an answer will be, before it is there (arXiv 2305.13144, section 4): what admission and sequence scheduling go by.

Two ways: ask the model itself for one number, or learn from the answers given so far. A prediction never changes an answer.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...models.cache import write_atomic
from ...models.errors import StoreError
from ...models.language.tokenizer import Message

log = logging.getLogger("edgefm.cloud.language")

QUANTILE = 0.8
"""Of the lengths that answers like it had: an answer longer than predicted costs its place, a shorter one only room."""
ASKED_TOKENS = 6
"""Of the model's own guess, at most."""

_KINDS = ("generate", "describe", "ask", "rank")
_SIZES = 3 + len(_KINDS)
_HASHED = 32
_RESIDUALS = 200
_LEAST = 20
_RIDGE = 30.0
"""Weight of "as long as usual" against the answers, in answers."""

_QUESTION = (
    "Before responding to the above instruction, you have to predict the length of your response. Print the estimated number of "
    "tokens in your response in the first line. Only print the number."
)


def question(messages: Sequence[Message]) -> list[Message]:
    """The conversation, with the question for the answer's length behind its last message (arXiv 2305.13144, section 4.1)."""
    *before, last = messages
    asked: Message = {"role": last["role"], "content": f"{last['content']}\n\n{_QUESTION}"}
    return [*before, asked]


def asked_length(answer: str, most: int) -> int:
    """The first number in the model's guess; `most` where it gave none."""
    found = re.search(r"\d{1,6}", answer)
    return min(max(int(found[0]), 1), most) if found else most


class LearnedLengths:
    """Predicts a quantile of the answer's length from the service's own history.

    Ridge regression of log length on the prompt's length, the limit, the kind of request and the prompt's tokens (hashed), from
    running sums, so that what it costs and keeps does not grow; above it the quantile of what the latest predictions of the
    same kind were wrong by, each judged by an answer that it had not learned from.

    Args:
        path: where the history is kept over a restart; None: nowhere.
        model: whose answers these are; another's history is not taken up.

    Attributes:
        unsaved: answers learned from since the latest `snapshot`.
    """

    def __init__(self, path: Path | None = None, model: str = "", quantile: float = QUANTILE) -> None:
        self._path, self._model, self._quantile = path, model, quantile
        self.unsaved = 0
        size = _SIZES + _HASHED
        self._squares = np.zeros((size, size))
        self._products = np.zeros(size)
        self._weights: np.ndarray | None = np.zeros(size)
        self._wrong: dict[str, deque[float]] = {kind: deque(maxlen=_RESIDUALS) for kind in _KINDS}
        if path is not None and path.exists():
            self._load(path)

    def predict(self, prompt: Sequence[int], most: int, kind: str) -> int:
        """Tokens of the answer, between 1 and `most`; `most` as long as there is too little history of its kind."""
        wrong = self._wrong[kind]
        if len(wrong) < _LEAST:
            return most
        usual = float(_features(prompt, most, kind) @ self._fitted())
        above = float(np.quantile(wrong, self._quantile))
        return int(min(max(round(math.exp(min(usual + above, 20.0))), 1), most))

    def learn(self, prompt: Sequence[int], most: int, kind: str, length: int) -> None:
        """An answer has come to its end after `length` tokens."""
        x, y = _features(prompt, most, kind), math.log(max(length, 1))
        self._wrong[kind].append(y - float(x @ self._fitted()))
        self._squares += np.outer(x, x)
        self._products += x * y
        self._weights = None
        self.unsaved += 1

    def snapshot(self) -> bytes:
        """The history as it is now, for `write`."""
        self.unsaved = 0
        wrong = {kind: list(some) for kind, some in self._wrong.items()}
        sums = {"squares": self._squares.tolist(), "products": self._products.tolist()}
        return json.dumps({"model": self._model, "wrong": wrong, **sums}).encode()

    def write(self, snapshot: bytes) -> None:
        """In any thread. A disk that refuses costs no more than the history, and is logged."""
        if self._path is None:
            return
        try:
            write_atomic(self._path, snapshot)
        except StoreError as error:
            log.warning("event=lengths_not_kept reason=%s", error)

    def _load(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text())
            squares, products = np.array(found["squares"], float), np.array(found["products"], float)
            wrong = {kind: [float(one) for one in found["wrong"][kind]] for kind in _KINDS}
            if squares.shape != self._squares.shape or products.shape != self._products.shape:
                raise ValueError("it is of another version")
            if not all(np.isfinite(some).all() for some in (squares, products, *map(np.array, wrong.values()))):
                raise ValueError("it holds what is no number")
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("event=lengths_lost file=%s reason=%r", path, error)
            return
        if found.get("model") == self._model:
            self._squares, self._products, self._weights = squares, products, None
            for kind, some in wrong.items():
                self._wrong[kind].extend(some)

    def _fitted(self) -> np.ndarray:
        if self._weights is None:
            penalty = np.full(len(self._products), _RIDGE)
            penalty[0], penalty[1:_SIZES] = 0.1, 3.0
            self._weights = np.linalg.solve(self._squares + np.diag(penalty), self._products)
        return self._weights


def _features(prompt: Sequence[int], most: int, kind: str) -> np.ndarray:
    """(sizes and kinds, hashed)"""
    hashed = np.zeros(_HASHED)
    tokens = np.asarray(prompt, np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # wraps: Fibonacci hashing
    places, signs = (tokens >> np.uint64(32)) % np.uint64(_HASHED), (tokens >> np.uint64(40)) & np.uint64(1)
    np.add.at(hashed, places.astype(np.int64), 1.0 - 2.0 * signs.astype(np.float64))
    hashed /= math.sqrt(max(len(prompt), 1))
    kinds = np.array([float(kind == name) for name in _KINDS])
    # About their usual values, so that what never varies is left to the constant.
    sizes = [1.0, math.log(max(len(prompt), 1) / 64), math.log(most / 256)]
    return np.concatenate((sizes, kinds, hashed))
