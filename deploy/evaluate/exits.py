"""Early exits of the FM, as SPINN and PersEPhonEE have them, taught by the FM on the stream that nobody has labelled.

Laskaridis et al., "SPINN: Synergistic Progressive Inference of Neural Networks over Device and Cloud", MobiCom 2020.
Leontiadis et al., "It's always personal: Using Early Exits for Efficient On-Device CNN Personalisation", HotMobile 2021.

An exit takes the mean over the pixels of the features at a boundary of `fm_stages` and maps it into the FM's joint space, so
that it answers with the product's label pool, and labels can change by text alone. The map is a ridge regression on the FM's
embeddings: the FM is the teacher, as the last exit is in PersEPhonEE without labels. How sure an exit is, is the largest
probability of its labels at a temperature fitted for each exit, so that one threshold serves them all, as in SPINN. The
threshold is the lowest at which the graded agreement with the FM (`edgefm.models.confidence`) reaches the target, with the
switcher's caution, on evidence from the stream: the rule by which the product chooses its own. Ground truth is for scoring alone.

Simpler than in the papers: SPINN trains backbone and exits together from labels, while here the backbone is the FM's and
stays as it is, which is PersEPhonEE's way and lets the end of the network say exactly what the FM says. An exit is linear
behind its pooling; the papers give it a small convolutional head. Exits stand where stages of blocks end, SPINN's at equal
shares of the computation. PersEPhonEE learns on the device from what it has seen so far; here the exits have all of their
samples from the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...edge.config import SwitcherConfig
from ...models.confidence import Confidence, graded_agreement, log_posterior
from ...models.images import decode_image
from ...models.pool import LabelPool, normalise
from .fm_stages import StagedFM, pack, unpack

_STRENGTHS = 10.0 ** np.arange(4.5, -1.5, -0.5)
"""Of the ridge, strongest first: with standardised features, in samples."""
_BATCH = 16


@dataclass(frozen=True, eq=False)
class Staged:
    """N images on their way through the FM.

    Attributes:
        pooled: (N, C) float32 for each boundary between image and end.
        fm: (N, D) embeddings.
    """

    pooled: tuple[np.ndarray, ...]
    fm: np.ndarray

    def __len__(self) -> int:
        return len(self.fm)

    def at(self, rows: np.ndarray) -> Staged:
        return Staged(tuple(values[rows] for values in self.pooled), self.fm[rows])


@dataclass(frozen=True, eq=False)
class Sent:
    """The same, sent to the cloud from each of the boundaries 0 to B - 1.

    Attributes:
        size_bytes: (N, B) of what was sent.
        embeddings: (B, N, D) of the cloud, which goes on from what it got.
    """

    size_bytes: np.ndarray
    embeddings: np.ndarray


def look(fm: StagedFM, encoded: Sequence[bytes]) -> Staged:
    pooled: list[list[np.ndarray]] = [[] for _ in range(1, fm.end)]
    embeddings = [
        fm.run(images, lambda boundary, reached: pooled[boundary - 1].append(pool_pixels(reached)))
        for images in _batches(fm, encoded)
    ]
    return Staged(tuple(map(np.concatenate, pooled)), np.concatenate(embeddings))


def send(fm: StagedFM, encoded: Sequence[bytes]) -> Sent:
    sizes: list[list[int]] = [[len(data) for data in encoded], *([] for _ in range(1, fm.end))]
    embeddings: list[list[np.ndarray]] = [[] for _ in range(fm.end)]

    def send_from(boundary: int, reached: np.ndarray) -> None:
        packed = [pack(one) for one in reached]
        sizes[boundary] += map(len, packed)
        arrived = np.stack([unpack(data, reached.shape[1:]) for data in packed])
        embeddings[boundary].append(fm.go_on(boundary, arrived))

    for images in _batches(fm, encoded):
        fm.run(images, send_from)
        embeddings[0].append(fm.go_on(0, images))
    return Sent(np.array(sizes).T, np.stack([np.concatenate(parts) for parts in embeddings]))


def _batches(fm: StagedFM, encoded: Sequence[bytes]) -> Iterator[np.ndarray]:
    for start in range(0, len(encoded), _BATCH):
        yield fm.preprocess.batch([decode_image(data) for data in encoded[start : start + _BATCH]])


def pool_pixels(reached: np.ndarray) -> np.ndarray:
    """(N, C, h, w) -> (N, C)"""
    return reached.mean(axis=(2, 3))


# ---- one exit


@dataclass(frozen=True, eq=False)
class Exit:
    """A linear map from pooled features into the FM's space.

    Attributes:
        weight: (C, D) float32.
        bias: (D,) float32.
        confidence: how far it is to be believed, beside the FM.
    """

    weight: np.ndarray
    bias: np.ndarray
    confidence: Confidence

    def similarities(self, pooled: np.ndarray, pool: LabelPool) -> np.ndarray:
        """(N, C) -> (N, K + 1): with the labels, and with `UNKNOWN` last."""
        return pool.with_unknown(normalise(pooled @ self.weight + self.bias) @ pool.embeddings.T)

    def sureness(self, similarities: np.ndarray) -> np.ndarray:
        """(N,) in [0, 1]"""
        return np.exp(log_posterior(similarities, self.confidence.temperature).max(axis=1))


def fit_exits(samples: Staged, held_out: np.ndarray, pool: LabelPool) -> list[Exit]:
    """One for each boundary between image and end.

    Args:
        held_out: (N,) bool, samples that choose the ridge's strength, by agreement with the FM, and the temperature.
    """
    fm = pool.with_unknown(samples.fm @ pool.embeddings.T)[held_out]
    return [_fit(values.astype(np.float64), samples.fm, held_out, fm, pool) for values in samples.pooled]


def _fit(pooled: np.ndarray, targets: np.ndarray, held_out: np.ndarray, fm: np.ndarray, pool: LabelPool) -> Exit:
    train = pooled[~held_out]
    centre, spread = train.mean(axis=0), np.maximum(train.std(axis=0), 1e-9)  # (C,)
    standard, middle = (train - centre) / spread, targets[~held_out].mean(axis=0, dtype=np.float64)  # (N, C), (D,)
    gram, moment = standard.T @ standard, standard.T @ (targets[~held_out] - middle)  # (C, C), (C, D)

    def fitted(strength: float) -> Exit:
        weight = np.linalg.solve(gram + strength * np.eye(len(gram)), moment) / spread[:, None]
        bias = middle - centre @ weight
        return Exit(weight.astype(np.float32), bias.astype(np.float32), Confidence(pool.temperature))

    candidates = [fitted(strength) for strength in _STRENGTHS]
    similarities = [one.similarities(pooled[held_out].astype(np.float32), pool) for one in candidates]
    agreements = [(some.argmax(axis=1) == fm.argmax(axis=1)).mean() for some in similarities]
    best = int(np.argmax(agreements))  # the strongest ridge of the best
    confidence = Confidence.fit(similarities[best], fm, np.ones(len(fm)), pool.temperature)
    return replace(candidates[best], confidence=confidence)


# ---- all of them


def on_device(exits: Sequence[Exit], pool: LabelPool) -> list[Callable[[np.ndarray], np.ndarray]]:
    """What a device computes at each boundary between image and end, for `fm_stages.measure`: (N, C, h, w) -> (N,) sureness."""
    return [lambda reached, one=one: one.sureness(one.similarities(pool_pixels(reached), pool)) for one in exits]


@dataclass(frozen=True, eq=False)
class ExitRule:
    """When an exit answers.

    Attributes:
        threshold: an exit whose sureness reaches it answers, and nothing behind it is computed.
        stay: (B + 1,) share of the evidence that no exit up to a boundary has answered; the end answers the rest.
        agreement: expected with the FM, graded, of all answers.
    """

    threshold: float
    stay: np.ndarray
    agreement: float


def choose_rule(exits: Sequence[Exit], evidence: Staged, pool: LabelPool, target: float) -> ExitRule:
    """The lowest threshold at which, on the evidence, the device's answers reach the target, a share in (0, 1]."""
    fm = pool.with_unknown(evidence.fm @ pool.embeddings.T)
    sure, graded, rows = [np.zeros(len(fm))], [np.zeros(len(fm))], np.arange(len(fm))
    for early, pooled in zip(exits, evidence.pooled, strict=True):
        similarities = early.similarities(pooled, pool)
        sure.append(early.sureness(similarities))
        graded.append(graded_agreement(fm, similarities, pool.temperature, early.confidence))
    sureness = np.column_stack([*sure, np.full(len(fm), np.inf)])  # (N, B + 1); the end is always sure
    agreements = np.column_stack([*graded, np.ones(len(fm))])  # (N, B + 1)

    def taken(threshold: float) -> np.ndarray:
        return (sureness >= threshold).argmax(axis=1)

    def agreement(threshold: float) -> np.ndarray:
        return agreements[rows, taken(threshold)]

    def keeps(threshold: float) -> bool:
        found = agreement(threshold)
        return found.mean() - SwitcherConfig.caution * found.std() / math.sqrt(len(found)) >= target

    candidates = np.unique(sureness[:, 1:]).tolist()  # the last is infinity: the FM answers everything
    threshold = next(candidate for candidate in candidates if keeps(candidate))
    stay = np.array([(taken(threshold) > boundary).mean() for boundary in range(sureness.shape[1])])
    return ExitRule(threshold, stay, float(agreement(threshold).mean()))


@dataclass(frozen=True, eq=False)
class ExitRecording:
    """What exits, FM and cloud say of N samples in order of arrival; arrays are (N, B + 1), by boundary.

    Attributes:
        sureness: of the exits; 0 at the image, where none is, and infinity at the end, where the FM itself answers.
        edge_right: whether the answer there names the label; at the image there is none, so not.
        cloud_right: whether the cloud's does that goes on from there; at the end it is the device's.
        size_bytes: of what is sent from there.
    """

    sureness: np.ndarray
    edge_right: np.ndarray
    cloud_right: np.ndarray
    size_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.sureness)

    def at(self, rows: np.ndarray | slice) -> ExitRecording:
        return ExitRecording(*(values[rows] for values in vars(self).values()))

    def with_payload(self, size_bytes: int) -> ExitRecording:
        """With images of that size; features stay what they are."""
        sizes = self.size_bytes.copy()
        sizes[:, 0] = size_bytes
        return replace(self, size_bytes=sizes)


def record(exits: Sequence[Exit], scored: Staged, sent: Sent, truth: np.ndarray, pool: LabelPool) -> ExitRecording:
    """`truth`: (N,) str."""
    names = np.array([*pool.labels, None], dtype=object)  # no label is right for what is said to be unknown

    def right(similarities: np.ndarray) -> np.ndarray:
        return names[similarities.argmax(axis=1)] == truth

    samples = len(scored)
    early = [one.similarities(pooled, pool) for one, pooled in zip(exits, scored.pooled, strict=True)]
    sureness = [one.sureness(similarities) for one, similarities in zip(exits, early, strict=True)]
    by_fm = right(pool.with_unknown(scored.fm @ pool.embeddings.T))
    by_cloud = [right(pool.with_unknown(embeddings @ pool.embeddings.T)) for embeddings in sent.embeddings]
    return ExitRecording(
        np.column_stack([np.zeros(samples), *sureness, np.full(samples, np.inf)]),
        np.column_stack([np.zeros(samples, bool), *map(right, early), by_fm]),
        np.column_stack([*by_cloud, by_fm]),
        np.column_stack([sent.size_bytes, np.zeros(samples, np.int64)]),
    )
