"""What students and FM said of a stream: the input of a replay. Ground truth in it is for scoring alone."""

from __future__ import annotations

import io
from dataclasses import dataclass, fields, replace
from pathlib import Path
from zipfile import is_zipfile

import numpy as np

from ...models.cache import write_atomic
from ...models.errors import InputError

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Recording:
    """N samples in order of arrival; every array is (N,).

    Attributes:
        margins: of the student's similarities.
        agreements: graded, of the student's answer with the FM's (`edgefm.models.confidence`), in [0, 2].
        edge_right, cloud_right: whether student and FM name the label; where there is no ground truth, whether they name the
            FM's.
        size_bytes: of the encoded images.
    """

    margins: np.ndarray
    agreements: np.ndarray
    edge_right: np.ndarray
    cloud_right: np.ndarray
    size_bytes: np.ndarray

    def __post_init__(self) -> None:
        kinds = {"edge_right": np.bool_, "cloud_right": np.bool_, "size_bytes": np.int64}
        for field in fields(self):
            object.__setattr__(
                self, field.name, np.asarray(getattr(self, field.name), kinds.get(field.name, np.float64))
            )
        shapes = {getattr(self, field.name).shape for field in fields(self)}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1 or len(self) == 0:
            raise InputError(f"a recording needs arrays of one length, at least 1; got the shapes {sorted(shapes)}")
        if not (np.isfinite(self.margins).all() and np.isfinite(self.agreements).all()):
            raise InputError("a recording's margins and agreements must be finite")
        if (self.size_bytes < 1).any():
            raise InputError("a recording's images have at least one byte each")

    def __len__(self) -> int:
        return len(self.margins)

    def at(self, rows: np.ndarray | slice) -> Recording:
        return Recording(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def repeated(self, samples: int) -> Recording:
        """So often one after another that there are `samples` of them."""
        return self.at(np.resize(np.arange(len(self)), samples))

    def with_payload(self, size_bytes: int) -> Recording:
        return replace(self, size_bytes=np.full(len(self), size_bytes))

    def save(self, path: Path) -> None:
        """Raises `StoreError` when the disk refuses."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, format=_FORMAT, **arrays)
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Raises `InputError`: there is no such file, or it is no recording."""
        names = [field.name for field in fields(cls)]
        try:
            data = io.BytesIO(path.read_bytes())
            if not is_zipfile(data):  # numpy would take it for a pickle, and say so
                raise InputError(f"{path} is no recording of `edgefm replay --record-to`: not an .npz archive")
            with np.load(data, allow_pickle=False) as file:
                if int(file["format"]) != _FORMAT:
                    raise InputError(f"{path} is a recording of format {file['format']}; this EdgeFM reads {_FORMAT}")
                return cls(**{name: file[name] for name in names})
        except OSError as error:
            raise InputError(f"cannot read the recording {path}: {error.strerror or error}") from error
        except InputError:
            raise
        except Exception as error:  # of numpy, zipfile and zlib, which name no common base
            raise InputError(f"{path} is no recording of `edgefm replay --record-to`: {error}") from error
