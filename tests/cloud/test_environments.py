"""What environments hold, what a start makes of it, and that no ground truth gets into it."""

from __future__ import annotations

import asyncio
import shutil
import tarfile
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from edgefm.cloud.customize import Outcome
from edgefm.cloud.environments import Environments
from edgefm.cloud.label_pools import BASE
from edgefm.cloud.trainer import customize
from edgefm.deploy.camera import DAY, walk
from edgefm.edge.sources import open_source
from edgefm.models.errors import InputError
from edgefm.models.images import decode_image
from edgefm.models.versions import HEAD_FILE, StudentManifest, sha256_hex

from .conftest import FRAMES, LABELS, NEVER, Pictures


def without_date(manifest: StudentManifest) -> str:
    return manifest.model_copy(update={"created_at": ""}).to_json()


def test_a_registration_that_was_cut_short_is_repeated(tmp_path: Path, synclip, pictures: Pictures, cloud_config, keep):
    """Killed while version 0 was being exported: the pool is there and the student is not."""

    async def first() -> None:
        environments = Environments(synclip, cloud_config(tmp_path))
        await environments.start()
        await environments.register("yard", LABELS[:2], "")
        await environments.close()

    async def second() -> None:
        environments = Environments(synclip, cloud_config(tmp_path))
        await environments.start()
        with pytest.raises(InputError, match="no device has registered"):
            environments.student("yard")
        with pytest.raises(InputError, match="no device has registered"):
            await keep(environments, "yard", pictures.images[0], pictures.embeddings[0])
        await environments.register("yard", LABELS[:2], "")
        assert environments.student("yard").version == 0
        await environments.close()

    asyncio.run(first())
    folder = tmp_path / "registry" / "environments" / "yard"
    shutil.rmtree(folder / "versions")
    (folder / "current").unlink()
    asyncio.run(second())


def test_samples_need_an_environment_and_a_true_propensity(
    tmp_path: Path, synclip, pictures: Pictures, cloud_config, keep
):
    async def work() -> None:
        environments = Environments(synclip, replace(cloud_config(tmp_path), labels=LABELS))
        await environments.start()
        await environments.register("yard", (), "")
        assert environments.pool("yard")[0].labels == LABELS
        for name in (BASE, "street"):
            with pytest.raises(InputError):
                await keep(environments, name, pictures.images[0], pictures.embeddings[0])
        for propensity in (0.0, -0.5, 1.5, float("nan"), float("inf")):
            with pytest.raises(InputError, match="propensity"):
                await keep(environments, "yard", pictures.images[0], pictures.embeddings[0], propensity)
        assert environments.samples_labelled("yard") == environments.store.count("yard") == 0
        assert environments.store.count(BASE) == 0
        for duplicate in (False, True):
            kept = await keep(environments, "yard", pictures.images[0], pictures.embeddings[0], 0.02)
            assert kept == (sha256_hex(pictures.images[0]), duplicate)
        assert environments.samples_labelled("yard") == 1
        assert environments.store.samples("yard").propensities.tolist() == [0.02]
        await environments.close()

    asyncio.run(work())


def test_an_environment_whose_only_version_is_damaged_starts_anew(tmp_path: Path, synclip, caplog, cloud_config):
    async def work() -> None:
        environments = Environments(synclip, cloud_config(tmp_path))
        await environments.start()
        await environments.register("yard", LABELS[:2], "")
        whole = environments.student("yard")
        await environments.close()
        folder = tmp_path / "registry" / "environments" / "yard"
        manifest = folder / "versions" / "000000.json"
        manifest.write_text(manifest.read_text()[:100])
        restarted = Environments(synclip, cloud_config(tmp_path))
        await restarted.start()
        with pytest.raises(InputError, match="unknown environment 'yard'"):
            restarted.student("yard")
        await restarted.register("yard", LABELS[:2], "")
        assert without_date(restarted.student("yard")) == without_date(whole)
        assert (folder / "versions.damaged-0" / "000000.json").exists()  # nothing is thrown away
        await restarted.close()

    asyncio.run(work())
    assert any("event=no_whole_version environment=yard" in record.getMessage() for record in caplog.records)


# ---- no ground truth


def plant(root: Path, items: Iterable[tuple[str, str, bytes]]) -> None:
    for label, name, data in items:
        path = root / "train" / label / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def two_trees(folder: Path, items: list[tuple[str, str, bytes]]) -> tuple[Path, Path]:
    """The same images twice, the second time with the names of their folders permuted, each to another one."""
    labels = sorted({label for label, _, _ in items})
    other = dict(zip(labels, (*labels[1:], labels[0]), strict=True))
    plant(folder / "true", items)
    plant(folder / "permuted", [(other[label], name, data) for label, name, data in items])
    true = {frame.encoded: frame.sample_id for frame in open_source(folder / "true", "train/")}
    permuted = {frame.encoded: frame.sample_id for frame in open_source(folder / "permuted", "train/")}
    assert true.keys() == permuted.keys() and all(true[image] != permuted[image] for image in true)
    return folder / "true", folder / "permuted"


@pytest.fixture
def stream(keep) -> Callable[[Environments, Path], Awaitable[int]]:
    """What a device and the service do with a stream, on an environment named after nothing that tells the tree."""

    async def send(environments: Environments, tree: Path) -> int:
        labels = sorted(path.name for path in (tree / "train").iterdir())
        await environments.register("yard", labels, "")
        frames = 0
        for frame in open_source(tree, "train/", shuffle_seed=0):
            embedding = environments.model.embed_images([decode_image(frame.encoded)])[0]
            await keep(environments, "yard", frame.encoded, embedding)
            frames += 1
        return frames

    return send


def test_no_ground_truth_reaches_training_or_calibration(
    tmp_path: Path, shared_data: Path, synclip, cloud_config, stream
):
    """Tiny-ImageNet, 8 images of each of 20 labels: permuting the folders' names changes no byte of what is learnt."""
    items: list[tuple[str, str, bytes]] = []
    taken: dict[str, int] = {}
    with tarfile.open(shared_data / "tiny-imagenet-wild.tar") as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and parts[0] == "train" and taken.get(parts[1], 0) < 8:
                taken[parts[1]] = taken.get(parts[1], 0) + 1
                file = tar.extractfile(member)
                assert file is not None
                items.append((parts[1], parts[2], file.read()))
    assert len(items) == 160 and len(taken) == 20
    trees = two_trees(tmp_path, items)

    async def learn(tree: Path, data_dir: Path) -> tuple[dict[str, bytes], Outcome, str]:
        config = cloud_config(data_dir, first_at=NEVER, tail_from=100, epochs=1, views=2)
        environments = Environments(synclip, config)
        await environments.start()
        frames = await stream(environments, tree)
        outcome, files, parent = await customize(
            environments.registry, data_dir / "store", "yard", config.customization
        )
        await environments.close()
        assert outcome.samples == frames == 160 and len(outcome.calibration.margins) > 10
        version0 = next(ref for ref in parent.files if ref.name == HEAD_FILE)
        assert sha256_hex(files[HEAD_FILE]) != version0.sha256
        return files, outcome, without_date(parent)

    async def both() -> list[tuple[dict[str, bytes], Outcome, str]]:
        return await asyncio.gather(*(learn(tree, tmp_path / f"cloud-{tree.name}") for tree in trees))

    true, permuted = asyncio.run(both())
    assert true == permuted


def test_no_ground_truth_reaches_a_published_version(tmp_path: Path, synclip, cloud_config, stream):
    """The whole way to a published version, on the simulated camera: equal manifests, blobs and calibration."""
    items = [(frame.label, f"{i:03d}.jpg", frame.image_bytes) for i, frame in enumerate(walk(DAY, 0, FRAMES))]
    trees = two_trees(tmp_path, items)

    async def learn(tree: Path, data_dir: Path) -> tuple[str, str, dict[str, bytes]]:
        environments = Environments(synclip, cloud_config(data_dir, first_at=len(items)))
        await environments.start()
        labels = sorted(path.name for path in (tree / "train").iterdir())
        await environments.register("yard", labels, "")
        changed = environments.watch("yard")
        assert await stream(environments, tree) == len(items)
        await asyncio.wait_for(changed.wait(), 180)
        manifest = environments.student("yard")
        assert manifest.version == 1 and manifest.calibration.margins
        await environments.close()
        blobs = {path.name: path.read_bytes() for path in (data_dir / "registry" / "blobs").iterdir()}
        return without_date(environments.registry.manifest("yard", 0)), without_date(manifest), blobs

    async def both() -> list[tuple[str, str, dict[str, bytes]]]:
        return await asyncio.gather(*(learn(tree, tmp_path / f"cloud-{tree.name}") for tree in trees))

    true, permuted = asyncio.run(both())
    assert true == permuted
