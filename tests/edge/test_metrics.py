"""A device's metrics, scraped over a real socket."""

from __future__ import annotations

import json
import math
import socket
import urllib.request
from pathlib import Path

import pytest
from edgefm.edge.agent import Summary
from edgefm.edge.metrics import AgentMetrics
from edgefm.edge.records import Answer, Route
from edgefm.edge.sinks import JsonLines
from edgefm.models.errors import ConfigError
from prometheus_client.parser import text_string_to_metric_families


def answer(route: Route, reason: str, total_ms: float, threshold: float | None = 0.25, sent: int = 0) -> Answer:
    return Answer(
        sample_id="s",
        environment="yard",
        label="cat",
        similarity=0.9,
        margin=0.3,
        route=route,
        reason=reason,
        edge_label="cat",
        edge_margin=0.3,
        threshold=threshold,
        decode_ms=1.0,
        preprocess_ms=1.0,
        student_ms=2.0,
        transit_ms=0.0,
        queue_ms=0.0,
        compute_ms=0.0,
        total_ms=total_ms,
        predicted_ms=total_ms,
        bytes_sent=sent,
        student_version=3,
        pool_version="p",
        bandwidth_mbps=2.5,
        time_s=1.0,
        samples_labelled=7,
    )


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """By name and the values of its labels, in the order of the labels' names."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_answers_and_the_summary_are_scraped(tmp_path: Path):
    summary = Summary(frames=10, swaps=2, uploads_left=4, refused=["student 5: slow"])
    metrics = AgentMetrics(lambda: summary)
    file = JsonLines(tmp_path / "answers.jsonl")
    sink = metrics.observe(file)
    with metrics.serve("127.0.0.1", 0) as port:
        assert math.isfinite(scrape(port)["edgefm_agent_frames_total",])  # also before the first answer
        for _ in range(3):
            sink(answer("edge", "margin", 4.0))
        sink(answer("cloud", "audit", 120.0, sent=900))
        sink(answer("fallback", "deadline", 1000.0, threshold=None, sent=1100))
        summary.frames = 11
        found = scrape(port)
    file.close()
    assert found["edgefm_agent_answers_total", "margin", "edge"] == 3
    assert found["edgefm_agent_answers_total", "audit", "cloud"] == 1
    assert found["edgefm_agent_answers_total", "deadline", "fallback"] == 1
    assert found["edgefm_agent_answer_seconds_sum", "cloud"] == pytest.approx(0.12)
    assert found["edgefm_agent_answer_seconds_bucket", "0.005", "edge"] == 3
    assert found["edgefm_agent_query_bytes_total",] == 2000
    assert math.isnan(found["edgefm_agent_threshold",])
    assert found["edgefm_agent_bandwidth_bits_per_second",] == 2.5e6
    assert found["edgefm_agent_student_version",] == 3
    assert (found["edgefm_agent_frames_total",], found["edgefm_agent_swaps_total",]) == (11, 2)
    assert (found["edgefm_agent_refused_total",], found["edgefm_agent_spool_samples",]) == (1, 4)
    # Every answer went on to the file.
    assert [json.loads(line)["route"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == [
        *["edge"] * 3,
        "cloud",
        "fallback",
    ]


def test_a_taken_address_is_named():
    metrics = AgentMetrics(Summary)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"cannot serve metrics on 127.0.0.1:{port}"),
            metrics.serve("127.0.0.1", port),
        ):
            pass


def test_a_port_that_is_none_is_named():
    with (
        pytest.raises(ConfigError, match=r"cannot serve metrics on 127\.0\.0\.1:65536: .*65535"),
        AgentMetrics(Summary).serve("127.0.0.1", 65536),
    ):
        pass
