"""The student that has seen no sample: an environment's first version."""

from __future__ import annotations

from ..models.confidence import Confidence
from ..models.foundation import FoundationModel
from ..models.student_graph import VERSION0_TEMPERATURE, student_files, version0_head
from ..models.students import student_profile
from ..models.versions import Calibration, StudentManifest
from .registry import Registry
from .trainer import utc_now


def publish_version0(
    registry: Registry, model: FoundationModel, environment: str, profile_name: str, pool_version: str
) -> StudentManifest:
    profile = student_profile(profile_name)
    manifest = StudentManifest(
        environment=environment,
        version=0,
        parent=None,
        profile=profile.name,
        preprocess=profile.preprocess,
        embedding_dim=model.dim,
        confidence=Confidence(VERSION0_TEMPERATURE * model.temperature),
        foundation_model=model.name,
        pool_version=pool_version,
        samples=0,
        agreement=None,
        parent_agreement=None,
        method="classifier-ridge",
        precision="float",
        calibration=Calibration(),
        files=[],
        created_at=utc_now(),
    )
    return registry.publish(manifest, student_files(profile, version0_head(profile, model)))
