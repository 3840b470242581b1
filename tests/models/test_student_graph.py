"""Students: version 0, and the exported graph against torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from edgefm.models.backbone_graphs import trunk_graph
from edgefm.models.backbones import Tail, build_backbone
from edgefm.models.errors import ConfigError, ModelError
from edgefm.models.foundation import build_pool
from edgefm.models.head import Head
from edgefm.models.runtime import OnnxModel
from edgefm.models.student_graph import (
    FEATURES,
    int8_files,
    student_files,
    tail_to_bytes,
    version0_head,
)
from edgefm.models.students import DEFAULT_STUDENT, INT8_SUFFIX, PROFILES, StudentProfile, student_profile
from edgefm.models.versions import GRAPH_FILE, HEAD_FILE, TAIL_FILE, TRUNK_FILE


class Student(torch.nn.Module):
    """Backbone and head as one torch module: (B, 3, S, S) -> (B, D) L2-normalised. The reference for the export."""

    def __init__(self, profile: StudentProfile, head: Head, tail: Tail | None = None) -> None:
        super().__init__()
        self.backbone = build_backbone(profile.backbone)
        if tail is not None:
            self.backbone.load_state_dict(dict(tail.named_parameters()), strict=False)
        self.head = torch.nn.Linear(*head.weight.shape)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(head.weight.T))
            self.head.bias.copy_(torch.from_numpy(head.bias))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.head(self.backbone(images)), dim=1)


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder / GRAPH_FILE


def _random_head(profile: StudentProfile, dim: int, seed: int = 0) -> Head:
    rng = np.random.default_rng(seed)
    return Head(rng.normal(size=(profile.feature_dim, dim)).astype(np.float32), np.ones(dim, np.float32))


@pytest.fixture(scope="module")
def version0(synclip) -> Callable[[str], Head]:
    """Version 0 of a profile; some seconds each, so made once."""
    return cache(lambda name: version0_head(PROFILES[name], synclip))


def test_four_profiles_in_two_precisions_and_a_default():
    assert len(PROFILES) >= 8 and DEFAULT_STUDENT in PROFILES
    sizes = [(profile.input_size, profile.int8) for profile in PROFILES.values()]
    assert len(set(sizes)) == len(sizes)
    for name, profile in PROFILES.items():
        assert PROFILES[name.removesuffix(INT8_SUFFIX)] == replace(
            profile, name=name.removesuffix(INT8_SUFFIX), int8=False
        )
    assert sorted(PROFILES.values(), key=lambda p: p.input_size) == sorted(PROFILES.values(), key=lambda p: p.macs_m)
    with pytest.raises(ConfigError, match=f"'resnet50'; choose one of {', '.join(PROFILES)}"):
        student_profile("resnet50")


@torch.inference_mode()
@pytest.mark.parametrize("name", ["lite0-64", "lite0-128"])
def test_the_exported_student_is_the_torch_student(synclip, version0, make_picture, tmp_path, name):
    profile, head = PROFILES[name], version0(name)
    exported = OnnxModel(_write(tmp_path, student_files(profile, head)))
    reference = Student(profile, head).eval()
    for count in (1, 5):
        batch = profile.preprocess.batch([make_picture(seed, 64 + 40 * seed) for seed in range(count)])
        embeddings = exported(batch)
        assert embeddings.shape == (count, synclip.dim) and embeddings.dtype == np.float32
        assert np.abs(embeddings - reference(torch.from_numpy(batch)).numpy()).max() <= 1e-4
        assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
        features = exported(batch, FEATURES)
        assert features.shape == (count, profile.feature_dim)
        assert np.abs(features - reference.backbone(torch.from_numpy(batch)).numpy()).max() <= 1e-4
        assert np.abs(head(features) - embeddings).max() <= 1e-5  # training computes what the device computes


def test_only_the_head_s_file_differs_between_versions(synclip, tmp_path, make_picture):
    profile = PROFILES["lite0-64"]
    files, others = (student_files(profile, _random_head(profile, 32, seed)) for seed in (0, 1))
    assert files.keys() == others.keys() == {GRAPH_FILE, TRUNK_FILE, TAIL_FILE, HEAD_FILE}
    assert {name for name in files if files[name] != others[name]} == {HEAD_FILE}
    assert files == student_files(profile, _random_head(profile, 32))  # made again, byte for byte
    assert len(files[GRAPH_FILE]) < 300_000  # weights lie beside the graph
    batch = profile.preprocess.batch([make_picture(0)])
    first = OnnxModel(_write(tmp_path / "a", files))(batch)
    swapped = OnnxModel(_write(tmp_path / "b", files | {HEAD_FILE: others[HEAD_FILE]}))(batch)
    whole = OnnxModel(_write(tmp_path / "c", others))(batch)
    assert np.array_equal(swapped, whole) and np.abs(swapped - first).max() > 0.01


@torch.inference_mode()
def test_a_trained_tail_is_two_files_away(tmp_path, make_picture, read_tail):
    """Trunk activations through a changed tail and a head: torch, and the old graph with the new files beside it."""
    profile, head = PROFILES["lite0-64"], _random_head(PROFILES["lite0-64"], 32)
    tail, files = Tail(profile.backbone), student_files(profile, head)
    assert files[TAIL_FILE] == tail_to_bytes(profile, tail)
    generator = torch.Generator().manual_seed(0)
    for parameter in tail.parameters():  # biases of few channels too: none of the tail may hide in the graph
        parameter += (0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)).nan_to_num()
        parameter.copy_(parameter.half().float())
    data = tail_to_bytes(profile, tail)
    read = read_tail(profile, data)
    assert tail_to_bytes(profile, read) == data != files[TAIL_FILE]
    batch = profile.preprocess.batch([make_picture(seed) for seed in range(3)])
    activations = OnnxModel(trunk_graph(profile.backbone, profile.input_size))(batch)
    embeddings = head(read(torch.from_numpy(activations)).numpy())
    student = OnnxModel(_write(tmp_path / "trained", files | {TAIL_FILE: data}))
    assert np.abs(student(batch) - embeddings).max() <= 1e-4
    assert np.abs(Student(profile, head, tail).eval()(torch.from_numpy(batch)).numpy() - embeddings).max() <= 1e-4
    assert np.abs(OnnxModel(_write(tmp_path / "before", files))(batch) - embeddings).max() > 1e-3


def _spelled_out(graph: Path, batch: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


@torch.inference_mode()
def test_a_quantised_student_computes_in_int8_what_the_float_one_does(version0, tmp_path, make_picture):
    """With the pretrained tail and with another; calibrated on pictures that it is not tried on."""
    profile, head = PROFILES["lite0-64-int8"], version0("lite0-64")
    pictures = profile.preprocess.batch([make_picture(seed) for seed in range(40)])
    other = Tail(profile.backbone)
    for parameter in other.parameters():
        parameter.mul_(0.9)
    activations = OnnxModel(trunk_graph(profile.backbone, profile.input_size))(pictures[:8])
    for name, tail in (("pretrained", None), ("other", other)):
        files = int8_files(profile, head, tail, [pictures[8:24], pictures[24:]])
        assert files.keys() == {GRAPH_FILE, HEAD_FILE}
        assert len(files[GRAPH_FILE]) < 0.3 * 4 * profile.parameters_m * 1e6  # a byte a weight and some scales
        graph = _write(tmp_path / name, files)
        found = OnnxModel(graph)(pictures[:8])
        exact = head((tail or Tail(profile.backbone))(torch.from_numpy(activations)).numpy())
        assert (found * exact).sum(axis=1).mean() > 0.85 and not np.allclose(found, exact, atol=1e-3)
        # The same numbers on every processor: integer kernels without overflow say what the graph spells out in floats.
        assert (found * _spelled_out(graph, pictures[:8])).sum(axis=1).min() > 0.99
        kinds = Counter(node.op_type for node in onnx.load_from_string(files[GRAPH_FILE]).graph.node)
        assert kinds["QuantizeLinear"] > kinds["Conv"] > 40


@pytest.mark.parametrize("lost", [TRUNK_FILE, TAIL_FILE, HEAD_FILE])
@pytest.mark.parametrize("kept", [None, 0, 1000])
def test_a_student_without_all_its_weights_does_not_load(tmp_path, capfd, lost, kept):
    profile = PROFILES["lite0-64"]
    files = student_files(profile, _random_head(profile, 32))
    graph = _write(tmp_path, files)
    if kept is None:
        (tmp_path / lost).unlink()
    else:
        (tmp_path / lost).write_bytes(files[lost][:kept])
    with pytest.raises(ModelError, match=rf"cannot load .*{GRAPH_FILE}: .*({lost}|out of bounds|does not exist)"):
        OnnxModel(graph)
    assert capfd.readouterr().err == ""


def test_a_head_survives_its_file():
    head = _random_head(PROFILES["lite0-64"], 24)
    data = head.to_bytes()
    read = Head.from_bytes(data, 24)
    assert np.array_equal(read.weight, head.weight) and np.array_equal(read.bias, head.bias)
    assert read.weight.shape == (1280, 24) and read.to_bytes() == data and len(data) == 2 * (1280 + 1) * 24


def test_a_head_gives_normalised_embeddings_and_zero_stays_zero():
    head = Head(np.eye(4, 3, dtype=np.float32), np.zeros(3, np.float32))
    made = head(np.array([[3.0, 4.0, 0.0, 9.0], [0.0, 0.0, 0.0, 1.0]], np.float32))
    assert np.allclose(made, [[0.6, 0.8, 0.0], [0.0, 0.0, 0.0]])


def test_version_0_fits_fp16(synclip, version0):
    head = version0("lite0-64")
    assert head.weight.shape == (1280, synclip.dim) and head.bias.shape == (synclip.dim,)
    assert np.isfinite(head.weight).all() and np.isfinite(head.bias).all() and np.abs(head.weight).max() > 1e-3
    assert np.array_equal(head.weight, version0_head(PROFILES["lite0-64"], synclip).weight)


@pytest.mark.parametrize(("environment", "least"), [("wild", 0.77), ("town", 0.73)])
def test_version_0_recognises_without_having_seen_a_sample(synclip, version0, validation, tmp_path, environment, least):
    """The design's prototype had 0.81 and 0.76; a student of 20 labels that knows nothing has 0.05."""
    profile = PROFILES["lite0-128"]
    student = OnnxModel(_write(tmp_path, student_files(profile, version0(profile.name))))
    images, truth = validation(environment)
    batches = [images[i : i + 25] for i in range(0, len(images), 25)]
    embeddings = np.concatenate([student(profile.preprocess.batch(batch)) for batch in batches])
    pool = build_pool(synclip, sorted(set(truth)))
    answers = np.array([pool.labels[best] for best in pool.recognise(embeddings).indices[:, 0]])
    assert (answers == truth).mean() >= least
