"""Fits the feature means that ship with the code: `python -m edgefm.models.fit_means $DATA/tiny-imagenet-world.tar`.

The images are of a world that none of the evaluated environments shares; they give a mean and nothing else.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np

from .backbone_graphs import feature_graph
from .foundation.synclip import BACKBONE, INPUT_SIZES
from .images import Preprocess, decode_image
from .runtime import OnnxModel
from .students import PROFILES

EVERY = 4
"""Every fourth image: 4,000 of 16,000 settle a mean."""


def fit(archive: Path, out: Path) -> None:
    with tarfile.open(archive) as tar:
        members = [m for m in tar if m.isfile() and m.name.startswith("train/")][::EVERY]
        images = [decode_image(file.read()) for m in members if (file := tar.extractfile(m))]
    towers = {(BACKBONE, size) for size in INPUT_SIZES} | {(p.backbone, p.input_size) for p in PROFILES.values()}
    means = {}
    for backbone, size in sorted(towers):
        model, preprocess = OnnxModel(feature_graph(backbone, size)), Preprocess(size)
        parts = [model(preprocess.batch(images[i : i + 64])) for i in range(0, len(images), 64)]
        means[f"{backbone}-{size}"] = np.concatenate(parts).mean(axis=0).astype("<f4")
        print(f"{backbone}-{size}: mean of {len(images)} images")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **means)
    out.write_bytes(buffer.getvalue())


if __name__ == "__main__":
    fit(Path(sys.argv[1]), Path(__file__).parent / "foundation" / "feature_means.npz")
