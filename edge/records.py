"""One record for each answered sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

Route = Literal["edge", "cloud", "fallback"]


@dataclass(frozen=True)
class Answer:
    """What the system says of one sample. Times in ms, sizes in bytes.

    Attributes:
        sample_id: the source's name for the frame.
        environment: where the device stands.
        label: of the pool, or "unknown".
        similarity, margin: of the model that answered.
        route: `edge`; `cloud`; `fallback`: the FM was wanted, and the edge's own answer is given.
        reason: why it took that route, see `edgefm.edge.switcher.Decision`; `deadline` or `cloud-error` for a query
            that was sent in vain; `too-large` for an image that no query takes.
        edge_label, edge_margin: the student's own.
        threshold: in force at the decision; None during a cold start; infinite thresholds are written as null too.
        decode_ms, preprocess_ms, student_ms: on the device.
        transit_ms, queue_ms, compute_ms: link, cloud queue, cloud compute; 0 without a query.
        total_ms: from the frame's arrival at the agent to the answer.
        predicted_ms: what the switcher predicted for `total_ms`.
        bytes_sent: the encoded image, if it was sent.
        student_version, pool_version: on the device when the frame came.
        bandwidth_mbps: as estimated when the answer was given.
        time_s: of the answer, since the agent began.
        samples_labelled: of this environment in the cloud, as last heard.
    """

    sample_id: str
    environment: str
    label: str
    similarity: float
    margin: float
    route: Route
    reason: str
    edge_label: str
    edge_margin: float
    threshold: float | None
    decode_ms: float
    preprocess_ms: float
    student_ms: float
    transit_ms: float
    queue_ms: float
    compute_ms: float
    total_ms: float
    predicted_ms: float
    bytes_sent: int
    student_version: int
    pool_version: str
    bandwidth_mbps: float
    time_s: float
    samples_labelled: int

    def to_json(self) -> bytes:
        """One line of UTF-8, without its end."""
        return _ANSWER.dump_json(self)


_ANSWER = TypeAdapter(Answer)

Sink = Callable[[Answer], None]
"""Where answers go: any callable, `list.append` for instance. It is called under the agent's lock and must not wait;
what it raises ends the run."""


def answer_schema() -> dict[str, Any]:
    """JSON Schema of one record."""
    schema = _ANSWER.json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "additionalProperties": False}
