"""The label pool and recognition on it: `similarity = embedding @ pool.T` (EdgeFM, section 3). numpy only."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from .cache import write_atomic
from .errors import LabelError, ModelError

UNKNOWN = "unknown"
"""What a sample is answered with when no label of the pool is near enough."""
MAX_LABEL_LENGTH = 200
"""Characters."""
MAX_DESCRIPTION_LENGTH = 300
"""Characters."""
MAX_DESCRIPTIONS = 16
"""Of one label."""


def normalise(vectors: np.ndarray) -> np.ndarray:
    """L2-normalises the last axis; a zero vector stays zero."""
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(norm, 1e-12)).astype(np.float32)


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Strips the labels and refuses empty, overlong, reserved and repeated ones.

    Raises:
        LabelError: with the offending label.
    """
    cleaned = tuple(" ".join(label.split()) for label in labels)
    for label in cleaned:
        if not label or not label.isprintable():
            raise LabelError(f"a label must be non-empty printable text, got {label!r}")
        if len(label) > MAX_LABEL_LENGTH:
            raise LabelError(f"a label has at most {MAX_LABEL_LENGTH} characters, got {len(label)}: {label[:40]!r}...")
        if label == UNKNOWN:
            raise LabelError(f"{UNKNOWN!r} is what samples of no label are answered with; choose another label")
    if len(set(cleaned)) != len(cleaned):
        repeated = sorted(label for label, count in Counter(cleaned).items() if count > 1)
        raise LabelError(f"labels given twice: {', '.join(repeated)}")
    return cleaned


def check_descriptions(label: str, texts: Sequence[str]) -> tuple[str, ...]:
    """Strips the descriptions of a label and drops repeated ones.

    Raises:
        LabelError: one is empty, overlong or not printable, or there are too many.
    """
    cleaned = tuple(dict.fromkeys(" ".join(text.split()) for text in texts))
    for text in cleaned:
        if not text or not text.isprintable():
            raise LabelError(f"a description must be non-empty printable text, got {text!r} for {label!r}")
        if len(text) > MAX_DESCRIPTION_LENGTH:
            raise LabelError(
                f"a description has at most {MAX_DESCRIPTION_LENGTH} characters, got {len(text)} for {label!r}: {text[:40]!r}..."
            )
    if len(cleaned) > MAX_DESCRIPTIONS:
        raise LabelError(f"a label has at most {MAX_DESCRIPTIONS} descriptions, got {len(cleaned)} for {label!r}")
    return cleaned


@dataclass(frozen=True)
class Recognition:
    """What a batch looks like to a model; B samples, k labels each."""

    indices: np.ndarray  # (B, k) int64, best first
    similarities: np.ndarray  # (B, k) float32 cosines, best first
    margins: np.ndarray  # (B,) float32, top-1 minus top-2 similarity
    unknown: np.ndarray  # (B,) bool, top-1 below the pool's floor


@dataclass(frozen=True)
class LabelPool:
    """The labels in use, one embedding each; immutable, named by the hash of its content.

    Attributes:
        labels: K distinct labels.
        embeddings: (K, D) float32, L2-normalised, in the FM's space.
        foundation_model: name of the FM that embedded the labels.
        unknown_floor: a sample whose best similarity is below it is `UNKNOWN`.
        temperature: of the FM: softmax(similarities / temperature) is how sure it is of each label.
        warnings: what the FM said of labels out of its reach.
        descriptions: what labels look like, of those that are described; their embeddings have taken it in, so that a device
            needs no word of it.
    """

    labels: tuple[str, ...]
    embeddings: np.ndarray
    foundation_model: str
    unknown_floor: float = -1.0
    temperature: float = 0.05
    warnings: tuple[str, ...] = ()
    descriptions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.labels:
            raise LabelError("a label pool needs at least one label")
        if self.embeddings.ndim != 2 or len(self.embeddings) != len(self.labels):
            raise ModelError(f"{len(self.labels)} labels, but embeddings of shape {self.embeddings.shape}")

    def _check_numbers(self) -> None:
        lengths = np.linalg.norm(self.embeddings, axis=1)  # (K,); zero where a label has no embedding
        if not (np.abs(self.embeddings) <= 1.001).all() or not (lengths <= 1.001).all():
            raise ValueError("its embeddings are not of unit length")
        if not (np.isfinite(self.unknown_floor) and np.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"floor {self.unknown_floor}, temperature {self.temperature}")

    @cached_property
    def version(self) -> str:
        """16 hex digits of the sha256 of what recognition depends on (not of the descriptions' words); equal on every machine."""
        digest = hashlib.sha256()
        for text in (self.foundation_model, f"{self.unknown_floor:.6f}", f"{self.temperature:.6f}", *self.labels):
            digest.update(text.encode() + b"\0")
        digest.update(np.ascontiguousarray(self.embeddings, "<f4").tobytes())
        return digest.hexdigest()[:16]

    def recognise(self, embeddings: np.ndarray, top_k: int = 5) -> Recognition:
        """Ranks the labels for (B, D) normalised embeddings.

        The margin needs a second label; in a pool of one, the unknown floor takes its place.
        """
        similarities = embeddings @ self.embeddings.T  # (B, K)
        k = max(1, min(top_k, len(self.labels)))
        order = np.argsort(-similarities, axis=1, kind="stable")[:, : max(k, 2)]
        ranked = np.take_along_axis(similarities, order, axis=1)
        second = ranked[:, 1] if ranked.shape[1] > 1 else self.unknown_floor
        top = ranked[:, 0]
        return Recognition(order[:, :k], ranked[:, :k], top - second, top < self.unknown_floor)

    def best(self, embedding: np.ndarray) -> tuple[str, float, float]:
        """Label (`UNKNOWN` below the floor), similarity and margin of one (D,) embedding, as by `recognise` but for rounding.

        For frame after frame on a device: a session leaves the caches cold, and there one call into numpy and a list take a
        third of the time that ranking a batch of one takes.
        """
        similarities = self.embeddings.dot(embedding).tolist()
        top = max(similarities)
        index = similarities.index(top)
        similarities[index] = self.unknown_floor if len(similarities) == 1 else -math.inf
        return UNKNOWN if top < self.unknown_floor else self.labels[index], top, top - max(similarities)

    def with_unknown(self, similarities: np.ndarray) -> np.ndarray:
        """(N, k) similarities to (N, k + 1): `UNKNOWN` as a label whose similarity is the floor, which is the best one
        exactly when a sample is answered with it."""
        return np.hstack([similarities, np.full((len(similarities), 1), self.unknown_floor, similarities.dtype)])

    def answers(self, recognition: Recognition) -> list[str]:
        """The label of each sample, `UNKNOWN` below the floor."""
        return [
            UNKNOWN if unknown else self.labels[index]
            for index, unknown in zip(recognition.indices[:, 0], recognition.unknown, strict=True)
        ]

    def to_bytes(self) -> bytes:
        """The pool as an .npz file; equal pools give equal bytes."""
        buffer, optional = io.BytesIO(), {}
        if self.descriptions:  # without them the file is the same as before there were any
            text = json.dumps(self.descriptions, ensure_ascii=False, sort_keys=True)
            optional["descriptions"] = np.frombuffer(text.encode(), np.uint8)
        np.savez(
            buffer,
            labels=np.array(self.labels, dtype=np.str_),
            embeddings=self.embeddings.astype("<f4"),
            foundation_model=np.array(self.foundation_model),
            unknown_floor=np.array(self.unknown_floor, "<f8"),
            temperature=np.array(self.temperature, "<f8"),
            warnings=np.array(self.warnings, dtype=np.str_),
            **optional,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> LabelPool:
        """Reads what `to_bytes` wrote.

        Raises:
            ModelError: the bytes are not a label pool.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                if any(member.file_size > len(data) for member in file.zip.infolist()):
                    raise ValueError("it would grow when it is unpacked")
                pool = cls(
                    labels=tuple(str(label) for label in file["labels"]),
                    embeddings=file["embeddings"].astype(np.float32),
                    foundation_model=str(file["foundation_model"]),
                    unknown_floor=float(file["unknown_floor"]),
                    temperature=float(file["temperature"]),
                    warnings=tuple(str(text) for text in file["warnings"]),
                    descriptions=_descriptions(file["descriptions"].tobytes()) if "descriptions" in file else {},
                )
            pool._check_numbers()
            return pool
        except Exception as error:  # numpy and zipfile raise OSError, ValueError, KeyError, NotImplementedError, ...
            raise ModelError(f"not a label pool ({len(data)} bytes): {error}") from error

    def save(self, path: Path) -> None:
        """Replaces the file in one step; raises `StoreError` if the disk refuses."""
        write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> LabelPool:
        """Reads a saved pool; raises `ModelError` with the path if it is missing or damaged."""
        try:
            return cls.from_bytes(path.read_bytes())
        except OSError as error:
            raise ModelError(f"cannot read the label pool {path}: {error.strerror}") from error
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error


def _descriptions(data: bytes) -> dict[str, tuple[str, ...]]:
    return {str(label): check_descriptions(label, texts) for label, texts in json.loads(data).items()}
