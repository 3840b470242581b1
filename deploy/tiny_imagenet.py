"""The environments of the experiments, made from the public Tiny-ImageNet download (`tiny-imagenet-200`, CS231n).

`tiny-imagenet.json` says which classes each archive has, and how many images of each. Of every class these are the first
in the order of their numbers: `train/WNID/images/WNID_0.JPEG`, `WNID_1.JPEG`, ... for `train/`, and for `val/` those of
`val/images/` that `val/val_annotations.txt` assigns to the class, by the number in `val_0.JPEG`. The files' bytes are
kept. An archive has the classes in the order of their names, of each first `train/NAME/NNN.jpeg`, then `val/NAME/NNN.jpeg`.

`sha256` in that file is of the archive that the published figures were measured with. Which images that one took is not
on record, so an archive made here may differ from it in images, never in classes and counts; `make_archives` tells.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..models.cache import write_atomic
from ..models.errors import ImageError, InputError
from ..models.images import decode_image

DOWNLOAD = "tiny-imagenet-200"
_ANNOTATIONS = "val/val_annotations.txt"
_FILE = Path(__file__).with_name("tiny-imagenet.json")
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # RuntimeError: encrypted, or a method unknown

Read = Callable[[str], bytes]
"""From a path below `tiny-imagenet-200/` to the file's bytes."""


@dataclass(frozen=True)
class Environment:
    """One archive: `train` and `val` images of each class.

    `classes` is from WordNet's number (`n02504458`) to the label; `sha256` of the archive behind the published figures.
    """

    name: str
    train: int
    val: int
    sha256: str
    classes: dict[str, str]


@dataclass(frozen=True)
class Archive:
    """One that was written. `as_published`: it is the one behind the published figures, byte for byte."""

    path: Path
    classes: int
    images: int
    as_published: bool


@cache
def environments() -> tuple[Environment, ...]:
    found = json.loads(_FILE.read_text(encoding="utf-8"))
    return tuple(Environment(name=name, **fields) for name, fields in found.items())


def make_archives(
    source: Path,
    folder: Path,
    chosen: tuple[Environment, ...] | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Archive]:
    """Writes `NAME.tar` of every environment into `folder`, each whole or not at all.

    Args:
        source: the folder `tiny-imagenet-200`, one that it lies in, or its zip.
        chosen: by default all three.
        progress: told the name of each archive before it is made.

    Raises:
        InputError: `source` is no such folder or zip, or a class or an image of it is missing or damaged.
        StoreError: the disk refuses.
    """
    made = []
    with _opened(source) as read:
        val = _val_names(source, read)
        for environment in environments() if chosen is None else chosen:
            progress(environment.name)
            data = _packed(source, read, environment, val)
            path = folder / f"{environment.name}.tar"
            write_atomic(path, data)
            images = len(environment.classes) * (environment.train + environment.val)
            same = hashlib.sha256(data).hexdigest() == environment.sha256
            made.append(Archive(path, len(environment.classes), images, same))
    return made


def pack(images: Iterator[tuple[str, bytes]]) -> bytes:
    """A tar of (name, content), the same for the same images: no dates, no owners."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in images:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _packed(source: Path, read: Read, environment: Environment, val: dict[str, list[str]]) -> bytes:
    return pack(
        (f"{part}/{label}/{place:03d}.jpeg", _image(source, read, name))
        for label, wnid in sorted((label, wnid) for wnid, label in environment.classes.items())
        for part, names in (
            ("train", [f"train/{wnid}/images/{wnid}_{number}.JPEG" for number in range(environment.train)]),
            ("val", _first_val(source, val, wnid, label, environment.val)),
        )
        for place, name in enumerate(names)
    )


def _image(source: Path, read: Read, name: str) -> bytes:
    content = read(name)
    try:
        decode_image(content)
    except ImageError as error:
        raise InputError(f"{source}: {name}: {error}; get {DOWNLOAD} again") from error
    return content


def _val_names(source: Path, read: Read) -> dict[str, list[str]]:
    """For each class the paths of its `val` images, by their numbers."""
    numbers: dict[str, list[int]] = {}
    text = read(_ANNOTATIONS).decode(errors="backslashreplace")
    for row, line in enumerate(text.splitlines(), start=1):
        name, _, rest = line.partition("\t")
        number = name.removeprefix("val_").removesuffix(".JPEG")
        if not number.isdecimal() or not rest:
            raise InputError(f"{source}: {_ANNOTATIONS}: line {row}: expected val_NUMBER.JPEG, a tab and a class")
        numbers.setdefault(rest.split("\t")[0], []).append(int(number))
    return {wnid: [f"val/images/val_{number}.JPEG" for number in sorted(own)] for wnid, own in numbers.items()}


def _first_val(source: Path, val: dict[str, list[str]], wnid: str, label: str, count: int) -> list[str]:
    names = val.get(wnid, [])[:count]
    if len(names) < count:
        raise InputError(
            f"{source}: {_ANNOTATIONS} has {len(names)} images of {wnid} ({label}), {count} are needed; get {DOWNLOAD} again"
        )
    return names


@contextmanager
def _opened(source: Path) -> Iterator[Read]:
    """Gives a function that reads a file of the download. Raises InputError for what is none."""
    advice = f"give the folder {DOWNLOAD} (with train/ and val/) or {DOWNLOAD}.zip"
    if source.is_dir():
        root = next((each for each in (source, source / DOWNLOAD) if (each / _ANNOTATIONS).is_file()), None)
        if root is None:
            raise InputError(f"{source} has no {_ANNOTATIONS}; {advice}")
        yield lambda name: _read_file(root / name)
        return
    if not source.exists():
        raise InputError(f"there is no {source}; {advice}")
    try:
        with zipfile.ZipFile(source) as archive:
            roots = [name.removesuffix(_ANNOTATIONS) for name in archive.namelist() if name.endswith(_ANNOTATIONS)]
            if not roots:
                raise InputError(f"{source} has no {_ANNOTATIONS}; {advice}")
            yield lambda name: _read_member(source, archive, roots[0] + name)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{source} is no whole zip archive ({error}); get it again, or {advice}") from error


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; get {DOWNLOAD} again") from error


def _read_member(source: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except KeyError:
        raise InputError(f"{source} has no {name}; get {DOWNLOAD} again") from None
    except _DAMAGED as error:
        raise InputError(f"{source}: {name} is damaged ({error}); get the archive again") from error
