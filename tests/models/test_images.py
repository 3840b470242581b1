from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from edgefm.models.errors import ImageError
from edgefm.models.images import Preprocess, decode_image, encode_jpeg
from PIL import Image


def test_one_and_many_images_are_preprocessed_alike(make_picture):
    preprocess, pictures = Preprocess(32), [make_picture(seed, 50 + seed) for seed in range(3)]
    batch = preprocess.batch(pictures)
    assert batch.shape == (3, 3, 32, 32) and batch.dtype == np.float32
    for row, picture in zip(batch, pictures, strict=True):
        assert np.array_equal(row, preprocess(picture))


@pytest.mark.parametrize("size", [(64, 64), (91, 64), (64, 113), (20, 47)])
def test_preprocessing_equals_open_clips(make_picture, size):
    open_clip = pytest.importorskip("open_clip")
    mean, std = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)
    picture = make_picture(1, 128).resize(size)
    theirs = open_clip.image_transform(32, is_train=False, mean=mean, std=std, interpolation="bicubic")(picture)
    assert np.abs(Preprocess(32, mean, std)(picture) - theirs.numpy()).max() < 1e-5


def test_damaged_images_are_refused(make_picture):
    data = encode_jpeg(make_picture(0))
    for bad in (b"", b"not an image", data[: len(data) // 2]):
        with pytest.raises(ImageError):
            decode_image(bad)


def test_a_bomb_is_refused_by_its_header():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(ImageError):
        decode_image(b"\x89PNG\r\n\x1a\n" + chunk)


def test_grey_and_palette_images_become_rgb(make_picture):
    for mode in ("L", "P", "RGBA"):
        buffer = io.BytesIO()
        make_picture(2).convert(mode).save(buffer, "PNG")
        assert decode_image(buffer.getvalue()).mode == "RGB"


def test_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue()).size == (20, 40)
