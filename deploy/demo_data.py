"""What the demo looks at: environments with a stream that nobody has labelled and images that only score.

Whatever the layout of the source, the stream is written to a tar with running numbers for names, in an order given by
content, so that no ground truth can reach the agent, the cloud, the training or the threshold, not even through a path.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ..edge.frames import Frame, readable
from ..edge.sources import open_source
from ..models.errors import InputError, StoreError, disk_reason

CAMERA_PLACE = "yard"
SCORING_FRAMES = 400
"""Of the simulated camera, from a walk of its own."""
SCORING_SHARE = 0.2
"""Of plain files, chosen by content hash, when there is no `val/`."""


@dataclass(frozen=True)
class DemoEnvironment:
    """One place the device stands in, or a part of the day there.

    Attributes:
        name: for people and for files.
        place: name of the environment at registration.
        labels: of its pool.
        stream: tar of the unlabelled stream, `frames` images.
        scoring: (encoded image, ground truth) pairs, in no pool, store or stream; the truth is None where the source
            has none, and scoring is then against the FM.
    """

    name: str
    place: str
    labels: tuple[str, ...]
    stream: Path
    frames: int
    scoring: tuple[tuple[bytes, str | None], ...]


def camera_environments(folder: Path, frames: int, seed: int) -> list[DemoEnvironment]:
    """The default: a simulated camera over photographs that come with installed packages, in one place by day and then
    by night, when it also sees what never came by day. The night lasts half as long again as the day: what it teaches has
    to come back before it ends."""
    from .camera import DAY, NIGHT, PHOTOGRAPHS, UNSEEN_BY_DAY, walk

    labels = tuple(sorted({photograph.label for photograph in PHOTOGRAPHS}))
    by_day = replace(DAY, photographs=tuple(p for p in PHOTOGRAPHS if p.label not in UNSEEN_BY_DAY))
    environments = []
    for number, (name, look, length) in enumerate((("day", by_day, frames), ("night", NIGHT, frames + frames // 2))):
        stream = (frame.image_bytes for frame in walk(look, seed * 1000 + number, length))
        path, count = _write_stream(folder / f"{name}.tar", stream)
        scoring = tuple((f.image_bytes, f.label) for f in walk(look, seed * 1000 + 500 + number, SCORING_FRAMES))
        environments.append(DemoEnvironment(name, CAMERA_PLACE, labels, path, count, scoring))
    return environments


def data_environment(source: Path, folder: Path, frames: int, seed: int, labels: Sequence[str] = ()) -> DemoEnvironment:
    """An environment from a folder or tar laid out `train/<label>/`, `val/<label>/`, or of plain files.

    Args:
        labels: needed for plain files, which carry none.

    Raises:
        InputError: no image, or plain files without labels.
    """
    everything = list(readable(open_source(source)))
    parts: dict[str, list[Frame]] = {"train": [], "val": []}
    for frame in everything:
        parents = PurePosixPath(frame.sample_id).parts[:-1]
        if len(parents) >= 2 and parents[-2] in parts:
            parts[parents[-2]].append(frame)
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in source.name.split(".")[0]) or "data"
    if parts["train"] and parts["val"]:
        found = sorted({_label_of(frame) for part in parts.values() for frame in part})
        stream = parts["train"]
        scoring = tuple((frame.encoded, _label_of(frame)) for frame in parts["val"])
    elif labels:
        found = list(labels)
        held_out = [_fraction(frame) < SCORING_SHARE for frame in everything]
        stream = [frame for frame, out in zip(everything, held_out, strict=True) if not out]
        scoring = tuple((frame.encoded, None) for frame, out in zip(everything, held_out, strict=True) if out)
    else:
        raise InputError(f"{source} has no train/<label>/ and val/<label>/; for plain files give --labels 'cat, dog'")
    if not stream or not scoring:
        raise InputError(f"{source} has too few images: {len(stream)} for the stream, {len(scoring)} for scoring")
    salt = str(seed).encode()
    stream.sort(key=lambda frame: hashlib.sha256(salt + frame.encoded).digest())
    path, count = _write_stream(folder / f"{name}.tar", (f.encoded for f in itertools.islice(stream, frames)))
    return DemoEnvironment(name, name, tuple(found), path, count, scoring)


def _fraction(frame: Frame) -> float:
    return int(hashlib.sha256(frame.encoded).hexdigest()[:8], 16) / 2**32


def _label_of(frame: Frame) -> str:
    return PurePosixPath(frame.sample_id).parts[-2]


def _write_stream(path: Path, images: Iterable[bytes]) -> tuple[Path, int]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            count = 0
            for count, data in enumerate(images, start=1):
                member = tarfile.TarInfo(f"{count:06d}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    except OSError as error:
        raise StoreError(f"cannot write the stream {path}: {disk_reason(error)}") from error
    return path, count
