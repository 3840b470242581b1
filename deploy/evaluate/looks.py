"""What FM and student see of a data set, kept on disk: it takes minutes, and every experiment and process wants it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...cloud.config import CustomizationConfig
from ...models.foundation import load_foundation_model
from ...models.pool import LabelPool
from ...models.students import student_profile
from ..bench.learner import Images, Learner, Place

_ARRAYS = ("fm", "features", "views")


@dataclass(frozen=True)
class Look:
    """A data set under a condition of `edgefm.deploy.conditions`."""

    data: Path
    condition: str

    @property
    def name(self) -> str:
        short = self.data.name.split(".")[0].removeprefix("tiny-imagenet-")
        return short if self.condition == "clean" else f"{short}, {self.condition}"


@dataclass(frozen=True)
class Seen:
    """A look: N images of the stream that nobody has labelled, M images that score, and the pool of their labels.

    Attributes:
        truth: (M,) str, for scoring alone.
        size_bytes: (M,) of the encoded scoring images.
    """

    look: Look
    pool: LabelPool
    stream: Images
    scored: Images
    truth: np.ndarray
    size_bytes: np.ndarray


def take(look: Look, student: str, stream: int, scoring: int, folder: Path) -> Path:
    """Looks at the data and writes what is seen into `folder`, for `open_look`. In a process of its own: one thread.

    Raises:
        InputError: too few images, or another layout than `train/<label>/`, `val/<label>/`.
    """
    model, config = load_foundation_model("synclip"), CustomizationConfig(threads=1)
    learner = Learner(model, student_profile(student), config)
    place = Place.open(look.data, model, stream)
    chosen = spread(len(place.scoring), scoring)
    folder.mkdir(parents=True)
    encoded = place.scoring_under(look.condition, chosen.tolist())
    parts = {
        "stream": learner.look(place.stream_under(look.condition, stream), config.views),
        "scored": learner.look(encoded, 1),
    }
    for part, images in parts.items():
        for name in _ARRAYS:
            np.save(folder / f"{part}-{name}.npy", getattr(images, name))
    np.save(folder / "truth.npy", place.truth[chosen].astype(np.str_))
    np.save(folder / "size_bytes.npy", np.array([len(data) for data in encoded]))
    place.pool.save(folder / "pool.npz")
    return folder


def open_look(look: Look, folder: Path) -> Seen:
    """Reads what `take` wrote; the large arrays stay on disk until they are used."""

    def images(part: str) -> Images:
        return Images(*(np.load(folder / f"{part}-{name}.npy", mmap_mode="r") for name in _ARRAYS))

    truth = np.load(folder / "truth.npy").astype(object)
    size_bytes = np.load(folder / "size_bytes.npy")
    return Seen(look, LabelPool.load(folder / "pool.npz"), images("stream"), images("scored"), truth, size_bytes)


def spread(available: int, wanted: int) -> np.ndarray:
    """Rows of at most so many items, evenly spaced: the images of a label lie together."""
    return np.unique(np.linspace(0, available - 1, min(wanted, available)).round().astype(int))
