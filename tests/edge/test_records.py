from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from edgefm.edge.records import Answer, answer_schema
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parents[2]

# What users' programs read: a change here is a change of the contract.
KEYS = [
    *("sample_id", "environment", "label", "similarity", "margin", "route", "reason", "edge_label", "edge_margin"),
    *("threshold", "decode_ms", "preprocess_ms", "student_ms", "transit_ms", "queue_ms", "compute_ms", "total_ms"),
    *("predicted_ms", "bytes_sent", "student_version", "pool_version", "bandwidth_mbps", "time_s", "samples_labelled"),
]


def test_the_keys_are_these_and_documented(answer):
    written = json.loads(answer.to_json())
    assert list(written) == KEYS
    documented = (Answer.__doc__ or "").split("Attributes:")[1]
    names = {name.strip() for line in documented.splitlines() if ":" in line for name in line.split(":")[0].split(",")}
    assert not {field.name for field in fields(Answer)} - names


def test_values_survive_on_one_line(answer):
    line = answer.to_json()
    assert b"\n" not in line and "café" in line.decode()
    assert json.loads(line) == asdict(answer)


def test_the_page_of_the_record_explains_every_field():
    page = (ROOT / "deploy" / "docs" / "answers.md").read_text("utf-8").partition("\n## Answers\n")[2]
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == KEYS


@pytest.mark.parametrize("threshold", [None, math.inf, 0.25])
@pytest.mark.parametrize("route", ["edge", "cloud", "fallback"])
def test_records_satisfy_their_schema(answer, threshold, route):
    schema = answer_schema()
    Draft202012Validator.check_schema(schema)
    assert list(schema["properties"]) == schema["required"] == KEYS
    Draft202012Validator(schema).validate(json.loads(replace(answer, threshold=threshold, route=route).to_json()))


@pytest.mark.parametrize(
    "change", [{"route": "sky"}, {"margin": None}, {"threshold": "none"}, {"bytes_sent": 1.5}, {"truth": "cat"}]
)
def test_what_is_no_record_fails_the_schema(answer, change):
    record = json.loads(answer.to_json()) | change
    assert not Draft202012Validator(answer_schema()).is_valid(record)


@pytest.mark.parametrize("threshold", [None, math.inf])
def test_no_threshold_and_an_infinite_one_are_null(answer, threshold):
    written = json.loads(replace(answer, threshold=threshold).to_json(), parse_constant=pytest.fail)
    assert written["threshold"] is None
