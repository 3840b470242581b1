"""From encoded bytes to a model's input: one implementation for device, cloud and training."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import ImageError

MAX_PIXELS = 50_000_000
"""A header that claims more is refused before anything is decompressed (a bomb of 1 kB can claim gigabytes)."""

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


def decode_image(data: bytes) -> Image.Image:
    """Decodes JPEG, PNG, WebP or BMP to an upright RGB image.

    Raises:
        ImageError: empty, truncated, of another format, or of more than `MAX_PIXELS` pixels.
    """
    if not data:
        raise ImageError("the image is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageError(f"the image claims {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")
        return ImageOps.exif_transpose(image).convert("RGB")
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not a {', '.join(_FORMATS)} image ({len(data)} bytes)") from None
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageError(f"the image is damaged ({len(data)} bytes): {error}") from error


def encode_jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side to `size`, crop the centre, scale to [0, 1], subtract `mean`, divide by `std`."""

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Returns (3, size, size) float32."""
        if image.mode != "RGB":
            image = image.convert("RGB")
        width, height = image.size
        if (width, height) != (self.size, self.size):
            # Truncation and rounding are torchvision's, so that a checkpoint sees what it was trained on.
            short = min(width, height)
            target = (int(self.size * width / short), int(self.size * height / short))
            image = image.resize(target, _RESAMPLING[self.interpolation])
            left, top = round((target[0] - self.size) / 2), round((target[1] - self.size) / 2)
            if target != (self.size, self.size):
                image = image.crop((left, top, left + self.size, top + self.size))
        # One multiply-add instead of three passes: (x / 255 - mean) / std = x * gain + offset.
        std = np.asarray(self.std, np.float32)
        gain = np.float32(1 / 255) / std
        offset = -np.asarray(self.mean, np.float32) / std
        pixels = np.asarray(image, np.uint8) * gain + offset  # (H, W, 3) float32
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def batch(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Returns (B, 3, size, size) float32."""
        return np.stack([self(image) for image in images])
