"""The embedded FM's image tower in pieces, for systems that run a part of it on the device.

The pieces are cut from the graph that the product runs, so that they give its very embeddings. A cut goes before the first
convolution of a stage of blocks, which the graph names as timm does (`blocks.3.0.conv_pw.weight`); no residual connection
crosses there, and one tensor is all that the rest needs. The boundaries are counted from 0, the image, to the last, the
pooled features; those in between end the stages of blocks 0 to 5. Where two lie at one resolution, the number of channels
changes; behind blocks 6 next to nothing is left to save.

Features are sent as 8 bits a value, affine between a tensor's minimum and maximum, then zlib at level 1. SPINN shuffles bits
and takes LZ4, which is faster and compresses less.
"""

from __future__ import annotations

import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx.utils import Extractor

from ...models.backbone_graphs import feature_graph
from ...models.errors import ConfigError
from ...models.foundation import FoundationModel
from ...models.foundation.synclip import BACKBONE, SynClip, shipped_means
from ...models.images import decode_image
from ...models.pool import normalise
from ...models.runtime import OnnxModel
from ..replay.timing import Timing

_FIRST_BLOCKS_CUT, _LAST_BLOCKS_CUT = 1, 6
_RANGE = struct.Struct("<ff")
_LEVELS = 255
_WARM_UP = 3


class StagedFM:
    """SynCLIP's image tower as pieces between B + 1 boundaries.

    Attributes:
        names: of the boundaries.
        whole: the tower in one piece.

    Raises:
        ConfigError: the model is not SynCLIP.
    """

    def __init__(self, model: FoundationModel, threads: int = 0) -> None:
        """`threads`: of ONNX Runtime; 0 takes all cores, as FM and student do."""
        if not isinstance(model, SynClip):
            raise ConfigError(f"only synclip is cut into stages, not {model.name}")
        self.preprocess = model.preprocess
        path = feature_graph(BACKBONE, model.input_size)
        graph = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
        tensors = _boundaries(graph)
        self.names = ("image", *(f"blocks.{n - 1}" for n in range(_FIRST_BLOCKS_CUT, _LAST_BLOCKS_CUT + 1)), "end")
        extractor, last = Extractor(graph), tensors[-1]
        with tempfile.TemporaryDirectory(prefix="edgefm-stages-") as folder:

            def cut(begin: str, end: str) -> OnnxModel:
                file = Path(folder) / "piece.onnx"
                file.write_bytes(extractor.extract_model([begin], [end]).SerializeToString())
                return OnnxModel(file, threads)

            self._pieces = [cut(begin, end) for begin, end in pairwise(tensors)]
            self._rests = [cut(begin, last) for begin in tensors[1:-1]]
        self.whole = OnnxModel(path, threads)
        self._mean = shipped_means()[f"{BACKBONE}-{model.input_size}"]

    @property
    def end(self) -> int:
        """B, the number of the last boundary."""
        return len(self._pieces)

    def run(
        self, images: np.ndarray, at_boundary: Callable[[int, np.ndarray], None] = lambda boundary, reached: None
    ) -> np.ndarray:
        """Piece after piece, as a device with exits on the way does.

        Args:
            images: preprocessed, (N, 3, S, S) float32.
            at_boundary: hears of each boundary between the pieces, and what is there, (N, C, h, w) float32.

        Returns:
            (N, D) float32, L2-normalised.
        """
        reached = images
        for boundary, piece in enumerate(self._pieces, start=1):
            reached = piece(reached)
            if boundary < self.end:
                at_boundary(boundary, reached)
        return self._embedding(reached)

    def go_on(self, boundary: int, reached: np.ndarray) -> np.ndarray:
        """What the cloud computes from what is at a boundary before the end; returns (N, D) float32, L2-normalised."""
        rest = self.whole if boundary == 0 else self._rests[boundary - 1]
        return self._embedding(rest(reached))

    def _embedding(self, features: np.ndarray) -> np.ndarray:
        return normalise(features - self._mean)


def _boundaries(model: onnx.ModelProto) -> list[str]:
    """The tensors at the boundaries: what the first convolution of each stage of blocks reads, between input and output."""
    reads: dict[int, str] = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1].startswith("blocks."):
            reads.setdefault(int(node.input[1].split(".")[1]), node.input[0])
    cuts = [reads[n] for n in range(_FIRST_BLOCKS_CUT, _LAST_BLOCKS_CUT + 1)]
    return [model.graph.input[0].name, *cuts, model.graph.output[0].name]


# ---- what goes over the link


def pack(reached: np.ndarray) -> bytes:
    """One image's features of any shape as bytes."""
    low, high = float(reached.min()), float(reached.max())
    scale = _LEVELS / max(high - low, 1e-12)
    levels = np.rint((reached - low) * scale).astype(np.uint8)
    return _RANGE.pack(low, high) + zlib.compress(levels.tobytes(), 1)


def unpack(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """What the cloud gets of it, float32."""
    low, high = _RANGE.unpack_from(data)
    levels = np.frombuffer(zlib.decompress(data[_RANGE.size :]), np.uint8)
    return (levels * np.float32((high - low) / _LEVELS) + np.float32(low)).reshape(shape)


# ---- what it costs


@dataclass(frozen=True, eq=False)
class StageCosts:
    """Of one image on this machine; medians, (B + 1,) by boundary.

    Attributes:
        device_ms: from the encoded image to there, exits on the way included; 0 for the image, which is sent as it is.
        pack_ms: what sending from there takes the device in addition.
        size_bytes: sent from there, means.
        work: share of the cloud's time for an encoded image (decoding, preprocessing, FM) that a query from there takes it.
        whole_ms: decoding, preprocessing and the FM in one piece.
        spread: 95th percentile over median of `device_ms` at the end.
    """

    names: tuple[str, ...]
    device_ms: np.ndarray
    pack_ms: np.ndarray
    size_bytes: np.ndarray
    work: np.ndarray
    whole_ms: float
    spread: float

    def slower(self, times: float) -> StageCosts:
        return replace(
            self, device_ms=self.device_ms * times, pack_ms=self.pack_ms * times, whole_ms=self.whole_ms * times
        )

    def draw(self, rng: np.random.Generator, count: int, slowness: float) -> np.ndarray:
        """(count,) factors: what a sample takes on a device that is so many times slower, over the medians here."""
        return Timing(slowness, slowness * self.spread).draw(rng, count)


def measure(
    fm: StagedFM, encoded: Sequence[bytes], exits: Sequence[Callable[[np.ndarray], object]], repeats: int
) -> StageCosts:
    """Interleaved, so that what else the machine does hits everything alike.

    Args:
        encoded: taken in turn.
        exits: what the device does with the (1, C, h, w) features at each boundary between image and end.
    """
    rows = [_measure_once(fm, encoded[i % len(encoded)], exits) for i in range(repeats + _WARM_UP)][_WARM_UP:]
    device_ms, pack_ms, size_bytes, cloud_ms = (np.array(column) for column in zip(*rows, strict=True))
    medians = np.median(cloud_ms, axis=0)
    device = np.median(device_ms, axis=0)
    return StageCosts(
        fm.names,
        device,
        np.median(pack_ms, axis=0),
        size_bytes.mean(axis=0),
        np.append(medians / medians[0], 0.0),
        float(medians[0]),
        float(np.percentile(device_ms[:, -1], 95) / device[-1]),
    )


def _measure_once(
    fm: StagedFM, encoded: bytes, exits: Sequence[Callable[[np.ndarray], object]]
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Milliseconds on the device, for packing, bytes, and milliseconds in the cloud, by boundary."""
    device_ms, seen = [0.0], []
    began = time.perf_counter()

    def exit_at(boundary: int, reached: np.ndarray) -> None:
        exits[boundary - 1](reached)
        device_ms.append((time.perf_counter() - began) * 1e3)
        seen.append(reached)

    fm.run(fm.preprocess(decode_image(encoded))[None], exit_at)
    device_ms.append((time.perf_counter() - began) * 1e3)
    began = time.perf_counter()
    fm.go_on(0, fm.preprocess(decode_image(encoded))[None])
    pack_ms, size_bytes, cloud_ms = [0.0], [float(len(encoded))], [(time.perf_counter() - began) * 1e3]
    for boundary, reached in enumerate(seen, start=1):
        began = time.perf_counter()
        data = pack(reached)
        packed = time.perf_counter()
        fm.go_on(boundary, unpack(data, reached.shape))
        cloud_ms.append((time.perf_counter() - packed) * 1e3)
        pack_ms.append((packed - began) * 1e3)
        size_bytes.append(float(len(data)))
    return device_ms, [*pack_ms, 0.0], [*size_bytes, 0.0], cloud_ms
