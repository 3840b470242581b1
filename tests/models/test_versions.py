"""Manifests of student versions, and files named by their content."""

from __future__ import annotations

import json

import numpy as np
import pytest
from edgefm.models.confidence import Confidence
from edgefm.models.errors import ModelError
from edgefm.models.images import Preprocess
from edgefm.models.versions import (
    MANIFEST_FORMAT,
    BlobRef,
    Calibration,
    StudentManifest,
    quantise_fp16,
    sha256_hex,
    verify_file,
)


@pytest.fixture
def manifest() -> StudentManifest:
    return StudentManifest(
        environment="yard",
        version=3,
        parent=2,
        profile="lite0-128",
        preprocess=Preprocess(128, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear"),
        confidence=Confidence(0.05),
        embedding_dim=1280,
        foundation_model="synclip",
        pool_version="0123456789abcdef",
        samples=1600,
        agreement=0.87,
        parent_agreement=None,
        method="ridge",
        precision="float",
        calibration=Calibration(margins=[0.1, 1 / 3], agreements=[True, False], propensities=[1.0, 0.02]),
        files=[BlobRef.of("student.onnx", b"graph"), BlobRef.of("head.fp16.bin", b"")],
        created_at="2026-01-01T00:00:00Z",
    )


def test_a_manifest_survives_the_wire(manifest):
    for text in (manifest.to_json(), manifest.to_json().encode()):
        read = StudentManifest.from_json(text)
        assert read == manifest
        assert isinstance(read.preprocess, Preprocess) and read.preprocess.std == (0.2, 0.3, 0.4)
        assert read.calibration.margins[1] == 1 / 3
        assert read.to_json() == manifest.to_json()


def test_a_newer_format_asks_for_an_upgrade(manifest):
    fields = json.loads(manifest.to_json())
    newer = fields | {"format": MANIFEST_FORMAT + 1}
    for changed in (newer, newer | {"something_new": 1}, {"format": MANIFEST_FORMAT + 1}):
        with pytest.raises(ModelError, match=rf"format {MANIFEST_FORMAT + 1}, .* reads {MANIFEST_FORMAT}: upgrade"):
            StudentManifest.from_json(json.dumps(changed))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"version": -1}, "version"),
        ({"version": "three"}, "version"),
        ({"samples": None}, "samples"),
        ({"surprise": 1}, "surprise"),
        ({"confidence": {"temperature": 1e-300, "share": 0.3}}, "confidence.temperature"),
        ({"preprocess": {"size": 128, "interpolation": "nearest"}}, "preprocess.interpolation"),
        ({"calibration": {"margins": [0.1], "agreements": [], "propensities": []}}, "calibration: .*differ in length"),
        ({"files": [{"name": "a", "sha256": "0" * 63, "size_bytes": 1}]}, "files.0.sha256"),
        ({"files": [{"name": "a", "sha256": "0" * 64, "size_bytes": -1}]}, "files.0.size_bytes"),
        ({"files": [{"name": "../a", "sha256": "0" * 64, "size_bytes": 1}]}, "files.0.name"),
        ({"files": [{"name": "..", "sha256": "0" * 64, "size_bytes": 1}]}, "files.0.name"),
        ({"files": [{"name": "a/b", "sha256": "0" * 64, "size_bytes": 1}]}, "files.0.name"),
        ({"files": [{"name": "a\n", "sha256": "0" * 64, "size_bytes": 1}]}, "files.0.name"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(manifest, change, where):
    with pytest.raises(ModelError, match=f"not a student manifest: {where}"):
        StudentManifest.from_json(json.dumps(json.loads(manifest.to_json()) | change))


def test_every_field_is_needed(manifest):
    fields = json.loads(manifest.to_json())
    for name in fields.keys() - {"format"}:
        with pytest.raises(ModelError, match=name):
            StudentManifest.from_json(json.dumps({key: value for key, value in fields.items() if key != name}))


def test_damaged_json_is_no_manifest(manifest):
    text = manifest.to_json()
    for damaged in (text[: len(text) // 2], "", "[]", "null", '"format"', b"\xff\xfe", b"PK\x03\x04"):
        with pytest.raises(ModelError, match="not a student manifest"):
            StudentManifest.from_json(damaged)


def test_a_file_is_verified_by_size_and_content(tmp_path):
    path, content = tmp_path / "head.fp16.bin", bytes(range(256))
    ref = BlobRef.of("head.fp16.bin", content)
    assert ref.sha256 == sha256_hex(content) and ref.size_bytes == 256
    path.write_bytes(content)
    verify_file(path, ref)
    for damaged in (content[:-1], content[:-1] + b"x", content + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=rf"head\.fp16\.bin is damaged: {len(damaged)} bytes"):
            verify_file(path, ref)
    path.unlink()
    with pytest.raises(ModelError, match="No such file"):
        verify_file(path, ref)


def test_rounding_to_fp16_is_what_the_file_holds():
    weights = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    rounded = quantise_fp16(weights)
    assert rounded.dtype == np.float32 and np.array_equal(quantise_fp16(rounded), rounded)
    assert np.array_equal(np.frombuffer(rounded.astype("<f2").tobytes(), "<f2").astype(np.float32), rounded)
    assert 0 < np.abs(rounded - weights).max() < 2e-3


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2**32},  # the wire has no room for it
        {"temperature": float("inf")},
        {"files": [{"name": "x", "sha256": "0" * 64, "size_bytes": 10**12}]},
        {"files": [{"name": "x", "sha256": "0" * 64, "size_bytes": 1}] * 17},
        {"calibration": {"margins": [0.1], "agreements": [1.0], "propensities": [0.0]}},
        {"calibration": {"margins": [float("nan")], "agreements": [1.0], "propensities": [1.0]}},
    ],
)
def test_what_no_version_can_be_is_no_manifest(manifest, change):
    with pytest.raises(ModelError, match="not a student manifest"):
        StudentManifest.from_json(json.dumps(json.loads(manifest.to_json()) | change))


def test_json_without_a_bottom_is_no_manifest():
    with pytest.raises(ModelError, match="not a student manifest"):
        StudentManifest.from_json("[" * 100_000)
