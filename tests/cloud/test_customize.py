"""Customization as it runs: the real FM's labels in a real store, a real student, a child process, gate and registry."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from edgefm.cloud.config import CloudConfig, CustomizationConfig
from edgefm.cloud.customize import RESULT_FILE, Job, Outcome, load_data
from edgefm.cloud.environments import BASE, Environments
from edgefm.cloud.learning import fit_closed_form, held_out_mask, judge
from edgefm.cloud.recognition import compare
from edgefm.cloud.store import Kept, NewSample, SampleStore
from edgefm.cloud.trainer import CustomizationError, Past, Schedule, customize
from edgefm.deploy.camera import DAY, PHOTOGRAPHS, walk
from edgefm.edge.sources import open_source
from edgefm.models.errors import InputError
from edgefm.models.head import Head
from edgefm.models.images import decode_image
from edgefm.models.pool import normalise
from edgefm.models.versions import GRAPH_FILE, HEAD_FILE, TAIL_FILE, TRUNK_FILE, StudentManifest, sha256_hex
from pydantic import TypeAdapter

LABELS = tuple(sorted({photograph.label for photograph in PHOTOGRAPHS}))
FRAMES = 120
NEVER = 1_000_000
ONE_THREAD = CustomizationConfig(threads=1, tail_from=NEVER)


@dataclass(frozen=True)
class Pictures:
    """Encoded images with what the real FM says of them."""

    images: list[bytes]
    embeddings: np.ndarray  # (N, D)


@pytest.fixture(scope="module")
def pictures(synclip) -> Pictures:
    images = [frame.image_bytes for frame in walk(DAY, 0, FRAMES)]
    return Pictures(images, np.vstack([synclip.embed_images([decode_image(image)]) for image in images]))


def cloud_config(data_dir: Path, **customization: object) -> CloudConfig:
    settings = replace(ONE_THREAD, **customization)
    return CloudConfig(data_dir=data_dir, student="lite0-64", customization=settings)


async def keep(
    environments: Environments, name: str, image: bytes, embedding: np.ndarray, propensity: float = 1.0
) -> Kept:
    (found,) = compare(embedding[None], environments.pool(name)[0], [1])
    return await environments.keep(NewSample(name, image, found.labelled, propensity, "device"))


async def keep_all(environments: Environments, name: str, images: Iterable[bytes], embeddings: np.ndarray) -> None:
    for image, embedding in zip(images, embeddings, strict=True):
        await keep(environments, name, image, embedding)


async def until(happened: Callable[[], bool], timeout_s: float = 180) -> None:
    async def poll() -> None:
        while not happened():
            await asyncio.sleep(0.05)

    await asyncio.wait_for(poll(), timeout_s)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, synclip, pictures: Pictures):
    """A data folder with one environment, 120 labelled frames and version 0, and nothing learnt yet."""
    data_dir = tmp_path_factory.mktemp("learnt")

    async def work() -> Environments:
        environments = Environments(synclip, cloud_config(data_dir, first_at=NEVER))
        await environments.start()
        await environments.register("yard", LABELS, "")
        await keep_all(environments, "yard", pictures.images, pictures.embeddings)
        await environments.close()
        return environments

    return data_dir, asyncio.run(work()).registry


def job_for(learnt, folder: Path) -> Job:
    """The job `trainer.customize` would write, in a folder that outlives it, on a copy of the store."""
    data_dir, registry = learnt
    manifest = registry.current("yard")
    for name in ("running", "version0"):
        registry.materialise(manifest, folder / name)
        (folder / name / "manifest.json").write_text(manifest.to_json())
    shutil.copytree(data_dir / "store", folder / "store")
    pool = registry.blob_path(registry.pool("yard")[1].sha256)
    job = Job(folder / "store", "yard", pool, folder / "running", folder / "version0", folder / "output", ONE_THREAD)
    job.save(folder / "job.json")
    return job


def run_child(job: Job, output: str) -> tuple[subprocess.CompletedProcess[str], Job]:
    job = replace(job, output=job.output.with_name(output))
    job.output.mkdir()
    path = job.output.with_suffix(".json")
    job.save(path)
    command = [sys.executable, "-m", "edgefm.cloud.customize", str(path), str(os.getpid())]
    return subprocess.run(command, capture_output=True, text=True, timeout=120), job


def test_a_run_does_not_load_torch_before_it_needs_it():
    """It takes longer to load than a head to fit."""
    loaded = "import sys, edgefm.cloud.customize; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], timeout=60).returncode == 0


def test_a_run_in_a_child_process_writes_its_outcome_and_caches_features(learnt, pictures: Pictures, tmp_path: Path):
    job = job_for(learnt, tmp_path)
    damaged = sha256_hex(pictures.images[0])
    SampleStore(job.store).image_path(damaged).write_bytes(b"no image any more")
    child, first = run_child(job, "first")
    assert child.returncode == 0, child.stderr
    assert f"event=sample_skipped sha256={damaged}" in child.stderr
    assert sorted(path.name for path in first.output.iterdir()) == sorted([HEAD_FILE, RESULT_FILE])

    outcome = TypeAdapter(Outcome).validate_json((first.output / RESULT_FILE).read_bytes())
    digests = sorted(sha256_hex(image) for image in pictures.images[1:])
    held_out = int(held_out_mask(np.arange(1, FRAMES), job.config).sum())
    assert 0 < held_out < len(digests) == outcome.samples == FRAMES - 1
    calibration = outcome.calibration
    assert len(calibration.margins) == len(calibration.agreements) == len(calibration.propensities) == held_out
    assert outcome.accepted == (outcome.quality >= outcome.parent_quality)
    assert outcome.method == "head" and outcome.files == (HEAD_FILE,)

    manifest = learnt[1].current("yard")
    version0 = (job.version0 / HEAD_FILE).read_bytes()
    head = (first.output / HEAD_FILE).read_bytes()
    assert len(head) == len(version0) and head != version0
    assert np.isfinite(Head.from_bytes(head, manifest.embedding_dim).weight).all()

    with sqlite3.connect(job.store / "features.db") as db:
        cached = sorted(row[0] for row in db.execute("SELECT sha256 FROM features"))
    db.close()
    assert cached == digests
    # The second run finds every feature cached. Equal jobs give equal bytes.
    again, second = run_child(job, "second")
    assert again.returncode == 0, again.stderr
    for name in (HEAD_FILE, RESULT_FILE):
        assert (second.output / name).read_bytes() == (first.output / name).read_bytes()


def test_samples_that_were_sent_by_chance_count_for_others_in_training_and_before_the_gate(learnt, tmp_path: Path):
    job = job_for(learnt, tmp_path)
    with closing(sqlite3.connect(job.store / "samples.db")) as db, db:
        db.execute("UPDATE samples SET propensity = 0.1 WHERE number % 3 = 0")
    child, job = run_child(job, "weighted")
    assert child.returncode == 0, child.stderr
    outcome = TypeAdapter(Outcome).validate_json((job.output / RESULT_FILE).read_bytes())

    manifest, pool = learnt[1].current("yard"), learnt[1].pool("yard")[0]
    data = load_data(job, manifest)
    mask = held_out_mask(data.stored.numbers, job.config)
    capped = np.where(data.stored.numbers % 3 == 0, job.config.weight_cap, 1.0)
    version0 = Head.from_bytes((job.version0 / HEAD_FILE).read_bytes(), manifest.embedding_dim)

    def fit(weights: np.ndarray) -> Head:
        targets = data.stored.embeddings[~mask]
        return fit_closed_form(data.features[~mask], targets, weights[~mask], version0, job.config.prior_samples)

    head, expected = Head.from_bytes((job.output / HEAD_FILE).read_bytes(), manifest.embedding_dim), fit(capped)
    unweighted = fit(np.ones(len(mask))).weight
    distance = np.linalg.norm(expected.weight - unweighted)
    assert np.linalg.norm(head.weight - expected.weight) < 0.05 * distance
    judgement = judge(expected(data.features[mask]), data.stored.embeddings[mask], capped[mask], pool)
    assert outcome.quality == pytest.approx(judgement.quality, abs=1e-4)
    assert outcome.quality != pytest.approx(judgement.fm_certainty.mean(), abs=1e-4)


def test_a_run_ends_with_the_cloud_that_was_killed(learnt, tmp_path: Path):
    job = job_for(learnt, tmp_path)
    job.output.mkdir()
    start = (
        "import os, subprocess, sys\n"
        "command = [sys.executable, '-m', 'edgefm.cloud.customize', sys.argv[1], str(os.getpid())]\n"
        "child = subprocess.Popen(command)\n"
        "print('begun', flush=True)\n"
        "child.wait()\n"
    )
    command = [sys.executable, "-c", start, str(tmp_path / "job.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as cloud:
        assert cloud.stdout is not None and cloud.stdout.readline() == "begun\n"
        cloud.kill()
        assert cloud.stdout.read() == ""  # the run holds its other end, and has let go
    assert not (job.output / RESULT_FILE).exists()


def test_a_job_survives_its_file(tmp_path: Path):
    folder = tmp_path / "a folder"
    job = Job(
        folder, "yard", folder / "pool", folder / "r", folder / "v", folder / "o", replace(ONE_THREAD, softness=0.3)
    )
    job.save(tmp_path / "job.json")
    assert Job.load(tmp_path / "job.json") == job


def test_a_run_that_cannot_succeed_says_why_and_leaves_the_version(learnt, tmp_path: Path):
    registry = learnt[1]
    before = registry.current("yard")
    with pytest.raises(CustomizationError, match="no readable sample of yard"):
        asyncio.run(customize(registry, tmp_path / "empty", "yard", ONE_THREAD))
    assert registry.current("yard") == before


def test_the_gate_lets_a_better_head_through_and_stops_a_worse_one(tmp_path: Path, synclip, pictures: Pictures, caplog):
    """Two environments become due at once: the runs follow each other, the second without a further sample.

    `street` is labelled by a confused FM on all but the held-out frames, so that what it learns must fail the gate.
    """
    caplog.set_level(logging.INFO, "edgefm.cloud")
    held_out = held_out_mask(np.arange(FRAMES), replace(ONE_THREAD, first_at=FRAMES))
    noise = normalise(np.random.default_rng(0).standard_normal(pictures.embeddings.shape))
    confused = np.where(held_out[:, None], pictures.embeddings, noise).astype(np.float32)

    def runs() -> list[str]:
        return [record.getMessage() for record in caplog.records if "event=customized" in record.getMessage()]

    async def work() -> None:
        environments = Environments(synclip, cloud_config(tmp_path, first_at=FRAMES, prior_samples=100.0))
        await environments.start()
        for name in ("yard", "street"):
            await environments.register(name, LABELS, "")
        changed = environments.watch("yard")
        await keep_all(environments, "yard", pictures.images, pictures.embeddings)
        await keep_all(environments, "street", pictures.images, confused)
        assert not runs() and environments.student("yard").version == 0  # the first is still learning
        await asyncio.wait_for(changed.wait(), 180)
        version0, better = environments.registry.manifest("yard", 0), environments.student("yard")
        await until(lambda: len(runs()) == 2)

        assert (better.version, better.parent, better.samples) == (1, 0, FRAMES)
        assert better.agreement is not None and better.parent_agreement is not None
        assert better.agreement >= better.parent_agreement
        assert len(better.calibration.margins) == held_out.sum()
        assert better.pool_version == environments.pool("yard")[0].version
        files = [{ref.name: ref.sha256 for ref in manifest.files} for manifest in (version0, better)]
        assert {name for name in files[0] if files[0][name] == files[1][name]} == {GRAPH_FILE, TRUNK_FILE, TAIL_FILE}
        assert files[0].keys() == files[1].keys() and files[0][HEAD_FILE] != files[1][HEAD_FILE]
        assert environments.registry.current("yard") == better

        assert "environment=yard accepted=True version=1" in runs()[0]
        assert "environment=street accepted=False version=None" in runs()[1]
        assert environments.student("street").version == 0 and environments.registry.versions("street") == [0]

        rolled_back = await environments.rollback("yard", None)
        assert rolled_back.version == 0 == environments.student("yard").version
        await environments.close()

    asyncio.run(work())


def test_what_learnt_from_a_version_that_was_rolled_back_is_not_published(
    tmp_path: Path, synclip, pictures: Pictures, caplog
):
    caplog.set_level(logging.INFO, "edgefm.cloud")

    async def work() -> None:
        environments = Environments(synclip, cloud_config(tmp_path, first_at=FRAMES, prior_samples=100.0))
        await environments.start()
        await environments.register("yard", LABELS, "")
        version0 = environments.registry.current("yard")
        parent = environments.registry.publish(version0.model_copy(update={"parent": 0}), {})
        await keep_all(environments, "yard", pictures.images, pictures.embeddings)  # starts a run from version 1
        await asyncio.sleep(1)
        await environments.rollback("yard", 0)
        await until(lambda: any("event=customized" in record.getMessage() for record in caplog.records))
        assert parent.version == 1 and environments.registry.versions("yard") == [0, 1]
        assert environments.student("yard").version == 0
        await environments.close()

    asyncio.run(work())
    assert any("accepted=True version=None" in record.getMessage() for record in caplog.records)


def test_runs_are_due_at_growing_counts_each_once():
    schedule = Schedule(CustomizationConfig(first_at=100, growth=2.0), Past())
    due = []
    for samples in range(1, 1700):
        if schedule.due(samples):
            schedule.started(samples)
            due.append(samples)
    assert due == [100, 200, 400, 800, 1600]
    restarted = Schedule(CustomizationConfig(first_at=100, growth=2.0), Past(400))
    assert not restarted.due(799) and restarted.due(800)


def test_an_alarm_starts_one_run_once_enough_has_come_since():
    schedule = Schedule(CustomizationConfig(first_at=100, growth=2.0), Past(400))
    assert not schedule.due(500)
    schedule.drifted(since=1234.5, samples_since=30)
    due = []
    for samples in range(501, 800):
        schedule.sample_kept()
        if schedule.due(samples):
            due.append((samples, schedule.since))
            schedule.started(samples)
    assert due == [(570, 1234.5)]  # 30 had come, 70 more were missing
    assert schedule.since == 0.0 and not schedule.due(1139) and schedule.due(1140)


def test_a_restart_repeats_no_run_and_loses_none(tmp_path: Path, synclip, pictures: Pictures, caplog):
    """With a quota, fewer samples are stored than were ever labelled; an alarm asks for a run before they have come."""
    config = cloud_config(tmp_path, first_at=20, growth=1000.0)

    async def first() -> None:
        environments = Environments(synclip, replace(config, store_bytes=10 * len(pictures.images[0])))
        await environments.start()
        await environments.register("yard", LABELS, "")
        await keep_all(environments, "yard", pictures.images[:20], pictures.embeddings[:20])
        await until(lambda: environments.trainer.outcomes.total() == 1)
        assert environments.store.count("yard") < 15
        await environments.close()

    async def second() -> None:
        environments = Environments(synclip, config)
        await environments.start()
        await keep_all(environments, "yard", pictures.images[20:25], pictures.embeddings[20:25])
        assert environments.trainer.learning is None  # 25 is not a thousand times 20
        await environments.trainer.drifted("yard", environments.now_s())
        await keep_all(environments, "yard", pictures.images[25:30], pictures.embeddings[25:30])
        assert environments.trainer.learning is None
        await environments.close()

    async def third() -> None:
        environments = Environments(synclip, config)
        await environments.start()
        await keep_all(environments, "yard", pictures.images[30:44], pictures.embeddings[30:44])
        assert environments.trainer.learning is None  # 19 have come since the alarm
        await keep_all(environments, "yard", pictures.images[44:45], pictures.embeddings[44:45])
        assert environments.trainer.learning == "yard"
        await environments.close()  # cuts the run short

    async def fourth() -> None:
        environments = Environments(synclip, config)
        await environments.start()
        await keep_all(environments, "yard", pictures.images[45:46], pictures.embeddings[45:46])
        assert environments.trainer.learning == "yard"
        await environments.close()

    for work in (first, second, third, fourth):
        asyncio.run(work())


def test_a_disk_that_refuses_costs_no_alarm_and_damaged_files_no_start(tmp_path: Path, synclip, caplog):
    async def work() -> None:
        environments = Environments(synclip, cloud_config(tmp_path, first_at=NEVER))
        await environments.start()
        await environments.register("yard", LABELS, "")
        with sqlite3.connect(tmp_path / "store" / "samples.db") as db:
            db.execute("ALTER TABLE samples RENAME TO gone")
        db.close()
        await environments.trainer.drifted("yard", 1.0)
        assert "event=samples_not_counted environment=yard" in caplog.text
        with sqlite3.connect(tmp_path / "store" / "samples.db") as db:
            db.execute("ALTER TABLE gone RENAME TO samples")
        db.close()
        await environments.close()
        path = environments.registry.schedule_path("yard")
        assert json.loads(path.read_text()) == {"learned_at": 0, "drifted_since": 1.0}
        path.write_text("{")
        (path.parent / "versions" / "000001.json").write_text("{")  # the newest version; 0 is the current one
        again = Environments(synclip, cloud_config(tmp_path, first_at=NEVER))
        await again.start()
        assert again.names() == ["yard"] and "event=schedule_unreadable" in caplog.text
        await again.close()

    asyncio.run(work())


# ---- what the environments hold


def test_a_registration_that_was_cut_short_is_repeated(tmp_path: Path, synclip, pictures: Pictures):
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


def test_samples_need_an_environment_and_a_true_propensity(tmp_path: Path, synclip, pictures: Pictures):
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


def test_an_environment_whose_only_version_is_damaged_starts_anew(tmp_path: Path, synclip, caplog):
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


async def stream(environments: Environments, tree: Path) -> int:
    """What a device and the service do with a stream, on an environment named after nothing that tells the tree."""
    labels = sorted(path.name for path in (tree / "train").iterdir())
    await environments.register("yard", labels, "")
    frames = 0
    for frame in open_source(tree, "train/", shuffle_seed=0):
        embedding = environments.model.embed_images([decode_image(frame.encoded)])[0]
        await keep(environments, "yard", frame.encoded, embedding)
        frames += 1
    return frames


def without_date(manifest: StudentManifest) -> str:
    return manifest.model_copy(update={"created_at": ""}).to_json()


def test_no_ground_truth_reaches_training_or_calibration(tmp_path: Path, shared_data: Path, synclip):
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


def test_no_ground_truth_reaches_a_published_version(tmp_path: Path, synclip):
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
