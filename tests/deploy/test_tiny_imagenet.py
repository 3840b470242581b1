"""The experiments' archives from a made-up download in the public layout, and against the real archives where they are."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from edgefm.deploy.cli import app
from edgefm.deploy.tiny_imagenet import DOWNLOAD, Environment, environments, make_archives, pack
from edgefm.models.errors import EdgeFMError, InputError, StoreError
from PIL import Image
from typer.testing import CliRunner

CLASSES = {"n00000007": "zebra", "n00000003": "African owl", "n00000005": "bee"}
SMALL = Environment("small", train=3, val=2, sha256="0" * 64, classes=CLASSES)


def jpeg(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, shade // 256, 99)).save(out, "JPEG")
    return out.getvalue()


def content_of(name: str) -> bytes:
    return jpeg(int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big"))


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """12 training images of each class, as in the public folder; validation images in a wild order of classes."""
    folder = tmp_path / DOWNLOAD
    for wnid in (*CLASSES, "n00000009"):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        for number in range(12):
            name = f"train/{wnid}/images/{wnid}_{number}.JPEG"
            (folder / name).write_bytes(content_of(name))
    (folder / "val" / "images").mkdir(parents=True)
    rows = []
    for number, wnid in enumerate([*reversed(CLASSES), "n00000009"] * 3):
        name = f"val/images/val_{number}.JPEG"
        (folder / name).write_bytes(content_of(name))
        rows.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t7\t7\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(sorted(rows)))  # val_0, val_1, val_10, val_11, val_2
    return folder


def zipped(folder: Path, top: str = f"{DOWNLOAD}/") -> Path:
    path = folder.with_name(f"{DOWNLOAD}.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, top + str(file.relative_to(folder)))
    return path


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        found = {}
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None and member.mtime == member.uid == 0 and member.uname == ""
            found[member.name] = file.read()
    return found


EXPECTED = {
    "train/African owl/000.jpeg": "train/n00000003/images/n00000003_0.JPEG",
    "train/African owl/001.jpeg": "train/n00000003/images/n00000003_1.JPEG",
    "train/African owl/002.jpeg": "train/n00000003/images/n00000003_2.JPEG",
    "val/African owl/000.jpeg": "val/images/val_1.JPEG",
    "val/African owl/001.jpeg": "val/images/val_5.JPEG",
    "train/bee/000.jpeg": "train/n00000005/images/n00000005_0.JPEG",
    "train/bee/001.jpeg": "train/n00000005/images/n00000005_1.JPEG",
    "train/bee/002.jpeg": "train/n00000005/images/n00000005_2.JPEG",
    "val/bee/000.jpeg": "val/images/val_0.JPEG",
    "val/bee/001.jpeg": "val/images/val_4.JPEG",
    "train/zebra/000.jpeg": "train/n00000007/images/n00000007_0.JPEG",
    "train/zebra/001.jpeg": "train/n00000007/images/n00000007_1.JPEG",
    "train/zebra/002.jpeg": "train/n00000007/images/n00000007_2.JPEG",
    "val/zebra/000.jpeg": "val/images/val_2.JPEG",
    "val/zebra/001.jpeg": "val/images/val_6.JPEG",
}


def test_every_class_has_its_first_images_by_number_in_the_order_of_names(download: Path, tmp_path: Path) -> None:
    told: list[str] = []
    written = []
    for place, source in enumerate((download, download.parent, zipped(download))):
        (made,) = make_archives(source, tmp_path / str(place), (SMALL,), told.append)
        assert (made.classes, made.images, made.as_published) == (3, 15, False)
        found = members(made.path)
        assert list(found) == list(EXPECTED)
        assert found == {name: content_of(original) for name, original in EXPECTED.items()}
        written.append(made.path.read_bytes())
    assert told == ["small"] * 3 and len(set(written)) == 1
    (made,) = make_archives(zipped(download, top=""), tmp_path / "again", (SMALL,))
    assert made.path.read_bytes() == written[0]
    published = Environment("small", 3, 2, hashlib.sha256(written[0]).hexdigest(), CLASSES)
    (made,) = make_archives(download, tmp_path / "published", (published,))
    assert made.as_published


def refuse(source: Path, folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_archives(source, folder, (SMALL,))
    assert not folder.exists() or not list(folder.iterdir())


def test_what_is_no_download_is_refused(download: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuse(tmp_path / "none", out, "there is no .*none; give the folder tiny-imagenet-200")
    refuse(download / "train", out, "train has no val/val_annotations.txt; give the folder tiny-imagenet-200")
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 and no more")
    refuse(tmp_path / "a.zip", out, "a.zip is no whole zip archive .*get it again")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("cats/1.jpg", b"")
    refuse(tmp_path / "b.zip", out, "b.zip has no val/val_annotations.txt")


def test_a_damaged_zip_is_named(download: Path, tmp_path: Path) -> None:
    whole = zipped(download).read_bytes()
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole[: len(whole) // 2])
    refuse(cut, tmp_path / "out", "cut.zip is no whole zip archive")
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        offset = archive.getinfo(f"{DOWNLOAD}/train/n00000003/images/n00000003_1.JPEG").header_offset
    cut.write_bytes(whole[: offset + 200] + b"\xff" * 40 + whole[offset + 240 :])
    refuse(cut, tmp_path / "out", "n00000003_1.JPEG is damaged .*get the archive again")


def test_missing_and_damaged_images_are_named(download: Path, tmp_path: Path) -> None:
    image = download / "train/n00000005/images/n00000005_2.JPEG"
    whole = image.read_bytes()
    image.write_bytes(whole[:-100])
    refuse(download, tmp_path / "out", "n00000005_2.JPEG: the image is damaged .*get tiny-imagenet-200 again")
    image.unlink()
    refuse(download, tmp_path / "out", "cannot read .*n00000005_2.JPEG: No such file")
    refuse(zipped(download), tmp_path / "out", "has no tiny-imagenet-200/train/n00000005/images/n00000005_2.JPEG")


def test_annotations_are_checked(download: Path, tmp_path: Path) -> None:
    path = download / "val" / "val_annotations.txt"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(row for row in rows if "n00000007" not in row or row.startswith("val_2.")))
    refuse(download, tmp_path / "out", r"val_annotations.txt has 1 images of n00000007 \(zebra\), 2 are needed")
    path.write_text("\n".join([*rows[:3], "val_x.JPEG\tn00000007"]))
    refuse(download, tmp_path / "out", "val_annotations.txt: line 4: expected val_NUMBER.JPEG, a tab and a class")


def test_a_disk_that_refuses_is_a_store_error(download: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StoreError, match="cannot write"):
        make_archives(download, tmp_path / "out", (SMALL,))


def test_the_environments_share_no_class_and_cover_the_download() -> None:
    found = environments()
    assert [(e.name, e.train, e.val, len(e.classes)) for e in found] == [
        ("tiny-imagenet-wild", 250, 25, 20),
        ("tiny-imagenet-town", 250, 25, 20),
        ("tiny-imagenet-world", 100, 10, 160),
    ]
    assert len({wnid for e in found for wnid in e.classes}) == 200
    assert len({label for e in found for label in e.classes.values()}) == 200


def test_packing_is_that_of_the_published_archives(shared_data: Path) -> None:
    for environment in environments():
        path = shared_data / f"{environment.name}.tar"
        packed = pack(iter(members(path).items()))
        assert hashlib.sha256(packed).hexdigest() == environment.sha256
        assert packed == path.read_bytes()


def test_the_command_makes_all_three_as_the_published_ones_are_laid_out(tmp_path: Path, shared_data: Path) -> None:
    source, out, image = tmp_path / f"{DOWNLOAD}.zip", tmp_path / "out", jpeg(5)
    rows = []
    with zipfile.ZipFile(source, "w") as archive:
        for environment in environments():
            for wnid in environment.classes:
                for number in range(environment.train):
                    archive.writestr(f"{DOWNLOAD}/train/{wnid}/images/{wnid}_{number}.JPEG", image)
                for _ in range(environment.val):
                    archive.writestr(f"{DOWNLOAD}/val/images/val_{len(rows)}.JPEG", image)
                    rows.append(f"val_{len(rows)}.JPEG\t{wnid}\t0\t0\t7\t7")
        archive.writestr(f"{DOWNLOAD}/val/val_annotations.txt", "\n".join(rows))
    done = CliRunner().invoke(app, ["data", "tiny-imagenet", str(source), "--output", str(out)])
    assert done.exit_code == 0, done.output
    for environment in environments():
        path = out / f"{environment.name}.tar"
        count = len(environment.classes) * (environment.train + environment.val)
        line = (
            f"{path}: {len(environment.classes)} classes, {count:,} images, other images than in the published figures"
        )
        assert line in done.stdout.splitlines()
        with tarfile.open(path) as made, tarfile.open(shared_data / path.name) as published:
            assert made.getnames() == published.getnames()


def test_the_command_s_errors_are_those_of_the_reader(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["data", "tiny-imagenet", str(tmp_path)])
    assert isinstance(done.exception, EdgeFMError) and "has no val/val_annotations.txt" in str(done.exception)
