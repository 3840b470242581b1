"""What a student version is on disk and on the wire: a manifest and files named by their content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .confidence import Confidence
from .errors import ModelError
from .images import Preprocess

MANIFEST_FORMAT = 1
GRAPH_FILE = "student.onnx"
TRUNK_FILE = "trunk.fp16.bin"
TAIL_FILE = "tail.fp16.bin"
HEAD_FILE = "head.fp16.bin"
"""The graph; its weights lie beside it in the files it names (ONNX external data), so that a new head is a small
download."""

MAX_BLOB_BYTES = 256 * 1024 * 1024
"""Of one file: many times the largest student. A device promises its disk to nobody who names more."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BlobRef(_Frozen):
    """A file named by its content."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=0, le=MAX_BLOB_BYTES)]

    @classmethod
    def of(cls, name: str, data: bytes) -> BlobRef:
        return cls(name=name, sha256=sha256_hex(data), size_bytes=len(data))

    @classmethod
    def from_json(cls, text: str | bytes) -> BlobRef:
        """Raises `ModelError` when the text names no file."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(
                f"it names no file: {'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}"
            ) from error


class Calibration(_Frozen):
    """How a version agreed with the FM on samples held out of its training; three lists of equal length.

    Agreement is graded (see `edgefm.models.confidence`).

    The device takes it for prior evidence until it has its own (see `edgefm.edge.agreement`).
    """

    margins: list[float] = []
    agreements: list[float] = []
    propensities: list[Annotated[float, Field(gt=0, le=1)]] = []

    @model_validator(mode="after")
    def _one_of_each(self) -> Calibration:
        if not len(self.margins) == len(self.agreements) == len(self.propensities):
            raise ValueError("margins, agreements and propensities differ in length")
        return self


class StudentManifest(_Frozen):
    """Everything about one immutable student version but its weights."""

    format: int = MANIFEST_FORMAT
    environment: str
    version: Annotated[int, Field(ge=0, lt=2**32)]
    parent: int | None
    profile: str
    preprocess: Preprocess
    embedding_dim: int
    confidence: Confidence
    foundation_model: str
    pool_version: str
    samples: Annotated[int, Field(ge=0)]
    """Samples labelled by the FM that the version learned from or was gated on."""
    agreement: float | None
    """Share of the held-out samples, weighted, on which the version agrees with the FM; None for version 0."""
    parent_agreement: float | None
    """The parent's share on the same held-out samples."""
    method: str
    precision: Literal["float", "int8"]
    """Of the backbone's arithmetic."""
    calibration: Calibration
    files: Annotated[list[BlobRef], Field(max_length=16)]
    created_at: str

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> StudentManifest:
        """Raises `ModelError` when the text is no manifest or of a newer format."""
        _refuse_other_format(text)  # first: another format may have other fields
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "manifest"
            raise ModelError(f"not a student manifest: {where}: {first['msg']}") from error


def _refuse_other_format(manifest: str | bytes) -> None:
    try:
        found = json.loads(manifest)
    except (ValueError, RecursionError):
        return  # no manifest of any format
    number = found.get("format", MANIFEST_FORMAT) if isinstance(found, dict) else MANIFEST_FORMAT
    if number != MANIFEST_FORMAT:
        raise ModelError(f"student manifest of format {number}, this EdgeFM reads {MANIFEST_FORMAT}: upgrade edgefm")


def quantise_fp16(weights: np.ndarray) -> np.ndarray:
    """Rounds float32 weights to what their fp16 file can hold, so that training, export and device agree exactly."""
    return weights.astype(np.float16).astype(np.float32)


def verify_file(path: Path, ref: BlobRef) -> None:
    """Raises `ModelError` unless the file has the size and sha256 of `ref`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    if len(data) != ref.size_bytes or sha256_hex(data) != ref.sha256:
        raise ModelError(
            f"{path.name} is damaged: {len(data)} bytes, sha256 {sha256_hex(data)[:12]}..., "
            f"expected {ref.size_bytes} bytes, {ref.sha256[:12]}..."
        )
