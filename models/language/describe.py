"""What a language model is asked about a label, and what of its answers describes the label.

A small model needs examples more than instructions: it is shown two things and how they are described, one of them under a
name that has to be understood first. Even so it loops, repeats the label, wanders off to an example or to another thing; such
answers are dropped, so that a label may end with fewer descriptions than were asked for, or with none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from ..pool import MAX_DESCRIPTION_LENGTH
from .generate import Sampling
from .tokenizer import Message

SAMPLES = 4
"""Answers for one label: the likeliest, and others at random."""
_TOKENS = 48
_TEMPERATURE, _TOP_P = 0.7, 0.9
_LONGEST = min(180, MAX_DESCRIPTION_LENGTH)
"""Characters. `_TOKENS` are more: what was cut off is dropped."""
_MOST_REPEATS = 2
"""Of one word with a meaning, in one description."""

_EXAMPLES: tuple[Message, ...] = (
    {"role": "system", "content": "You say in one sentence what a thing is and what it looks like."},
    {"role": "user", "content": "bunny"},
    {"role": "assistant", "content": "A bunny is a rabbit, a small furry animal with long ears and a short tail."},
    {"role": "user", "content": "cabbie's car"},
    {"role": "assistant", "content": "A cabbie's car is a taxi, a yellow car with a sign on its roof."},
)
_BULLET = re.compile(r"^\s*(?:[-*•>#]+|\(?\d{1,2}[.):])\s*")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")
_META = re.compile(
    r"^(?:as an? (?:ai|language|digital|assistant)|i(?:'m| am| can(?:'|no)t| don't| do not| have| would)\b|sure\b|certainly|"
    r"of course|sorry|here(?:'s| is| are)\b|the (?:answer|description|sentence)\b|please\b|let me\b)|language model",
    re.IGNORECASE,
)
_FILLING = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be by can for from has have in into is it its kind like of on or that the their them they thing "
        "this to type used was which who with",
    )
)


def requests(label: str) -> list[tuple[list[Message], Sampling]]:
    """Conversations for `TextTokenizer.chat`, each with how its answer is sampled; the same ones for the same label."""
    messages: list[Message] = [*_EXAMPLES, {"role": "user", "content": label}]
    likeliest = Sampling(most=_TOKENS)
    others = (Sampling(_TOKENS, _TEMPERATURE, _TOP_P, seed) for seed in range(1, SAMPLES))
    return [(messages, sampling) for sampling in (likeliest, *others)]


def descriptions(label: str, answers: Sequence[str]) -> tuple[str, ...]:
    """The distinct sentences among the answers that say something of the label, in their order; perhaps none.

    Of every line (a list's points are lines) the first sentence is taken. One is dropped that is empty or longer than 180
    characters, breaks off, talks of the model instead, has fewer than half of the label's words, adds fewer than two words to
    it, or says one word more than twice.
    """
    found: dict[str, str] = {}
    for answer in answers:
        for sentence in _sentences(answer):
            if _describes(sentence, label):
                found.setdefault(sentence.rstrip(".!").casefold(), sentence)
    return tuple(found.values())


def _sentences(answer: str) -> Iterator[str]:
    for line in answer.splitlines():
        bare = _BULLET.sub("", line).replace("**", "").strip()
        first = " ".join(_SENTENCE.split(bare)[0].split()).strip("\"'“”` ")
        if first:
            yield first


def _describes(sentence: str, label: str) -> bool:
    if len(sentence) > _LONGEST or not sentence.isprintable() or sentence[-1] not in ".!?" or _META.search(sentence):
        return False
    named, said = set(_words(label)), Counter(_words(sentence))
    new = said.keys() - named
    return 2 * len(said.keys() & named) >= len(named) and len(new) >= 2 and max(said.values()) <= _MOST_REPEATS


def _words(text: str) -> list[str]:
    """With a meaning, lower case, singular."""
    words = (word.removesuffix("'s") for word in re.findall(r"\w[\w'-]*", text.casefold().replace("’", "'")))
    return [_singular(word) for word in words if word not in _FILLING]


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word
