"""What an operator is told of an environment."""

from __future__ import annotations

from collections.abc import Iterable

from ..proto.v1 import edgefm_pb2 as pb
from .drift import Agreement
from .environments import Environments
from .store import Usage


def environment_status(
    environments: Environments, name: str, refusals: Iterable[pb.ReportedRefusal]
) -> pb.EnvironmentStatus:
    """Raises `InputError` for an environment that no device has registered."""
    student, (pool, _) = environments.student(name), environments.pool(name)
    usage = environments.store.usage.get(name, Usage())
    status = pb.EnvironmentStatus(
        environment=name,
        student_profile=student.profile,
        student_version=student.version,
        versions=len(environments.registry.versions(name)),
        pool_version=pool.version,
        labels=len(pool.labels),
        samples_labelled=environments.samples_labelled(name),
        samples_stored=usage.samples,
        stored_bytes=usage.size_bytes,
        learning=environments.trainer.learning == name,
        alarms=[
            pb.DriftAlarm(
                kind=alarm.kind,
                student_version=alarm.student_version,
                statistic=alarm.statistic,
                limit=alarm.limit,
                agreement=_agreement(alarm.agreement),
                since_unix_s=alarm.since,
            )
            for alarm in environments.drift.alarms(name)
        ],
        refusals=refusals,
    )
    agreement, baseline = environments.drift.agreement(name), environments.drift.baseline(name)
    if agreement is not None:
        status.agreement.CopyFrom(_agreement(agreement))
    if baseline is not None:
        status.baseline.CopyFrom(_agreement(baseline))
    return status


def _agreement(agreement: Agreement) -> pb.Agreement:
    return pb.Agreement(share=agreement.share, standard_error=agreement.standard_error, samples=agreement.samples)
