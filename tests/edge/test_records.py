from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
from edgefm.edge.records import Answer, JsonLines
from edgefm.models.errors import StoreError

# What users' programs read: a change here is a change of the contract.
KEYS = [
    *("sample_id", "environment", "label", "similarity", "margin", "route", "reason", "edge_label", "edge_margin"),
    *("threshold", "decode_ms", "preprocess_ms", "student_ms", "transit_ms", "queue_ms", "compute_ms", "total_ms"),
    *("predicted_ms", "bytes_sent", "student_version", "pool_version", "bandwidth_mbps", "time_s", "samples_labelled"),
]

ANSWER = Answer(
    sample_id="a/ü.jpg",
    environment="yard",
    label="café",
    similarity=0.123456789,
    margin=0.05,
    route="cloud",
    reason="margin",
    edge_label="tea",
    edge_margin=0.01,
    threshold=0.2,
    decode_ms=1.0,
    preprocess_ms=2.0,
    student_ms=3.0,
    transit_ms=40.0,
    queue_ms=5.0,
    compute_ms=6.0,
    total_ms=57.0,
    predicted_ms=60.0,
    bytes_sent=4321,
    student_version=3,
    pool_version="0123456789abcdef",
    bandwidth_mbps=4.5,
    time_s=12.25,
    samples_labelled=77,
)


def test_the_keys_are_these_and_documented():
    written = json.loads(ANSWER.to_json())
    assert list(written) == KEYS
    documented = (Answer.__doc__ or "").split("Attributes:")[1]
    names = {name.strip() for line in documented.splitlines() if ":" in line for name in line.split(":")[0].split(",")}
    assert not {field.name for field in fields(Answer)} - names


def test_values_survive_and_numbers_are_short():
    line = ANSWER.to_json()
    assert "\n" not in line and "café" in line and '"similarity": 0.123457' in line
    written = json.loads(line)
    assert written.pop("similarity") == pytest.approx(ANSWER.similarity, abs=1e-6)
    assert all(getattr(ANSWER, key) == value for key, value in written.items())


@pytest.mark.parametrize("threshold", [None, math.inf])
def test_no_threshold_and_an_infinite_one_are_null(threshold):
    written = json.loads(replace(ANSWER, threshold=threshold).to_json(), parse_constant=pytest.fail)
    assert written["threshold"] is None


def test_lines_are_there_at_once_and_appended(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    for number in range(2):
        sink = JsonLines(path)
        sink(replace(ANSWER, sample_id=str(number)))
        assert [json.loads(line)["sample_id"] for line in path.read_text("utf-8").splitlines()] == ["0", "1"][
            : number + 1
        ]
        sink.close()


def test_a_folder_in_the_way(tmp_path):
    with pytest.raises(StoreError, match=f"cannot write answers to {tmp_path}: Is a directory"):
        JsonLines(tmp_path)


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write answers to"):
        JsonLines(tmp_path / "file" / "answers.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk():
    sink = JsonLines(Path("/dev/full"))
    with pytest.raises(StoreError, match="No space left"):
        sink(ANSWER)
    with pytest.raises(StoreError, match="No space left"):
        sink.close()
