"""Labelled validation images of the shared data, read once."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from edgefm.models.images import decode_image
from PIL import Image


@pytest.fixture(scope="session")
def validation(shared_data: Path) -> Callable[[str], tuple[list[Image.Image], np.ndarray]]:
    """Name of an environment -> its `val` images and the names of their folders."""

    @cache
    def read(name: str) -> tuple[list[Image.Image], np.ndarray]:
        images, truth = [], []
        with tarfile.open(shared_data / f"tiny-imagenet-{name}.tar") as tar:
            for member in tar:
                parts = Path(member.name).parts
                if member.isfile() and parts[0] == "val" and (file := tar.extractfile(member)):
                    images.append(decode_image(file.read()))
                    truth.append(parts[1])
        assert len(set(truth)) == 20
        return images, np.array(truth)

    return read


@pytest.fixture(scope="session")
def kernels() -> None:
    """The C++ kernels, built; skips where there is no compiler."""
    from edgefm.models.attention import cpu
    from edgefm.models.errors import KernelError
    from edgefm.models.language import products, step

    try:
        cpu.library(), products.library(), step.library()
    except KernelError as error:
        pytest.skip(str(error))
