"""Questions with worked answers, as GSM8K's, and conversations that ask them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...models.errors import InputError
from ...models.language.tokenizer import Message

_CALCULATOR = re.compile(r"<<.*?>>")
_FINAL = re.compile(r"####\s*(-?[\d.,]*\d)")


@dataclass(frozen=True)
class Question:
    """`answer`: reasoning, and the result behind ####."""

    question: str
    answer: str


def read_questions(path: Path) -> list[Question]:
    """Of a file with a JSON object a line, `question` and `answer`. Raises InputError: none such, or a line is not one."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read questions from {path}: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            one = json.loads(line)
            found.append(Question(str(one["question"]), _CALCULATOR.sub("", one["answer"])))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"line {number} of {path} is no question with its answer: {error!r}") from error
    return found


def conversations(questions: Sequence[Question], count: int, shots: int, seed: int) -> list[list[Message]]:
    """Chain of thought by example: `shots` questions with their answers, the same for all, then one without.

    Raises:
        InputError: there are fewer than `shots` + `count`.
    """
    if len(questions) < shots + count:
        raise InputError(f"{shots + count} questions are wanted, there are {len(questions)}")
    drawn = [questions[i] for i in np.random.default_rng(seed).permutation(len(questions))[: shots + count]]
    shown = [
        said
        for one in drawn[:shots]
        for said in (Message(role="user", content=one.question), Message(role="assistant", content=one.answer))
    ]
    return [[*shown, Message(role="user", content=one.question)] for one in drawn[shots:]]


def final(answer: str) -> str | None:
    """The result that an answer gives; None where it gives none."""
    found = _FINAL.search(answer)
    return found[1].replace(",", "") if found else None
