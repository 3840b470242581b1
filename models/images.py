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

MAX_ELONGATION = 16
"""A longer strip is cropped to this ratio of its sides before it is scaled: only its centre is kept anyway, and a PNG of
1 x 200,000 pixels (1 kB) would grow to gigabytes."""

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


def decode_image(data: bytes) -> Image.Image:
    """Decodes JPEG, PNG, WebP or BMP to an upright RGB image.

    Raises:
        ImageError: empty, truncated, of another format, or of more than `MAX_PIXELS` pixels.
    """
    if not data:
        raise ImageError("the image is empty (0 bytes)", "empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageError(
                f"the image claims {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded", "too-many-pixels"
            )
        return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # PIL's own, higher limit
        message = f"the image claims too many pixels, at most {MAX_PIXELS:,} are decoded: {error}"
        raise ImageError(message, "too-many-pixels") from None
    except UnidentifiedImageError:
        raise ImageError(f"not a {', '.join(_FORMATS)} image ({len(data)} bytes)", "not-an-image") from None
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        message = f"the image is damaged ({len(data)} bytes): {error}"
        raise ImageError(message, "truncated" if _ends_early(data, error) else "damaged") from error


def _ends_early(data: bytes, error: Exception) -> bool:
    short_webp = data[:4] == b"RIFF" and len(data) < 8 + int.from_bytes(data[4:8], "little")  # PIL does not tell
    return short_webp or isinstance(error, EOFError) or "truncated" in str(error).lower()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion clips at 255 and leaves white
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    image.info.pop("transparency", None)  # RGB has none; PIL warns of what a palette loses
    return image.convert("RGB")


def encode_jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _crop_centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


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
            short = min(width, height)
            if max(width, height) > MAX_ELONGATION * short:
                width, height = min(width, MAX_ELONGATION * short), min(height, MAX_ELONGATION * short)
                image = _crop_centre(image, width, height)
            # Truncation and rounding are torchvision's, so that a checkpoint sees what it was trained on.
            target = (int(self.size * width / short), int(self.size * height / short))
            image = image.resize(target, _RESAMPLING[self.interpolation])
            if target != (self.size, self.size):
                image = _crop_centre(image, self.size, self.size)
        # Two passes instead of three, (x / 255 - mean) / std = x * gain + offset, and over planes: a channel that lies in one
        # piece takes a quarter of the time of one among three.
        std = np.asarray(self.std, np.float32)[:, None, None]
        gain = np.float32(1 / 255) / std
        offset = -np.asarray(self.mean, np.float32)[:, None, None] / std
        pixels = np.ascontiguousarray(np.asarray(image, np.uint8).transpose(2, 0, 1)) * gain
        pixels += offset
        return pixels

    def batch(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Returns (B, 3, size, size) float32."""
        return np.stack([self(image) for image in images])
