"""Decoding what a user hands in, and one preprocessing for device, cloud and training."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import open_clip
import pytest
import torch
from edgefm.models.errors import ImageError
from edgefm.models.images import MAX_ELONGATION, MAX_PIXELS, Preprocess, decode_image, encode_jpeg
from open_clip.transform import image_transform
from PIL import Image

CLIP = {"mean": (0.481, 0.458, 0.408), "std": (0.269, 0.261, 0.276)}


def _encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---- decoding


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [("PNG", {}, 0), ("BMP", {}, 0), ("WEBP", {"lossless": True}, 0), ("WEBP", {}, 40), ("JPEG", {"quality": 95}, 40)],
)
def test_formats_decode_to_the_picture(make_picture, kind, options, tolerance):
    picture = make_picture(1, 48)
    decoded = decode_image(_encode(picture, kind, **options))
    assert decoded.mode == "RGB" and decoded.size == (48, 48)
    assert np.abs(np.asarray(decoded, int) - np.asarray(picture, int)).max() <= tolerance


def test_grey_and_two_level_images_keep_their_tones():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert np.array_equal(np.asarray(decode_image(_encode(grey))), np.repeat(np.asarray(grey)[..., None], 3, axis=2))
    two = Image.fromarray(np.eye(16, dtype=np.uint8) * 255).convert("1")
    assert np.array_equal(np.asarray(decode_image(_encode(two)))[..., 0], np.eye(16, dtype=np.uint8) * 255)


def test_16_bit_grey_is_scaled_not_clipped():
    deep = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    decoded = np.asarray(decode_image(_encode(Image.fromarray(deep))))
    assert np.array_equal(decoded[..., 1], deep >> 8)


def test_palettes_and_transparency_become_rgb(make_picture):
    picture = make_picture(2, 32)
    palette = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    expected = np.asarray(palette.convert("RGB"))
    assert np.array_equal(np.asarray(decode_image(_encode(palette))), expected)
    see_through = _encode(palette, transparency=bytes([0, 128] * 20))
    assert np.array_equal(np.asarray(decode_image(see_through)), expected)
    rgba = picture.copy()
    rgba.putalpha(100)
    assert np.array_equal(np.asarray(decode_image(_encode(rgba))), np.asarray(picture))


def test_a_cmyk_jpeg_becomes_rgb():
    decoded = decode_image(_encode(Image.new("CMYK", (8, 8), (200, 0, 0, 0)), "JPEG"))
    red, green, blue = decoded.getpixel((4, 4))
    assert red < 80 and green > 230 and blue > 230


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_camera_s_orientation_is_applied(kind, orientation):
    # What each value means, from the EXIF standard: where the stored picture's first row and column lie when upright.
    stored = np.full((16, 32), 0, np.uint8)
    stored[:8, :16] = 255  # bright at the stored top left
    row_side, column_side = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode_image(_encode(Image.fromarray(stored).convert("RGB"), kind, exif=exif))
    assert upright.size == ((32, 16) if orientation < 5 else (16, 32))
    pixels = np.asarray(upright)[..., 0]
    height, width = pixels.shape
    y = height // 4 if "top" in (row_side, column_side) else -height // 4
    x = width // 4 if "left" in (row_side, column_side) else -width // 4
    assert pixels[y, x] > 200
    assert pixels[y, -x] < 50 and pixels[-y, x] < 50 and pixels[-y, -x] < 50


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_images_are_refused(make_picture, kind):
    data = _encode(make_picture(0), kind)
    for share in (0.02, 0.1, 0.5, 0.9):
        with pytest.raises(ImageError) as refused:
            decode_image(data[: int(len(data) * share)])
        assert refused.value.reason == "truncated" or (share == 0.02 and refused.value.reason == "not-an-image")


def test_images_that_are_none_are_refused(make_picture):
    with pytest.raises(ImageError, match=r"empty \(0 bytes\)") as refused:
        decode_image(b"")
    assert refused.value.reason == "empty"
    gif = _encode(make_picture(0), "GIF")
    for other in (b"not an image", bytes(1000), gif, _encode(make_picture(0), "TIFF")):
        with pytest.raises(ImageError, match=rf"not a JPEG, PNG, WEBP, BMP image \({len(other)} bytes\)") as refused:
            decode_image(other)
        assert refused.value.reason == "not-an-image"


def test_damaged_bytes_never_raise_anything_else(make_picture):
    rng = np.random.default_rng(0)
    refused = 0
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        data = _encode(make_picture(3, 32), kind)
        for _ in range(100):
            damaged = np.frombuffer(data, np.uint8).copy()
            damaged[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
            try:
                assert decode_image(damaged.tobytes()).mode == "RGB"
            except ImageError:
                refused += 1
    assert 50 < refused < 400


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", zlib.compress(bytes(100)))


def _jpeg_claiming(width: int, height: int) -> bytes:
    data = _encode(Image.new("RGB", (8, 8)), "JPEG")
    at = data.index(b"\xff\xc0") + 5  # start of frame: marker, length, precision, height, width
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def _bmp_claiming(width: int, height: int) -> bytes:
    data = _encode(Image.new("RGB", (8, 8)), "BMP")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


@pytest.mark.parametrize("claiming", [_png_claiming, _jpeg_claiming, _bmp_claiming])
@pytest.mark.parametrize("size", [(7100, 7100), (10_000, 10_000), (60_000, 60_000)])
def test_a_bomb_is_refused_by_what_its_header_claims(claiming, size):
    """The two larger ones pass PIL's own limits, where it warns and where it raises."""
    assert size[0] * size[1] > MAX_PIXELS
    with pytest.raises(ImageError, match=r"claims .* at most 50,000,000") as refused:
        decode_image(claiming(*size))
    assert refused.value.reason == "too-many-pixels"


def test_the_claim_is_what_refuses_a_bomb():
    with pytest.raises(ImageError, match="damaged"):
        decode_image(_png_claiming(100, 100))


def test_jpeg_quality_trades_bytes_for_likeness(make_picture):
    picture = make_picture(4, 96)
    small, large = encode_jpeg(picture, 30), encode_jpeg(picture, 95)
    assert len(small) < len(large)
    error = [np.abs(np.asarray(decode_image(d), int) - np.asarray(picture, int)).mean() for d in (small, large)]
    assert error[1] < error[0] < 20


# ---- preprocessing


def test_one_and_many_images_are_preprocessed_alike(make_picture):
    preprocess, pictures = Preprocess(32), [make_picture(seed, 20 + 17 * seed) for seed in range(3)]
    batch = preprocess.batch(pictures)
    assert batch.shape == (3, 3, 32, 32) and batch.dtype == np.float32 and batch.flags.c_contiguous
    for row, picture in zip(batch, pictures, strict=True):
        assert np.array_equal(row, preprocess(picture))


def test_pixels_are_scaled_by_mean_and_standard_deviation():
    made = Preprocess(2, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))(Image.new("RGB", (2, 2), (255, 51, 0)))
    assert np.allclose(made[:, 0, 0], [1.0, -0.05, 0.0], atol=1e-6)


def test_grey_images_are_taken_too(make_picture):
    grey = make_picture(5).convert("L")
    made = Preprocess(32)(grey)
    assert made.shape == (3, 32, 32) and np.array_equal(made[0], made[2])


SIZES = [
    (32, 32),
    (64, 64),
    (91, 64),
    (64, 113),
    (20, 47),
    (47, 20),
    (33, 32),
    (32, 35),
    (31, 490),
    (225, 224),
    (333, 500),
    (1, 16),
]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_preprocessing_equals_open_clip_s_own(make_picture, size, interpolation):
    picture = make_picture(1, 128).resize(size)
    for input_size in (32, 37):
        theirs = image_transform(
            input_size, is_train=False, interpolation=interpolation, resize_mode="shortest", **CLIP
        )(picture)
        ours = Preprocess(input_size, **CLIP, interpolation=interpolation)(picture)
        assert np.abs(ours - theirs.numpy()).max() < 1e-6


def test_preprocessing_equals_the_transform_that_open_clip_gives_a_checkpoint(make_picture):
    _, _, theirs = open_clip.create_model_and_transforms("RN50", load_weights=False)
    picture = make_picture(6, 300).crop((0, 0, 300, 251))
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    ours = torch.from_numpy(Preprocess(224, mean, std)(picture))
    assert (ours - theirs(picture)).abs().max() < 1e-6


def test_a_strip_of_few_bytes_does_not_grow_to_gigabytes():
    """1 x 200,000 pixels scaled to a width of 160 would be 15 GB; its centre is what counts, and is kept."""
    pixels = np.zeros((200_000, 1, 3), np.uint8)
    pixels[99_000:101_000] = 255
    for strip in (pixels, pixels.transpose(1, 0, 2)):
        data = _encode(Image.fromarray(strip))
        assert len(data) < 2000
        made = Preprocess(160)(decode_image(data))
        assert made.shape == (3, 160, 160) and np.allclose(made, 1.0)


def test_only_strips_longer_than_the_limit_are_cut_first(make_picture):
    longest = make_picture(7, 128).resize((4 * MAX_ELONGATION, 4))
    theirs = image_transform(32, is_train=False, interpolation="bicubic", resize_mode="shortest", **CLIP)(longest)
    assert np.abs(Preprocess(32, **CLIP)(longest) - theirs.numpy()).max() < 1e-6
