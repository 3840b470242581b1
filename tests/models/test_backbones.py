"""Pretrained backbones: what is folded and rounded computes what timm computes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import timm
import torch
from edgefm.models.backbone_graphs import classifier_rows, feature_graph
from edgefm.models.backbones import _fold_batch_norms, _state, build_backbone
from edgefm.models.errors import ModelError
from edgefm.models.foundation.synclip import BACKBONE, INPUT_SIZES, shipped_means
from edgefm.models.runtime import OnnxModel
from edgefm.models.students import PROFILES, student_profile
from edgefm.models.weights import WEIGHTS

LITE0 = "tf_efficientnet_lite0"


def _unfolded(backbone: str) -> torch.nn.Module:
    model = timm.create_model(backbone)
    model.load_state_dict(_state(backbone))
    model.reset_classifier(0)
    return model.eval()


def _images(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
@pytest.mark.parametrize("backbone", WEIGHTS)
def test_folding_changes_nothing_and_rounding_little(backbone):
    images = _images(4, 96)
    reference, folded = _unfolded(backbone), _unfolded(backbone)
    expected = reference(images)
    _fold_batch_norms(folded)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert (folded(images) - expected).norm() / expected.norm() < 1e-5
    built = build_backbone(backbone)
    assert 0 < (built(images) - expected).norm() / expected.norm() < 1e-2
    assert not built.training
    assert all(torch.equal(p, p.half().float()) for p in built.parameters())


@torch.inference_mode()
def test_the_weights_are_the_pretrained_ones():
    """The classifier that came with the backbone knows its own features: an untrained one would answer at random."""
    whole = timm.create_model(LITE0)
    whole.load_state_dict(_state(LITE0))
    images = _images(8, 64)
    logits = build_backbone(LITE0)(images) @ torch.from_numpy(classifier_rows(LITE0)).T + whole.classifier.bias
    expected = whole.eval()(images)
    assert torch.equal(logits.argmax(dim=1), expected.argmax(dim=1))


@torch.inference_mode()
def test_the_exported_graph_is_the_torch_network():
    exported, reference = OnnxModel(feature_graph(LITE0, 64)), build_backbone(LITE0)
    for count in (1, 5):
        images = _images(count, 64)
        assert np.abs(exported(images.numpy()) - reference(images).numpy()).max() < 1e-4
    (batch, *rest) = onnx.load(feature_graph(LITE0, 64)).graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == "batch" and [d.dim_value for d in rest] == [3, 64, 64]


def test_a_graph_is_exported_once():
    path = feature_graph(LITE0, 64)
    before = path.stat().st_mtime_ns
    assert feature_graph(LITE0, 64) == path and path.stat().st_mtime_ns == before


@torch.inference_mode()
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_the_table_of_students_says_what_they_cost(profile):
    model = _unfolded(profile.backbone)
    multiplications = 0

    def count(module: torch.nn.Module, _: object, made: torch.Tensor) -> None:
        nonlocal multiplications
        assert isinstance(module, torch.nn.Conv2d)
        multiplications += made.shape[2] * made.shape[3] * module.weight.numel()

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    features = model(_images(1, profile.input_size))
    assert features.shape == (1, profile.feature_dim)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(profile.parameters_m, rel=0.01)
    assert multiplications / 1e6 == pytest.approx(profile.macs_m, rel=0.02)
    assert student_profile(profile.name) is profile and profile.preprocess.size == profile.input_size


def test_a_mean_is_shipped_for_every_tower():
    means = shipped_means()
    towers = {(BACKBONE, size) for size in INPUT_SIZES} | {(p.backbone, p.input_size) for p in PROFILES.values()}
    assert means.keys() == {f"{backbone}-{size}" for backbone, size in towers}
    for mean in means.values():
        assert mean.shape == (1280,) and mean.dtype == np.float32
        assert np.isfinite(mean).all() and mean.min() >= 0 and mean.mean() > 0.01  # features follow a ReLU6


def test_a_backbone_without_packaged_weights_is_refused():
    with pytest.raises(ModelError, match=r"'resnet18'; there are tf_efficientnet_lite0, tf_efficientnet_lite2"):
        classifier_rows("resnet18")
