"""Views of a sample as the same camera might have taken it a moment later: other framing, other exposure, other focus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from ..models.images import Preprocess
from ..models.runtime import OnnxModel
from .ahead import ahead


def camera_view(image: Image.Image, seed: int) -> Image.Image:
    """One view; equal arguments give equal pixels.

    Pan and zoom keep at least three quarters of each side; the exposure changes by up to a third; focus and motion blur
    stay under half a pixel of a 64-pixel frame. Noise and compression are in the sample already.
    """
    rng = np.random.default_rng(seed)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    width, height = image.size
    zoom = rng.uniform(0.75, 1.0)
    crop_width, crop_height = max(round(zoom * width), 1), max(round(zoom * height), 1)
    left, top = int(rng.integers(width - crop_width + 1)), int(rng.integers(height - crop_height + 1))
    image = image.crop((left, top, left + crop_width, top + crop_height))
    image = ImageEnhance.Brightness(image).enhance(float(np.exp2(rng.uniform(-0.4, 0.4))))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.5) * min(image.size) / 64))


def trunk_views(
    trunk: OnnxModel, preprocess: Preprocess, images: Sequence[Image.Image], seeds: Sequence[int], views: int
) -> np.ndarray:
    """(B, views, C, h, w) float16 trunk activations of B images; the first view is the image itself."""

    def prepared() -> Iterator[np.ndarray]:
        yield preprocess.batch(images)
        for view in range(1, views):
            yield preprocess.batch([camera_view(image, seed + view) for image, seed in zip(images, seeds, strict=True)])

    return np.stack([trunk(batch) for batch in ahead(prepared())], axis=1).astype(np.float16)
