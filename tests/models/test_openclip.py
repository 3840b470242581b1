"""open_clip as a foundation model: a tiny architecture, random and from checkpoints on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from edgefm.models.errors import ConfigError, ModelError
from edgefm.models.foundation import build_pool, load_foundation_model

LABELS = ["cat", "cup of coffee", "rocket"]


def _config(path: Path, **vision: object) -> Path:
    tower = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16} | vision
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    path.write_text(json.dumps({"embed_dim": 32, "vision_cfg": tower, "text_cfg": text}))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return _config(tmp_path_factory.mktemp("openclip") / "edgefm-tiny.json")


@pytest.fixture(scope="module")
def reference(config) -> open_clip.CLIP:
    """The model as open_clip itself builds it; its weights are what the checkpoints hold."""
    open_clip.add_model_config(config)
    with torch.random.fork_rng():
        torch.manual_seed(7)  # not the seed of `random`
        model = open_clip.create_model(config.stem).eval()
    assert isinstance(model, open_clip.CLIP)
    return model


@pytest.fixture(scope="module")
def checkpoint(config, reference) -> Path:
    path = config.with_name("weights.safetensors")
    safetensors.torch.save_file(reference.state_dict(), path)
    return path


@torch.inference_mode()
def _expected_labels(reference: open_clip.CLIP) -> np.ndarray:
    """The mean over the prompts of each label's normalised text embedding, normalised again."""
    tokenizer = open_clip.get_tokenizer("edgefm-tiny")
    rows = []
    for label in LABELS:
        texts = [f"a photo of a {label}.", f"a photo of the {label}.", label]
        rows.append(reference.encode_text(tokenizer(texts), normalize=True).mean(dim=0))
    return torch.nn.functional.normalize(torch.stack(rows), dim=1).numpy()


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["safetensors", "state dict", "training checkpoint"])
def test_a_checkpoint_on_disk_gives_open_clips_own_embeddings(
    config, reference, checkpoint, tmp_path, make_picture, kind
):
    path = checkpoint
    if kind != "safetensors":
        path = tmp_path / "weights.pt"
        state = reference.state_dict()
        torch.save(state if kind == "state dict" else {"epoch": 3, "state_dict": state}, path)
    model = load_foundation_model(f"openclip:{config}//{path.relative_to('/')}")
    assert (model.dim, model.input_size) == (32, 32)
    pictures = [make_picture(seed).resize(size) for seed, size in enumerate([(40, 40), (32, 32), (57, 33)])]
    transform = open_clip.image_transform(
        32,
        is_train=False,
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
        interpolation="bicubic",
        resize_mode="shortest",
    )
    theirs = reference.encode_image(torch.stack([transform(picture) for picture in pictures]), normalize=True)
    embedded = model.embed_images(pictures)
    assert embedded.dtype == np.float32 and np.abs(embedded - theirs.numpy()).max() < 1e-5
    assert np.abs(model.embed_labels(LABELS) - _expected_labels(reference)).max() < 1e-5


def test_a_path_may_be_relative(config, checkpoint, monkeypatch):
    monkeypatch.chdir(config.parent)
    absolute = load_foundation_model(f"openclip:{config}/{checkpoint}")
    relative = load_foundation_model(f"openclip:{config.name}/{checkpoint.name}")
    assert np.array_equal(absolute.embed_labels(LABELS), relative.embed_labels(LABELS))


def test_a_path_may_hold_the_word_json(config, checkpoint, tmp_path):
    folder = tmp_path / "made.json.d"
    folder.mkdir()
    copy = folder / "weights.safetensors"
    copy.write_bytes(checkpoint.read_bytes())
    assert load_foundation_model(f"openclip:{config}/{copy}").dim == 32
    with pytest.raises(ModelError, match=r"cannot load openclip:ViT-B-32/.*checkpoint of ViT-B-32"):
        load_foundation_model(f"openclip:ViT-B-32/{copy}")  # found, and of another architecture


def test_a_random_model_is_the_same_each_time_and_not_the_trained_one(config, checkpoint, make_picture):
    random = load_foundation_model(f"openclip:{config}/random")
    trained = load_foundation_model(f"openclip:{config}/{checkpoint}")
    assert random.dim == trained.dim and random.name == f"openclip:{config}/random" != trained.name
    pictures = [make_picture(seed) for seed in range(2)]
    assert np.abs(random.embed_images(pictures) - trained.embed_images(pictures)).max() > 0.01
    again = load_foundation_model(f"openclip:{config}/random")
    assert np.array_equal(again.embed_images(pictures), random.embed_images(pictures))


def test_embeddings_are_normalised_and_alone_equals_in_a_batch(config, checkpoint, make_picture):
    model = load_foundation_model(f"openclip:{config}/{checkpoint}")
    pictures = [make_picture(seed) for seed in range(5)]
    together, texts = model.embed_images(pictures), model.embed_labels(LABELS)
    for rows in (together, texts, model.imagenet_space()):
        assert rows.dtype == np.float32 and np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert np.abs(np.concatenate([model.embed_images([p]) for p in pictures]) - together).max() < 1e-5
    assert np.abs(np.concatenate([model.embed_labels([label]) for label in LABELS]) - texts).max() < 1e-5
    assert model.imagenet_space().shape == (1000, 32)


def test_builds_a_pool_without_a_floor_or_warnings(config, checkpoint, make_picture):
    model = load_foundation_model(f"openclip:{config}/{checkpoint}")
    pool = build_pool(model, LABELS)
    assert pool.foundation_model == f"openclip:{config}/{checkpoint}" and pool.warnings == ()
    assert not pool.recognise(model.embed_images([make_picture(0)])).unknown.any()


# ---- what is refused


@pytest.mark.parametrize(
    "uri", ["openclip:", "openclip:ViT-B-32", "openclip:ViT-B-32/", "openclip:/random", "openclip://weights.pt"]
)
def test_a_uri_without_architecture_or_weights_is_refused(uri):
    with pytest.raises(ConfigError, match="use openclip:ARCHITECTURE/TAG or openclip:ARCHITECTURE//PATH"):
        load_foundation_model(uri)


def test_an_unknown_architecture_is_refused(config):
    with pytest.raises(ConfigError, match="no architecture 'ViT-Z-99'"):
        load_foundation_model("openclip:ViT-Z-99/random")
    with pytest.raises(ConfigError):
        load_foundation_model(f"openclip:{config}")


def test_an_unknown_tag_is_refused():
    with pytest.raises(ModelError, match=r"'laion-nothing' is not a known tag .* need network"):
        load_foundation_model("openclip:ViT-B-32/laion-nothing")


@pytest.mark.parametrize("content", [None, "{", "{}", "[]"])
def test_a_config_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "no-model.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="no-model"):
        load_foundation_model(f"openclip:{path}/random")


@pytest.mark.parametrize("name", ["none.pt", "none.safetensors", "folder/none.bin", "folder/none"])
def test_a_missing_checkpoint_is_refused(config, tmp_path, name):
    with pytest.raises(ModelError, match=f"there is no checkpoint {tmp_path / name}"):
        load_foundation_model(f"openclip:{config}/{tmp_path / name}")


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "another architecture", "tensors missing"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_checkpoint_is_refused(config, reference, tmp_path, kind, suffix):
    path = tmp_path / f"weights{suffix}"
    state = dict(reference.state_dict())
    if kind == "another architecture":
        state = {name: torch.cat([tensor, tensor]) if tensor.ndim else tensor for name, tensor in state.items()}
    elif kind == "tensors missing":
        state = dict(list(state.items())[:-3])
    if suffix == ".pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    data = path.read_bytes()
    if kind in ("text", "truncated", "empty"):
        path.write_bytes({"text": b"not weights", "truncated": data[: len(data) // 2], "empty": b""}[kind])
    with pytest.raises(
        ModelError, match=f"cannot load openclip:{config}/{path}: .*be a checkpoint of edgefm-tiny"
    ) as at:
        load_foundation_model(f"openclip:{config}/{path}")
    assert "\n" not in str(at.value) and len(str(at.value)) < 800


def test_a_preprocessing_that_is_not_ours_is_refused(tmp_path):
    oblong = _config(tmp_path / "edgefm-oblong.json", image_size=[32, 48])
    with pytest.raises(ModelError, match="preprocessing that is not supported"):
        load_foundation_model(f"openclip:{oblong}/random")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_it_embeds_as_on_a_cpu(config, make_picture, monkeypatch):
    there = load_foundation_model(f"openclip:{config}/random")
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: False)
        here = load_foundation_model(f"openclip:{config}/random")
    pictures = [make_picture(seed) for seed in range(3)]
    assert np.abs(there.embed_images(pictures) - here.embed_images(pictures)).max() < 1e-3
    assert np.abs(there.embed_labels(["a fox", "a lemon"]) - here.embed_labels(["a fox", "a lemon"])).max() < 1e-3
