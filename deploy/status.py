"""`edgefm status`: what the cloud says of itself, as lines."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone

from google.protobuf.json_format import MessageToJson

from ..proto.v1 import edgefm_pb2 as pb
from .logs import plain


def lines(status: pb.StatusResponse, as_json: bool) -> Iterator[str]:
    if as_json:
        yield MessageToJson(status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        return
    yield f"cloud: {status.foundation_model}, waiting: {status.queue_live} queries, {status.queue_bulk} uploads"
    for part, reason in sorted(status.unhealthy.items()):
        yield f"  unhealthy: {part}: {plain(reason)}"
    if not status.environments:
        yield "no environment yet"
    for environment in status.environments:
        yield from _environment(environment)


def _environment(environment: pb.EnvironmentStatus) -> Iterator[str]:
    learning = ", learning now" if environment.learning else ""
    yield (
        f"{environment.environment}: student {environment.student_profile} version {environment.student_version} "
        f"of {environment.versions}{learning}; {environment.labels} labels, pool {environment.pool_version}"
    )
    yield (
        f"  samples: {environment.samples_labelled} labelled, {environment.samples_stored} stored "
        f"({environment.stored_bytes / 1e6:.1f} MB)"
    )
    agreement = _agreement(environment.agreement) if environment.HasField("agreement") else "not known yet"
    baseline = f", at first {_agreement(environment.baseline)}" if environment.HasField("baseline") else ""
    yield f"  agreement with the FM: {agreement}{baseline}"
    for alarm in environment.alarms:
        since = datetime.fromtimestamp(alarm.since_unix_s, timezone.utc).isoformat(timespec="seconds")
        yield (
            f"  drift: {alarm.kind} since {since}: statistic {alarm.statistic:.3g}, limit {alarm.limit:.3g}, "
            f"agreement {_agreement(alarm.agreement)}"
        )
    for reported in environment.refusals:
        refusal = reported.refusal
        is_student = refusal.WhichOneof("what") == "student_version"
        what = f"student {refusal.student_version}" if is_student else f"pool {plain(refusal.pool_version)}"
        known = (
            refusal.kind if refusal.kind in pb.Refusal.Kind.values() else pb.Refusal.KIND_UNSPECIFIED
        )  # a newer device's
        kind = pb.Refusal.Kind.Name(known).removeprefix("KIND_").lower().replace("_", " ")
        yield f"  refused by {plain(reported.device_id)}: {what}, {kind}: {plain(refusal.reason)}"


def _agreement(agreement: pb.Agreement) -> str:
    return f"{agreement.share:.3f} ± {agreement.standard_error:.3f} ({agreement.samples} samples)"
