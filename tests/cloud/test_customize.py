"""The whole cloud side in one process: label with the real FM, store, learn in a child process, publish."""

from __future__ import annotations

import asyncio
import tarfile
from pathlib import Path

import pytest
from edgefm.cloud.config import CloudConfig, CustomizationConfig
from edgefm.cloud.environments import Environments
from edgefm.cloud.trainer import customize
from edgefm.edge.sources import open_source
from edgefm.models.images import decode_image

LABELS = ("African elephant", "bullfrog", "goldfish", "koala", "ladybug", "snail")
PER_LABEL = 14


@pytest.fixture(scope="module")
def trees(tmp_path_factory, shared_data) -> tuple[Path, Path]:
    """The same images twice, the second time with the names of their folders permuted."""
    true, permuted = tmp_path_factory.mktemp("true"), tmp_path_factory.mktemp("permuted")
    other = dict(zip(LABELS, (*LABELS[1:], LABELS[0]), strict=True))
    taken = dict.fromkeys(LABELS, 0)
    with tarfile.open(shared_data / "tiny-imagenet-wild.tar") as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and parts[0] == "train" and taken.get(parts[1], PER_LABEL) < PER_LABEL:
                taken[parts[1]] += 1
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                for root, label in ((true, parts[1]), (permuted, other[parts[1]])):
                    path = root / "train" / label / parts[2]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
    return true, permuted


def _learn(tree: Path, data_dir: Path, synclip) -> tuple[bytes, str]:
    config = CloudConfig(
        data_dir=data_dir, student="lite0-64", customization=CustomizationConfig(first_at=10_000, threads=1)
    )

    async def work() -> tuple[bytes, str]:
        environments = Environments(synclip, config)
        await environments.start()
        labels = sorted({path.name for path in (tree / "train").iterdir()})
        await environments.register("yard", labels, "")
        for frame in open_source(tree, "train/", shuffle_seed=0):
            embedding = synclip.embed_images([decode_image(frame.encoded)])[0]
            await environments.keep("yard", frame.encoded, embedding, 1.0, "device")
        outcome, head, parent = await customize(environments.registry, data_dir / "store", "yard", config.customization)
        assert parent.version == 0 and outcome.samples == len(LABELS) * PER_LABEL
        await environments.close()
        return head, repr(outcome)

    return asyncio.run(work())


def test_no_ground_truth_reaches_training_or_calibration(trees, tmp_path, synclip):
    true, permuted = trees
    assert _learn(true, tmp_path / "a", synclip) == _learn(permuted, tmp_path / "b", synclip)
