"""Another FM through the same service: a tiny open_clip model, from a config and a checkpoint on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from edgefm.cloud.config import CloudConfig
from edgefm.models.errors import ConfigError
from edgefm.models.foundation import load_foundation_model
from edgefm.models.images import decode_image, encode_jpeg
from edgefm.models.pool import LabelPool
from edgefm.models.versions import StudentManifest
from edgefm.proto.v1 import edgefm_pb2 as pb

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
LABELS = ("cat", "temple", "rocket")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, Path]:
    """The model's config, and the weights of a randomly initialised model saved beside it."""
    folder = tmp_path_factory.mktemp("openclip")
    config, weights = folder / "tiny-clip.json", folder / "weights.pt"
    config.write_text(json.dumps(TINY))
    open_clip.add_model_config(config)
    with torch.random.fork_rng():
        torch.manual_seed(5)  # not the seed of `random`
        torch.save(open_clip.create_model(config.stem).state_dict(), weights)
    return config, weights


def test_a_checkpoint_from_disk_serves_a_device(checkpoint: tuple[Path, Path], tmp_path: Path, serve, make_picture):
    config, weights = checkpoint
    uri = f"openclip:{config}/{weights}"
    images = [encode_jpeg(make_picture(i)) for i in range(3)]
    cloud = CloudConfig(tmp_path / "cloud", foundation_model=uri, port=0)
    with serve(cloud) as served:
        registered = served.register("yard", *LABELS, student_profile="lite0-64")
        assert registered.foundation_model == uri
        manifest = StudentManifest.from_json(registered.student.manifest_json)
        assert (manifest.embedding_dim, manifest.profile, manifest.version) == (32, "lite0-64", 0)
        queries = [pb.RecognizeRequest(query_id=i, environment="yard", image=image) for i, image in enumerate(images)]
        answers = {answer.query_id: answer for answer in served.stub.Recognize(iter(queries), timeout=60)}
        chunks = served.stub.Fetch(pb.FetchRequest(sha256=registered.pool.file.sha256))
        pool = LabelPool.from_bytes(b"".join(chunk.data for chunk in chunks))

    # Asked directly, the saved weights give the same answers; other random weights do not.
    same = load_foundation_model(uri)
    assert pool.foundation_model == uri and pool.labels == LABELS
    np.testing.assert_allclose(pool.embeddings, same.embed_labels(LABELS), atol=1e-5)
    decoded = [decode_image(image) for image in images]
    direct = pool.recognise(same.embed_images(decoded), 3)
    for row in range(3):
        answer = answers[row]
        assert not answer.HasField("error") and not answer.unknown
        assert [match.label for match in answer.matches] == [LABELS[index] for index in direct.indices[row]]
        similarities = [match.similarity for match in answer.matches]
        np.testing.assert_allclose(similarities, direct.similarities[row], atol=1e-4)
    other = load_foundation_model(f"openclip:{config}/random")
    assert np.abs(other.embed_images(decoded) - same.embed_images(decoded)).max() > 0.05


def test_a_folder_made_with_another_fm_is_refused(checkpoint: tuple[Path, Path], tmp_path: Path, serve):
    config, weights = checkpoint
    first = CloudConfig(tmp_path / "cloud", foundation_model=f"openclip:{config}/{weights}", port=0, labels=LABELS)
    with serve(first):
        pass
    other = CloudConfig(tmp_path / "cloud", foundation_model=f"openclip:{config}/random", port=0)
    with (
        pytest.raises(ConfigError, match=r"was made with openclip:.*weights\.pt, not openclip:.*/random"),
        serve(other),
    ):
        pass
