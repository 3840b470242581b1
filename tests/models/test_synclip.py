"""The embedded foundation model: how well it recognises, what it refuses, and what it says of its limits."""

from __future__ import annotations

import re

import numpy as np
import pytest
from edgefm.models.backbone_graphs import feature_graph
from edgefm.models.errors import ConfigError, LabelError
from edgefm.models.foundation import build_pool, load_foundation_model
from edgefm.models.foundation.synclip import BACKBONE, shipped_means
from edgefm.models.images import Preprocess
from edgefm.models.pool import UNKNOWN, normalise
from edgefm.models.runtime import OnnxModel
from timm.data.imagenet_info import ImageNetInfo


@pytest.fixture(scope="module")
def embedded(synclip, validation):
    """Name of an environment -> (N, D) embeddings of its `val` images, and their labels."""
    found = {}
    for name in ("wild", "town"):
        images, truth = validation(name)
        parts = [synclip.embed_images(images[i : i + 16]) for i in range(0, len(images), 16)]
        found[name] = np.concatenate(parts), truth
    return found


@pytest.mark.parametrize(("names", "least"), [(["wild"], 0.84), (["town"], 0.82), (["wild", "town"], 0.80)], ids=str)
def test_recognises_labels_new_to_the_pool(synclip, embedded, names, least):
    embeddings = np.concatenate([embedded[name][0] for name in names])
    truth = np.concatenate([embedded[name][1] for name in names])
    pool = build_pool(synclip, sorted(set(truth)))
    assert synclip.input_size == 160 and len(pool.labels) == 20 * len(names) and len(truth) == 500 * len(names)
    answers = np.array([pool.labels[best] for best in pool.recognise(embeddings, top_k=1).indices[:, 0]])
    accuracy = (answers == truth).mean()
    with_unknown = (np.array(pool.answers(pool.recognise(embeddings))) == truth).mean()
    assert accuracy >= least, accuracy
    assert accuracy - 0.02 <= with_unknown and with_unknown >= least, with_unknown


def test_the_margin_tells_right_answers_from_wrong_ones(synclip, embedded):
    embeddings, truth = embedded["wild"]
    pool = build_pool(synclip, sorted(set(truth)))
    found = pool.recognise(embeddings)
    right = np.array([pool.labels[best] for best in found.indices[:, 0]]) == truth
    surer = found.margins >= np.median(found.margins)
    assert right[surer].mean() > right[~surer].mean() + 0.1


def test_images_of_no_label_are_mostly_unknown(synclip, embedded):
    pool = build_pool(synclip, sorted(set(embedded["wild"][1])))
    known, other = (pool.recognise(embedded[name][0]).unknown.mean() for name in ("wild", "town"))
    assert known < 0.03 and other > 0.3


def test_the_mean_is_the_shipped_one(synclip, make_picture):
    pictures = [make_picture(seed) for seed in range(3)]
    features = OnnxModel(feature_graph(BACKBONE, 160))(Preprocess(160).batch(pictures))
    centred = features - shipped_means()[f"{BACKBONE}-160"]
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    assert np.abs(synclip.embed_images(pictures) - expected).max() < 1e-5


def test_an_image_alone_equals_itself_in_a_batch(synclip, make_picture):
    pictures = [make_picture(seed, 40 + 30 * seed) for seed in range(4)]
    alone = np.concatenate([synclip.embed_images([picture]) for picture in pictures])
    together = synclip.embed_images(pictures)
    assert together.shape == (4, synclip.dim) and together.dtype == np.float32
    assert np.abs(alone - together).max() < 1e-5
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_a_label_s_embedding_does_not_depend_on_the_others(synclip):
    labels = ["cat", "a rather long description of a cup of hot coffee on a wooden table", "rocket"]
    together = synclip.embed_labels(labels)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for label, row in zip(labels, together, strict=True):
        assert np.abs(synclip.embed_labels([label])[0] - row).max() < 1e-5


def test_a_synonym_lies_near_and_a_stranger_far(synclip):
    cat, kitten, truck = synclip.embed_labels(["cat", "kitten", "fire truck"])
    assert cat @ kitten > 0.5 > 0.2 > cat @ truck


def test_a_label_out_of_reach_is_taken_with_a_warning_that_names_the_nearest_class(synclip):
    pool = build_pool(synclip, ["tabby cat", "quantum entanglement"])
    assert pool.labels == ("tabby cat", "quantum entanglement")
    assert np.allclose(np.linalg.norm(pool.embeddings, axis=1), 1, atol=1e-5)
    (warning,) = pool.warnings
    found = re.match(
        r"'quantum entanglement' is out of synclip's reach: the nearest class it knows is '(.+)' \(", warning
    )
    assert found, warning
    info = ImageNetInfo()
    assert any(found[1] in re.split(r",\s*", info.index_to_description(index)) for index in range(1000))


def test_labels_within_reach_get_no_warning(synclip, validation):
    labels = sorted({*validation("wild")[1], *validation("town")[1]})
    assert synclip.label_warnings(labels) == []


def test_a_thousand_labels_build_a_pool(synclip):
    info = ImageNetInfo()
    names = dict.fromkeys(info.index_to_description(index).split(",")[0] for index in range(1000))
    labels = [*(f"small {name}" for name in names), "extra one", "extra two"][:1000]
    assert len(set(labels)) == 1000
    pool = build_pool(synclip, labels)
    assert len(pool.labels) == 1000 and pool.embeddings.shape == (1000, synclip.dim)
    assert np.isfinite(pool.embeddings).all()
    assert len(np.unique(pool.embeddings.round(4), axis=0)) > 950  # names apart stay apart
    assert pool.recognise(pool.embeddings).indices[:, 0].tolist().count(0) < 5


def test_descriptions_are_averaged_with_the_label_and_leave_the_others_alone(synclip):
    texts = ["A grizzly is a large brown bear.", "It has claws and a hump."]
    alone = build_pool(synclip, ["grizzly", "zxqv flooble"])
    pool = build_pool(
        synclip, ["grizzly", "zxqv flooble"], {"grizzly": texts, "owl": ["of another pool"], "zxqv flooble": []}
    )
    described = normalise(synclip.embed_labels(texts).mean(axis=0))
    assert np.allclose(pool.embeddings[0], normalise(alone.embeddings[0] + described), atol=1e-6)
    assert np.array_equal(pool.embeddings[1], alone.embeddings[1]) and pool.embeddings.dtype == np.float32
    assert pool.descriptions == {"grizzly": tuple(texts)} and pool.version != alone.version
    assert (pool.warnings, pool.unknown_floor) == (alone.warnings, alone.unknown_floor) and len(pool.warnings) == 2
    with pytest.raises(LabelError, match="description"):
        build_pool(synclip, ["grizzly"], {"grizzly": ["\0"]})


def test_a_pool_carries_the_model_s_name_and_floor(synclip):
    pool = build_pool(synclip, [" cat ", "dog"])
    assert pool.foundation_model == synclip.name == "synclip"
    assert pool.labels == ("cat", "dog") and pool.unknown_floor == synclip.unknown_floor > 0
    assert pool.answers(pool.recognise(-pool.embeddings[:1])) == [UNKNOWN]


@pytest.mark.parametrize("uri", ["", "clip", "synclip/160", "synclip:99", "SynClip"])
def test_wrong_uris_are_refused(uri):
    with pytest.raises(ConfigError, match=r"use synclip, openclip|synclip has input sizes"):
        load_foundation_model(uri)
