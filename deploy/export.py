"""`edgefm students export`: the students' graphs in a folder that a device is given. Needs the extra `cloud`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..models.cache import write_atomic
from ..models.foundation import FoundationModel
from ..models.student_graph import int8_files, student_files, version0_head
from ..models.students import StudentProfile, student_profile

_BATCH, _BATCHES = 8, 4


def export_students(folder: Path, model: FoundationModel, names: Sequence[str], tell: Callable[[str], None]) -> None:
    """Writes the students as no sample has changed them: `folder/<student>/student.onnx` and its weights.

    A quantised one is calibrated on made-up pictures, for want of an environment: it is for measuring what it costs.

    Args:
        tell: hears the name of the one that is next.

    Raises:
        ConfigError: there is no such student. StoreError: the disk refused.
    """
    for profile in [student_profile(name) for name in names]:
        tell(profile.name)
        head = version0_head(profile, model)
        files = int8_files(profile, head, None, _pictures(profile)) if profile.int8 else student_files(profile, head)
        for name, data in files.items():
            write_atomic(folder / profile.name / name, data)


def _pictures(profile: StudentProfile) -> Iterator[np.ndarray]:
    rng, size = np.random.default_rng(0), (profile.input_size, profile.input_size)
    for _ in range(_BATCHES):
        blocks = rng.integers(0, 256, (_BATCH, 8, 8, 3), dtype=np.uint8)
        yield profile.preprocess.batch([Image.fromarray(b).resize(size, Image.Resampling.BICUBIC) for b in blocks])
