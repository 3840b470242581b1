from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edgefm.edge.frames import Frame, Unreadable, readable
from edgefm.edge.sources import frames_of, open_source
from edgefm.models.errors import ConfigError, ImageError, InputError
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


def test_a_name_that_is_not_utf_8_can_be_written(write, contents, answer):
    (frame,) = open_source(write([os.fsdecode(b"caf\xe9.jpg")], contents[:1]))
    assert frame.sample_id == r"caf\xe9.jpg" and frame.content == contents[0]
    replace(answer, sample_id=frame.sample_id).to_json()


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


def test_no_image_is_an_error_at_once_that_says_where(write, contents):
    with pytest.raises(InputError, match=r"no image .* below test/"):
        open_source(write(NAMES, contents), prefix="test/")


def test_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="no image"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.mp4", "nowhere.txt", "camera:", "camera:one", "ftp://host/a"])
def test_what_is_no_source_is_an_error_at_once_that_says_what_is(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"there is no folder or archive .*; a source is .*camera:NUMBER or rtsp"):
        open_source(name)


@pytest.mark.parametrize(("name", "data"), [("photo.tar", b"not a tar archive" * 100), ("empty.tar", b"")])
def test_what_is_no_tar(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"{name} is not a readable tar archive"):
        open_source(path)


# ---- damaged archives: what came before is there, and the rest is counted


def _member_offsets(contents: list[bytes]) -> list[int]:
    """Where the headers of a plain archive lie: a header and padded contents each."""
    sizes = [512 + -(-len(content) // 512) * 512 for content in contents]
    return [sum(sizes[:i]) for i in range(len(sizes))]


@pytest.mark.parametrize(
    ("where", "images"), [(0, 2), (100, 2), (700, 2)], ids=["between members", "in a header", "in a member"]
)
def test_a_truncated_tar(tmp_path, contents, where, images):
    path = write_tar(tmp_path / "a.tar", NAMES, contents)
    path.write_bytes(path.read_bytes()[: _member_offsets(contents)[2] + where])
    *frames, rest = open_source(path)
    assert [frame.content for frame in frames if isinstance(frame, Frame)] == contents[:images]
    assert isinstance(rest, Unreadable) and (rest.sample_id, rest.reason) == ("a.tar", "truncated")
    assert rest.detail.startswith(f"{path} cannot be read past its image {images}: ")


def test_a_tar_with_a_damaged_header_in_the_middle(tmp_path, contents):
    """tarfile itself takes it for the end."""
    path = write_tar(tmp_path / "a.tar", NAMES, contents)
    data = bytearray(path.read_bytes())
    start = _member_offsets(contents)[3]
    data[start : start + 512] = np.random.default_rng(0).bytes(512)
    path.write_bytes(data)
    *frames, rest = open_source(path)
    assert [frame.content for frame in frames if isinstance(frame, Frame)] == contents[:3]
    assert isinstance(rest, Unreadable) and rest.reason == "damaged" and f"at byte {start}" in rest.detail


def test_a_truncated_compressed_tar(tmp_path, contents):
    path = write_tar(tmp_path / "a.tar.gz", NAMES, contents, "w:gz")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    *frames, rest = open_source(path)
    assert [frame.content for frame in frames if isinstance(frame, Frame)] == contents[: len(frames)]
    assert 1 <= len(frames) < 5 and isinstance(rest, Unreadable) and rest.reason == "truncated"


def test_a_damaged_compressed_tar(tmp_path):
    """Damage that only the decompressor notices."""
    text = np.random.default_rng(0).integers(97, 105, 50_000, dtype=np.uint8)
    texts = [np.roll(text, i).tobytes() for i in range(len(NAMES))]
    path = write_tar(tmp_path / "a.tar.gz", NAMES, texts, "w:gz")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = np.random.default_rng(1).bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    *frames, rest = open_source(path)
    assert len(frames) < 5 and isinstance(rest, Unreadable) and rest.reason == "damaged"


def test_data_that_must_be_whole_is_refused(tmp_path, contents):
    path = write_tar(tmp_path / "a.tar", NAMES, contents)
    assert [frame.content for frame in readable(open_source(path))] == contents
    path.write_bytes(path.read_bytes()[:-10_240])
    with pytest.raises(InputError, match=r"a\.tar is unreadable \(truncated\): .*cannot be read past"):
        list(readable(open_source(path)))


# ---- files that cannot be read: counted, and the run goes on


def test_a_file_that_goes_away(tmp_path, contents):
    source = open_source(write_folder(tmp_path / "images", NAMES, contents))
    assert next(source).sample_id == sorted(NAMES)[0]
    (tmp_path / "images" / NAMES[1]).unlink()
    items = list(source)
    assert [item.sample_id for item in items] == sorted(NAMES)[1:]
    (lost,) = (item for item in items if isinstance(item, Unreadable))
    assert (lost.sample_id, lost.reason) == (NAMES[1], "cannot-read")
    assert lost.detail == f"cannot read {tmp_path / 'images' / NAMES[1]}: No such file or directory"


def test_what_is_no_file_and_links_to_nowhere(tmp_path, contents):
    root = write_folder(tmp_path / "images", NAMES, contents)
    (root / "a.jpg").symlink_to(root / "nowhere.jpg")
    os.mkfifo(root / "b.jpg")  # reading it would wait for a writer
    items = list(open_source(root))
    reasons = {item.sample_id: item.reason for item in items if isinstance(item, Unreadable)}
    assert reasons == {"a.jpg": "cannot-read", "b.jpg": "cannot-read"} and len(items) == len(NAMES) + 2


@pytest.fixture
def as_ordinary_user() -> Iterator[Path]:
    """A folder that an ordinary user can reach; for root no permission holds, so that root is nobody meanwhile."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        (folder / "images" / "val").chmod(0o700)


def test_a_file_and_a_folder_without_permission(as_ordinary_user, contents):
    root = write_folder(as_ordinary_user / "images", NAMES, contents)
    (root / NAMES[0]).chmod(0)
    (root / "val").chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        items = list(open_source(root))
    finally:
        os.seteuid(user)
    lost = {item.sample_id: (item.reason, item.detail) for item in items if isinstance(item, Unreadable)}
    assert lost == {
        NAMES[0]: ("cannot-read", f"cannot read {root / NAMES[0]}: Permission denied"),
        "val/": ("cannot-read", f"cannot open the folder {root / 'val'}: Permission denied"),
    }
    assert [item.sample_id for item in items if isinstance(item, Frame)] == sorted(NAMES[1:3])


# ---- lists


def test_a_list_of_paths(tmp_path, contents):
    root = write_folder(tmp_path / "images", NAMES, contents)
    elsewhere = tmp_path / "elsewhere.bin"  # a list is explicit: it takes any name
    elsewhere.write_bytes(contents[0])
    path = tmp_path / "list.txt"
    lines = ["# a comment", "", f"images/{NAMES[4]}", f"  images/{NAMES[0]}  ", "gone.jpg", str(elsewhere), "images"]
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    items = list(open_source(path))
    assert [item.sample_id for item in items] == [line.strip() for line in lines[2:]]
    assert [item.content for item in items if isinstance(item, Frame)] == [contents[4], contents[0], contents[0]]
    lost = [item for item in items if isinstance(item, Unreadable)]
    assert [(item.sample_id, item.reason) for item in lost] == [("gone.jpg", "cannot-read"), ("images", "cannot-read")]
    assert "No such file" in lost[0].detail and "is not a file" in lost[1].detail
    chosen = open_source(path, prefix="images/val")
    assert [item.sample_id for item in chosen] == [f"images/{NAMES[4]}"]
    assert (root / "notes.txt").exists()


@pytest.mark.parametrize(
    ("data", "says"), [(b"# nothing\n\n", "no image"), (b"caf\xe9.jpg\n", "not a list of paths in UTF-8")]
)
def test_a_list_without_a_path(tmp_path, data, says):
    path = tmp_path / "list.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=says):
        open_source(path)


def test_a_shuffled_list_keeps_what_cannot_be_read(tmp_path, contents):
    write_folder(tmp_path, NAMES, contents)
    path = tmp_path / "list.txt"
    path.write_text("\n".join(["gone.jpg", *NAMES]))
    items = list(open_source(path, shuffle_seed=0))
    assert isinstance(items[-1], Unreadable) and {item.sample_id for item in items[:-1]} == set(NAMES)


def test_a_stride_is_for_videos(tmp_path, contents):
    with pytest.raises(ConfigError, match="stride counts the frames of a video file"):
        open_source(write_folder(tmp_path, NAMES, contents), stride=2)


# ---- Python iterators


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
    with pytest.raises(ImageError, match="100 bytes") as refused:
        _ = frame.image
    assert refused.value.reason == "truncated"
