from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from edgefm.models.errors import ConfigError, ModelError
from edgefm.models.foundation import build_pool, load_foundation_model
from edgefm.models.images import decode_image
from edgefm.models.runtime import OnnxModel
from edgefm.models.student_graph import HEAD_FILE, Head, Student, student_files, version0_head
from edgefm.models.students import PROFILES
from edgefm.models.versions import GRAPH_FILE


def _val(path: Path) -> tuple[list, np.ndarray]:
    images, truth = [], []
    with tarfile.open(path) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and parts[0] == "val" and (file := tar.extractfile(member)):
                images.append(decode_image(file.read()))
                truth.append(parts[1])
    return images, np.array(truth)


def _accuracy(model, embeddings: np.ndarray, truth: np.ndarray) -> float:
    pool = build_pool(model, sorted(set(truth)))
    return float((np.array(pool.answers(pool.recognise(embeddings))) == truth).mean())


def test_synclip_recognises_labels_new_to_the_pool(shared_data, synclip):
    found = {}
    for name, least in (("wild", 0.84), ("town", 0.82)):
        images, truth = _val(shared_data / f"tiny-imagenet-{name}.tar")
        embeddings = np.concatenate([synclip.embed_images(images[i : i + 16]) for i in range(0, len(images), 16)])
        assert _accuracy(synclip, embeddings, truth) >= least
        found[name] = embeddings, truth
    both = [np.concatenate(part) for part in zip(*found.values(), strict=True)]
    assert _accuracy(synclip, *both) >= 0.80


def test_a_label_out_of_reach_is_taken_with_a_warning(synclip):
    pool = build_pool(synclip, ["cat", "quantum entanglement"])
    assert pool.labels == ("cat", "quantum entanglement")
    assert len(pool.warnings) == 1 and "quantum entanglement" in pool.warnings[0]


def test_an_image_alone_equals_itself_in_a_batch(synclip, make_picture):
    pictures = [make_picture(seed) for seed in range(4)]
    alone = np.concatenate([synclip.embed_images([picture]) for picture in pictures])
    assert np.abs(alone - synclip.embed_images(pictures)).max() < 1e-5


@pytest.mark.parametrize("uri", ["clip", "synclip:99", "openclip:ViT-B-32"])
def test_wrong_uris_are_refused(uri):
    with pytest.raises(ConfigError):
        load_foundation_model(uri)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "edgefm-tiny.json"
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    path.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    return path


def test_open_clip_from_a_checkpoint_on_disk(tiny_clip, make_picture):
    open_clip.add_model_config(tiny_clip)
    torch.manual_seed(0)
    reference = open_clip.create_model("edgefm-tiny").eval()
    checkpoint = tiny_clip.with_name("weights.pt")
    torch.save(reference.state_dict(), checkpoint)
    model = load_foundation_model(f"openclip:{tiny_clip}/{checkpoint}")
    pictures = [make_picture(seed, 40) for seed in range(3)]
    transform = open_clip.image_transform(32, is_train=False, mean=None, std=None, interpolation="bicubic")
    with torch.inference_mode():
        theirs = reference.encode_image(torch.stack([transform(picture) for picture in pictures]), normalize=True)
    assert np.abs(model.embed_images(pictures) - theirs.numpy()).max() < 1e-5
    assert model.embed_labels(["cat", "dog"]).shape == (2, model.dim) == (2, 32)


def test_a_missing_or_damaged_checkpoint_is_refused(tiny_clip, tmp_path):
    with pytest.raises(ModelError, match="no checkpoint"):
        load_foundation_model(f"openclip:{tiny_clip}/{tmp_path}/none.pt")
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot load"):
        load_foundation_model(f"openclip:{tiny_clip}/{damaged}")


def test_the_exported_student_is_the_torch_student(synclip, tmp_path, make_picture):
    assert len(PROFILES) >= 4
    profile = PROFILES["lite0-64"]
    head = version0_head(profile, synclip)
    files = student_files(profile, head)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    exported, reference = OnnxModel(tmp_path / GRAPH_FILE), Student(profile, head).eval()
    for count in (1, 5):
        batch = profile.preprocess.batch([make_picture(seed) for seed in range(count)])
        with torch.inference_mode():
            assert np.abs(exported(batch) - reference(torch.from_numpy(batch)).numpy()).max() <= 1e-4
    other = student_files(profile, Head(head.weight * 2, head.bias))
    assert {name for name in files if files[name] != other[name]} == {HEAD_FILE}
    assert np.array_equal(Head.from_bytes(files[HEAD_FILE], synclip.dim).weight, head.weight)
