from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from edgefm.edge.sources import Frame, frames_of, open_source
from edgefm.models.errors import ImageError, InputError
from edgefm.models.images import encode_jpeg
from PIL import Image

NAMES = ("train/cat/1.jpg", "train/cat/2.JPEG", "train/dog/3.jpg", "val/cat/4.jpg", "val/dog/5.jpg")


@pytest.fixture(scope="module")
def contents(make_picture) -> list[bytes]:
    return [encode_jpeg(make_picture(seed)) for seed in range(len(NAMES))]


def write_folder(root: Path, names, contents) -> Path:
    for name, data in zip(names, contents, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "notes.txt").write_text("no image")
    return root


def write_tar(path: Path, names, contents, mode="w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in [*zip(names, contents, strict=True), ("./notes.txt", b"no image")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(params=["folder", "tar", "tar.gz"])
def write(request, tmp_path):
    """Writes names and contents as a source of each kind."""

    def writer(names, contents, where="source") -> Path:
        if request.param == "folder":
            return write_folder(tmp_path / where, names, contents)
        mode = "w:gz" if request.param == "tar.gz" else "w"
        return write_tar(tmp_path / f"{where}.{request.param}", names, contents, mode)

    return writer


def test_every_image_in_the_order_of_the_names(write, contents):
    frames = list(open_source(write(NAMES, contents)))
    assert [frame.sample_id for frame in frames] == sorted(NAMES)
    assert [frame.content for frame in frames] == contents


def test_a_prefix_chooses(write, contents):
    frames = open_source(write(NAMES, contents), prefix="val/")
    assert [frame.sample_id for frame in frames] == ["val/cat/4.jpg", "val/dog/5.jpg"]


def test_a_shuffle_depends_on_contents_and_seed_and_not_on_names(write, contents):
    first, renamed = write(NAMES, contents), write([f"{9 - i}.jpg" for i in range(5)], contents, "renamed")
    orders = {seed: [frame.content for frame in open_source(first, shuffle_seed=seed)] for seed in range(4)}
    for seed, order in orders.items():
        assert sorted(order) == sorted(contents)
        assert [frame.content for frame in open_source(renamed, shuffle_seed=seed)] == order
    assert len({tuple(order) for order in orders.values()}) > 1


def test_no_image_is_an_error_that_says_where(write, contents):
    with pytest.raises(InputError, match=r"no image .* below test/"):
        list(open_source(write(NAMES, contents), prefix="test/"))


def test_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="no image"):
        list(open_source(tmp_path))


def test_a_missing_path_is_an_error_at_once(tmp_path):
    with pytest.raises(InputError, match=r"there is no folder or archive .*nowhere"):
        open_source(tmp_path / "nowhere")


def test_what_is_no_tar(tmp_path):
    path = tmp_path / "photo.tar"
    path.write_bytes(b"not a tar archive" * 100)
    with pytest.raises(InputError, match=r"photo\.tar is not a readable tar archive"):
        list(open_source(path))


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_a_truncated_tar_gives_what_came_before_and_then_an_error(tmp_path, contents, kind):
    path = write_tar(tmp_path / f"a.{kind}", NAMES, contents, "w:gz" if kind == "tar.gz" else "w")
    data = path.read_bytes()
    # Into the third member of a plain archive: a header and padded contents each.
    offset = sum(512 + -(-len(c) // 512) * 512 for c in contents[:2]) + 700 if kind == "tar" else len(data) * 2 // 3
    path.write_bytes(data[:offset])
    got = []
    with pytest.raises(InputError, match="not a readable tar archive"):
        for frame in open_source(path):
            got += [frame.content]
    assert got == contents[: len(got)] and 1 <= len(got) < 5


def test_a_damaged_compressed_tar(tmp_path):
    """Damage that only the decompressor notices."""
    text = np.random.default_rng(0).integers(97, 105, 50_000, dtype=np.uint8)
    texts = [np.roll(text, i).tobytes() for i in range(len(NAMES))]
    path = write_tar(tmp_path / "a.tar.gz", NAMES, texts, "w:gz")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = np.random.default_rng(1).bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    with pytest.raises(InputError, match="not a readable tar archive"):
        list(open_source(path))


def test_a_file_that_goes_away(tmp_path, contents):
    source = open_source(write_folder(tmp_path / "images", NAMES, contents))
    assert next(source).sample_id == sorted(NAMES)[0]
    (tmp_path / "images" / NAMES[-1]).unlink()
    with pytest.raises(InputError, match=r"cannot read .*5\.jpg"):
        list(source)


def test_frames_of_images_arrays_and_bytes(make_picture):
    picture = make_picture(1)
    data = encode_jpeg(picture)
    frames = list(frames_of([picture, np.asarray(picture), data]))
    assert [frame.sample_id for frame in frames] == ["00000000", "00000001", "00000002"]
    assert frames[0].image.tobytes() == frames[1].image.tobytes() == picture.tobytes()
    assert frames[2].encoded is data and frames[0].encoded == frames[1].encoded == data


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
    ],
    ids=["grey", "four channels", "channels first", "float", "empty"],
)
def test_arrays_of_another_shape_are_refused_with_their_position(wrong, make_picture):
    source = frames_of([make_picture(0), wrong])
    next(source)
    with pytest.raises(InputError, match=r"frame 1: expected \(H, W, 3\) uint8 RGB, got"):
        next(source)


def test_what_is_no_image_is_refused():
    with pytest.raises(InputError, match="frame 0: expected a PIL image, an array or bytes, got str"):
        next(frames_of(["photo.jpg"]))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "CMYK", "I;16"])
def test_pictures_of_any_mode_can_be_seen_and_sent(make_picture, mode):
    if mode == "I;16":
        picture = Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64))
    else:
        picture = make_picture(2).convert(mode)
    frame = Frame("x", picture)
    assert frame.image.mode == "RGB" and Frame("y", frame.encoded).image.size == (64, 64)


def test_damaged_bytes_are_an_image_error_when_they_are_looked_at(jpegs):
    frame = next(frames_of([jpegs[0][:100]]))
    with pytest.raises(ImageError, match="100 bytes"):
        _ = frame.image
