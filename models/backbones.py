"""Pretrained image backbones as torch modules, and their export. Needs torch and timm."""

from __future__ import annotations

import logging
import warnings
from functools import cache

import numpy as np
import timm
import torch

from .errors import ModelError
from .weights import OPSET, TAIL_STAGES, weights_path


@cache
def _state(backbone: str) -> dict[str, torch.Tensor]:
    path = weights_path(backbone)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(f"cannot read the weights {path}: {error}") from error
    target = timm.create_model(backbone).state_dict()
    if [tuple(v.shape) for v in loaded.values()] != [tuple(v.shape) for v in target.values()]:
        raise ModelError(f"the weights {path} do not fit {backbone} of timm {timm.__version__}")
    return dict(zip(target, loaded.values(), strict=True))


def build_backbone(backbone: str) -> torch.nn.Module:
    """The pretrained network without its classifier: (B, 3, S, S) -> pooled features (B, F), in eval mode.

    Batch norms are folded into the convolutions before them and the result is rounded to fp16, in which weights are
    stored and sent: what torch computes is what the exported graph computes.
    """
    model = timm.create_model(backbone)
    model.load_state_dict(_state(backbone))
    model.reset_classifier(0)  # pyright: ignore[reportCallIssue]
    _fold_batch_norms(model.eval())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return model


class _Trunk(torch.nn.Module):
    """(B, 3, S, S) -> (B, C, h, w), the input of the tail."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        model = build_backbone(backbone)
        self.stem = torch.nn.Sequential(model.conv_stem, model.bn1, *model.blocks[:-TAIL_STAGES])  # pyright: ignore

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.stem(images)


class Tail(torch.nn.Module):
    """The rest of a backbone: (B, C, h, w) -> pooled features (B, F). Its parameters are named as the backbone's."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        model = build_backbone(backbone)
        first = len(model.blocks) - TAIL_STAGES  # pyright: ignore
        self.blocks = torch.nn.ModuleDict({str(i): model.blocks[i] for i in range(first, first + TAIL_STAGES)})  # pyright: ignore
        self.conv_head, self.activation = model.conv_head, model.bn2

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        for stage in self.blocks.values():
            activations = stage(activations)
        return self.activation(self.conv_head(activations)).mean(dim=(2, 3))  # pyright: ignore


def _fold_batch_norms(model: torch.nn.Module) -> None:
    """In a network where every batch norm follows the convolution defined before it."""
    convolution: torch.nn.Conv2d | None = None
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Conv2d):
            convolution = module
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert convolution is not None, name
            mean, variance = module.running_mean, module.running_var
            assert mean is not None and variance is not None, name
            with torch.no_grad():
                gain = module.weight / torch.sqrt(variance + module.eps)  # (C,)
                bias = module.bias - mean * gain
                convolution.weight.mul_(gain[:, None, None, None])
                convolution.bias = torch.nn.Parameter(bias)
            # timm's BatchNormAct2d carries the activation.
            model.set_submodule(name, getattr(module, "act", torch.nn.Identity()))
            convolution = None


def classifier(backbone: str) -> np.ndarray:
    """The rows of the ImageNet classifier, (1000, F) float32."""
    return _state(backbone)["classifier.weight"].numpy()


def export_features(model: torch.nn.Module, input_size: int) -> bytes:
    """A network as ONNX: `images` (batch, 3, S, S) -> `features` (batch, ...), with a dynamic batch."""
    return exported(model, torch.zeros(2, 3, input_size, input_size), "images", "features", {0: "batch"})


def exported(module: torch.nn.Module, example: torch.Tensor, takes: str, gives: str, dynamic: dict[int, str]) -> bytes:
    """A module of one input and one output as ONNX; `dynamic` names the dimensions of the input that may differ."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporter chatter about its own internals
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[takes],
            output_names=[gives],
            dynamic_shapes=({place: torch.export.Dim(name) for place, name in dynamic.items()},),
            verbose=False,
        )
        assert program is not None  # dynamo=True returns the program
    return program.model_proto.SerializeToString(deterministic=True)


def export_trunk(backbone: str, input_size: int) -> bytes:
    """The part before the tail as ONNX: `images` (batch, 3, S, S) -> `features` (batch, C, h, w)."""
    return export_features(_Trunk(backbone).eval(), input_size)
