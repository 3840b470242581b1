"""What the speed benchmarks send: crops of real photographs, so that JPEG and its decoder have real work."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ...models.images import encode_jpeg
from ..camera import PHOTOGRAPHS

LABELS = tuple(photograph.label for photograph in PHOTOGRAPHS)
_QUALITY = 90


def pictures(width: int, height: int, count: int, seed: int) -> list[bytes]:
    """JPEG files of so many pixels, photograph after photograph; equal arguments give equal bytes."""
    rng = np.random.default_rng(seed)
    photographs = [photograph.load() for photograph in PHOTOGRAPHS]
    return [encode_jpeg(_crop(photographs[i % len(photographs)], width, height, rng), _QUALITY) for i in range(count)]


def _crop(photograph: Image.Image, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """A part of 50 to 100 % of what fits, anywhere in the photograph."""
    scale = min(photograph.width / width, photograph.height / height) * rng.uniform(0.5, 1.0)
    left, top = rng.uniform(0, photograph.width - scale * width), rng.uniform(0, photograph.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    return photograph.resize((width, height), Image.Resampling.BICUBIC, box)
