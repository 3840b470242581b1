"""Conditions a camera works under, put on clean images: night, blur, sensor noise, strong compression. Seeded."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from ..models.images import encode_jpeg

CONDITIONS = ("clean", "night", "blur", "noise", "jpeg20")
_QUALITY = 90


def under(condition: str, image: Image.Image, seed: int) -> bytes:
    """The image as a JPEG that a camera under this condition would have sent.

    `night`: 30 % of the light, shot noise and read noise. `blur`: Gaussian, 1.2 pixels for each 64 of the shorter side.
    `noise`: Gaussian, 25 levels of 255. `jpeg20`: quality 20 instead of 90.

    Raises:
        ValueError: there is no such condition.
    """
    if condition == "clean":
        return encode_jpeg(image, _QUALITY)
    if condition == "jpeg20":
        return encode_jpeg(image, 20)
    if condition == "blur":
        return encode_jpeg(image.filter(ImageFilter.GaussianBlur(1.2 * min(image.size) / 64)), _QUALITY)
    rng, pixels = np.random.default_rng(seed), np.asarray(image, np.float32)
    if condition == "night":
        pixels = 0.3 * pixels
        pixels = pixels + rng.normal(size=pixels.shape) * np.sqrt(0.35 * pixels + 6.0)
    elif condition == "noise":
        pixels = pixels + rng.normal(0.0, 25.0, pixels.shape)
    else:
        raise ValueError(f"unknown condition {condition!r}; there are {', '.join(CONDITIONS)}")
    return encode_jpeg(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), _QUALITY)
