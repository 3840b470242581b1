"""What the language model is asked, and what is made of its words: ranking what the FM is unsure of, and an operator's questions.

A ranking joins what the FM saw with how often it answered each label there lately, which needs no language model, and, where a
weight asks for it, with how much likelier the model finds a label once it has been told of the place than it found it before.
What the model then writes as a reason is its words, and no evidence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...models.errors import LabelError
from ...models.language.tokenizer import Message
from ...models.pool import UNKNOWN, LabelPool
from ...proto.v1 import edgefm_pb2 as pb

MOST_CANDIDATES = 20
BEGUN = "It is a"

_RANK = "You help a camera. You are told what it saw lately at a place, and name what it sees there now."
_ASK = (
    "You help the operator of a system in which small models on devices recognise things, and a large model in the cloud answers "
    "what they are unsure of. Answer shortly, from these facts alone; if they do not tell, say that you do not know.\n"
)
_PER_LABEL = 1
"""Descriptions of a label that are told, at most."""
_MOST_TOLD = 30
"""Labels and recent answers that are told, at most."""


@dataclass(frozen=True)
class Ranked:
    label: str
    probability: float
    fm_probability: float


def fm_log_probabilities(pool: LabelPool, candidates: Mapping[str, float]) -> dict[str, float]:
    """Of each candidate and of `UNKNOWN`, whose similarity is the pool's floor.

    Args:
        candidates: similarity of each label, cosines.

    Raises:
        LabelError: none, too many, or one that is not in the pool.
    """
    candidates = {label: x for label, x in candidates.items() if label != UNKNOWN}
    if not 0 < len(candidates) <= MOST_CANDIDATES:
        raise LabelError(f"a ranking is of 1 to {MOST_CANDIDATES} candidates, got {len(candidates)}")
    foreign = [label for label in candidates if label not in pool.labels]
    if foreign:
        raise LabelError(f"not in the pool: {foreign[0]!r}; candidates come from Recognize")
    similarities = np.array([*candidates.values(), pool.unknown_floor], np.float64)
    if not (np.abs(similarities) <= 1.01).all():
        raise LabelError("a candidate's similarity is a cosine, between -1 and 1")
    scaled = similarities / pool.temperature
    found = scaled - scaled.max()
    found -= np.log(np.exp(found).sum())
    return dict(zip([*candidates, UNKNOWN], found.tolist(), strict=True))


def rank_messages(
    environment: str, recent: Sequence[str], descriptions: Mapping[str, Sequence[str]], candidates: Sequence[str]
) -> list[Message]:
    """The place as the model is told of it; `recent` answers oldest first."""
    lines = [f"Place: {environment}."]
    if recent:
        lines.append(f"Seen there lately: {_counted(recent)}.")
    for label in candidates:
        told = " ".join(descriptions.get(label, ())[:_PER_LABEL])
        lines.append(_plain(f"Maybe it is: {label}.{' ' + told if told else ''}"))
    return [
        {"role": "system", "content": _RANK},
        {"role": "user", "content": "\n".join([*lines, "What does the camera see now?"])},
    ]


def rank_messages_without(candidates: Sequence[str]) -> list[Message]:
    """The same question before the model has been told anything of the place."""
    return rank_messages("unknown", (), {}, candidates)


def frequencies(candidates: Sequence[str], recent: Sequence[str]) -> dict[str, float]:
    """Log of how often each candidate comes, but for a constant: counts of `recent` answers and one more (Laplace)."""
    counts = Counter(recent)
    return {label: float(np.log(counts[label] + 1)) for label in candidates}


def opinion(
    told: Mapping[str, float], untold: Mapping[str, float], tokens: Mapping[str, int], weight: float
) -> dict[str, float]:
    """What the language model adds to the log-probability of each label.

    Args:
        told, untold: log-probabilities of the labels' words by the model, with and without the place; their difference counts per
            token, so that a long label does not count for more.
        weight: against the FM's log-probability.
    """
    return {label: weight * (told[label] - untold[label]) / tokens[label] for label in told}


def ranking(fm: Mapping[str, float], *evidence: Mapping[str, float]) -> list[Ranked]:
    """Likeliest first, by the sum of the FM's log-probabilities of the labels and of all other evidence."""
    joint = np.array([sum((some[label] for some in evidence), fm[label]) for label in fm])
    p = np.exp(joint - joint.max())
    p /= p.sum()
    found = [Ranked(label, float(share), float(np.exp(fm[label]))) for label, share in zip(fm, p, strict=True)]
    return sorted(found, key=lambda one: -one.probability)


def reason_messages(messages: Sequence[Message]) -> list[Message]:
    return [*messages[:-1], {"role": "user", "content": f"{messages[-1]['content']} Give the reason in one sentence."}]


def first_sentence(text: str) -> str:
    text = " ".join(text.split())
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]


def ask_messages(
    question: str, status: pb.EnvironmentStatus, labels: Sequence[str], recent: Sequence[str]
) -> list[Message]:
    """The facts come first, as the system's words: one environment's questions share them until they change."""
    facts = [
        f"Environment: {status.environment}.",
        _plain(f"Labels: {', '.join(labels[:_MOST_TOLD])}{', ...' if len(labels) > _MOST_TOLD else ''}."),
        f"Student: {status.student_profile}, version {status.student_version}.",
        f"Samples labelled by the foundation model: {status.samples_labelled}; stored: {status.samples_stored}.",
    ]
    if status.HasField("agreement"):
        agreement = status.agreement
        facts.append(
            f"Student and foundation model agree on {agreement.share:.0%} of the latest {agreement.samples} samples."
        )
    facts.append(
        "Drift alarms: "
        + ("; ".join(f"{alarm.kind}, raised" for alarm in status.alarms) if status.alarms else "none")
        + "."
    )
    if status.refusals:
        facts.append(f"Versions refused by devices lately: {len(status.refusals)}.")
    facts.append(f"Answers of the foundation model lately: {_counted(recent) if recent else 'none'}.")
    return [{"role": "system", "content": _ASK + "\n".join(facts)}, {"role": "user", "content": question}]


def _counted(labels: Sequence[str]) -> str:
    counts = Counter(labels)
    return _plain(", ".join(f"{label} ({count})" for label, count in counts.most_common(_MOST_TOLD)))


def _plain(text: str) -> str:
    """Without what could be one of the model's special tokens, such as <|im_end|>."""
    return text.replace("<", "< ")
