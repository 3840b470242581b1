"""`edgefm students export`: the students' graphs in a folder that a device is given. Needs the extra `cloud`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..models.cache import write_atomic
from ..models.foundation import FoundationModel
from ..models.student_graph import student_files, version0_head
from ..models.students import student_profile


def export_students(folder: Path, model: FoundationModel, names: Sequence[str], tell: Callable[[str], None]) -> None:
    """Writes version 0 of the students, without an environment: `folder/<student>/student.onnx` and its weights.

    Args:
        tell: hears the name of the one that is next.

    Raises:
        ConfigError: there is no such student. StoreError: the disk refused.
    """
    for profile in [student_profile(name) for name in names]:
        tell(profile.name)
        for name, data in student_files(profile, version0_head(profile, model)).items():
            write_atomic(folder / profile.name / name, data)
