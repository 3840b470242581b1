"""open_clip as a foundation model: CLIP and the like, from the hub or from a checkpoint on disk."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

from ..errors import ConfigError, ModelError
from ..images import Preprocess

PROMPTS = ("a photo of a {}.", "a photo of the {}.", "{}")
"""A label's embedding is the normalised mean over these."""


class OpenClip:
    """An open_clip model in eval mode, on the GPU where there is one. Satisfies `FoundationModel`.

    Args:
        architecture: a name `open_clip.list_models()` knows, or the path of a model config (.json).
        pretrained: a hub tag, a checkpoint's path, or "random" for an untrained model of that architecture.

    Raises:
        ConfigError: unknown architecture.
        ModelError: the weights are missing, unreachable or do not fit.
    """

    unknown_floor = -1.0  # off: cosines differ between checkpoints, and none is measured here

    def __init__(self, architecture: str, pretrained: str) -> None:
        self.name = f"openclip:{architecture}/{pretrained}"
        if architecture.endswith(".json"):
            architecture = _register_config(Path(architecture))
        if architecture not in open_clip.list_models():
            raise ConfigError(f"open_clip has no architecture {architecture!r}; see open_clip.list_models()")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)  # "random" is the same model each time: a restarted cloud must fit its pools
                self._model = open_clip.create_model(
                    architecture, pretrained=None if pretrained == "random" else pretrained, device=self._device
                ).eval()
            self._tokenizer = open_clip.get_tokenizer(architecture)
        except Exception as error:
            reason = textwrap.shorten(str(error), 300, placeholder=" ...")  # torch lists every tensor on its own line
            advice = (
                f"the file must be a checkpoint of {architecture}"
                if Path(pretrained).is_file()
                else "weights and tokenizers of the hub need network once"
            )
            raise ModelError(f"cannot load {self.name}: {reason}; {advice}") from error
        config = open_clip.get_model_preprocess_cfg(self._model)
        size = config["size"]
        self.input_size = size if isinstance(size, int) else size[0]
        square = isinstance(size, int) or size[0] == size[1]
        usual = config["resize_mode"] == "shortest" and config["interpolation"] in ("bicubic", "bilinear")
        if not (square and usual):  # SigLIP, for one, squashes its images
            raise ModelError(f"{self.name} wants a preprocessing that is not supported: {config}")
        self.preprocess = Preprocess(
            self.input_size, tuple(config["mean"]), tuple(config["std"]), config["interpolation"]
        )
        self.temperature = 1 / self._model.logit_scale.exp().item()  # pyright: ignore
        self.dim = self._embed_text(["a"]).shape[1]

    @classmethod
    def from_uri(cls, rest: str) -> OpenClip:
        config, of_config, checkpoint = rest.partition(".json/")
        architecture, _, pretrained = (config + ".json", "", checkpoint) if of_config else rest.partition("/")
        if not architecture or not pretrained:
            raise ConfigError(f"openclip:{rest}: use openclip:ARCHITECTURE/TAG or openclip:ARCHITECTURE//PATH")
        looks_like_path = "/" in pretrained or Path(pretrained).suffix in (".safetensors", ".pt", ".bin")
        if looks_like_path and not Path(pretrained).is_file():
            raise ModelError(f"there is no checkpoint {pretrained}")
        return cls(architecture, pretrained)

    @torch.inference_mode()
    def embed(self, batch: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(batch).to(self._device)  # (B, 3, S, S)
        embeddings = self._model.encode_image(images, normalize=True)  # pyright: ignore[reportCallIssue]
        return embeddings.float().cpu().numpy()

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        return self.embed(self.preprocess.batch(images))

    def embed_labels(self, labels: Sequence[str]) -> np.ndarray:
        prompted = [self._embed_text([prompt.format(label) for label in labels]) for prompt in PROMPTS]
        mean = np.mean(prompted, axis=0)  # (K, D)
        return (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32)

    def label_warnings(self, labels: Sequence[str]) -> list[str]:
        return []  # an open-vocabulary text tower has no list of names to be far from

    def imagenet_space(self) -> np.ndarray:
        info = ImageNetInfo()
        return self.embed_labels([info.index_to_description(i).split(",")[0] for i in range(1000)])

    @torch.inference_mode()
    def _embed_text(self, texts: Sequence[str], batch: int = 256) -> np.ndarray:
        parts = [
            self._model.encode_text(  # pyright: ignore[reportCallIssue]
                self._tokenizer(list(texts[i : i + batch])).to(self._device), normalize=True
            )
            for i in range(0, len(texts), batch)
        ]
        return torch.cat(parts).float().cpu().numpy()  # (K, D)


def _register_config(path: Path) -> str:
    """Makes a model config on disk known to open_clip; returns the architecture's name."""
    try:
        json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the open_clip model config {path}: {error}") from error
    open_clip.add_model_config(path)
    return path.stem
