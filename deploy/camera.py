"""The demo's default images: a simulated camera that walks over photographs carried by installed packages.

The photographs are those of the scikit-image and scikit-learn wheels that the embedded FM knows in the camera's crops.
The camera stays at one for a few frames, pans and zooms, drifts in exposure, and adds noise and blur; every frame
follows from the seed, byte for byte.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from ..models.errors import InputError, MissingExtraError
from ..models.images import encode_jpeg

FRAME_SIZE = 128
"""Side of a frame in pixels: what the default student sees, and a payload of a few kB."""
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Photograph:
    """A photograph in an installed package, and what it shows."""

    label: str
    package: str
    file: str

    def load(self) -> Image.Image:
        """Raises `MissingExtraError` without the package, `InputError` when the package has no such file."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            raise MissingExtraError(f"the demo's photographs come with {self.package}: pip install 'edgefm[demo]'")
        path = Path(spec.origin).parent / self.file
        try:
            return Image.open(path).convert("RGB")
        except OSError as error:
            raise InputError(f"{self.package} carries no readable {self.file}; give the demo --data instead") from error


# Chosen by measurement: of the wheels' photographs, those whose crops the embedded FM names. "camera tripod" is the
# photographer, whom ImageNet's classes do not know; astronaut, horse, galaxy, brick wall and gravel it does not recognise.
PHOTOGRAPHS = (
    Photograph("cat", "skimage", "data/chelsea.png"),
    Photograph("cup of coffee", "skimage", "data/coffee.png"),
    Photograph("rocket", "skimage", "data/rocket.jpg"),
    Photograph("motorcycle", "skimage", "data/motorcycle_left.png"),
    Photograph("camera tripod", "skimage", "data/camera.png"),
    Photograph("page of text", "skimage", "data/page.png"),
    Photograph("coins", "skimage", "data/coins.png"),
    Photograph("temple", "sklearn", "datasets/images/china.jpg"),
    Photograph("flower", "sklearn", "datasets/images/flower.jpg"),
)


UNSEEN_BY_DAY = ("coins", "page of text", "rocket")


@dataclass(frozen=True)
class Look:
    """What stands before the camera, and what the light and the sensor do to a frame.

    Attributes:
        photographs: in view.
        gain: range of the exposure's factor.
        noise: standard deviation of the sensor noise, in levels of 255.
        blur: largest length of the motion blur, in pixels.
    """

    photographs: tuple[Photograph, ...]
    gain: tuple[float, float]
    noise: float
    blur: float


DAY = Look(PHOTOGRAPHS, gain=(0.8, 1.15), noise=4.0, blur=0.6)
NIGHT = Look(PHOTOGRAPHS, gain=(0.25, 0.45), noise=10.0, blur=1.4)


@dataclass(frozen=True)
class CameraFrame:
    image_bytes: bytes
    label: str


def walk(look: Look, seed: int, frames: int) -> Iterator[CameraFrame]:
    """Yields `frames` JPEG frames of `FRAME_SIZE` pixels; equal arguments give equal bytes."""
    rng = np.random.default_rng(seed)
    shown = 0
    while shown < frames:
        for position in rng.permutation(len(look.photographs)):
            photograph = look.photographs[position]
            for image in _visit(_photo(photograph), look, rng):
                if shown == frames:
                    return
                shown += 1
                yield CameraFrame(encode_jpeg(image, JPEG_QUALITY), photograph.label)


@cache
def _photo(photograph: Photograph) -> Image.Image:
    """At a size where a crop is at most twice the frame: resizing it is fast."""
    image = photograph.load()
    scale = 2.5 * FRAME_SIZE / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _visit(photo: Image.Image, look: Look, rng: np.random.Generator) -> Iterator[Image.Image]:
    flip = rng.random() < 0.5
    centre, zoom = rng.uniform(0.35, 0.65, 2), rng.uniform(0.5, 0.95)
    pan, gain = rng.normal(0, 0.01, 2), rng.uniform(*look.gain)
    for _ in range(rng.integers(4, 12)):
        centre = np.clip(centre + pan + rng.normal(0, 0.008, 2), 0.3, 0.7)
        zoom = float(np.clip(zoom * rng.uniform(0.96, 1.04), 0.45, 1.0))
        side = zoom * min(photo.size)
        left, top = (np.array(photo.size) - side) * centre
        tilt = rng.normal(0, 0.04) * side
        # The corners of a slightly tilted square, clockwise from the top left, as PIL's QUAD wants them reversed.
        quad = (left, top + tilt, left - tilt, top + side, left + side, top + side - tilt, left + side + tilt, top)
        image = photo.transform((FRAME_SIZE, FRAME_SIZE), Image.Transform.QUAD, quad, Image.Resampling.BILINEAR)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, look.blur)))
        gain *= rng.uniform(0.97, 1.03)
        pixels = np.asarray(image, np.float32) * gain + rng.normal(0, look.noise, (FRAME_SIZE, FRAME_SIZE, 3))
        yield Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
