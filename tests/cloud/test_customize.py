"""A customization run: what its child process makes of the real FM's labels in a real store, and how it ends."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edgefm.cloud.customize import RESULT_FILE, Job, Outcome, load_data
from edgefm.cloud.environments import Environments
from edgefm.cloud.learning import fit_closed_form, held_out_mask, judge
from edgefm.cloud.registry import RUNS_FOLDER
from edgefm.cloud.store import SampleStore
from edgefm.cloud.trainer import CustomizationError, customize
from edgefm.models.head import Head
from edgefm.models.versions import HEAD_FILE, sha256_hex
from pydantic import TypeAdapter

from .conftest import FRAMES, LABELS, NEVER, ONE_THREAD, Pictures


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, synclip, pictures: Pictures, cloud_config, keep_all):
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
    assert not list((registry.root / RUNS_FOLDER).iterdir())
