"""Quantised students: published by the cloud, run by a device, and left aside where they cost too much."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from edgefm.cloud.config import CloudConfig, CustomizationConfig
from edgefm.cloud.customize import Job, run
from edgefm.cloud.environments import Environments
from edgefm.cloud.recognition import compare
from edgefm.cloud.registry import Registry
from edgefm.cloud.store import NewSample
from edgefm.deploy.camera import DAY, PHOTOGRAPHS, walk
from edgefm.edge.student import Student
from edgefm.models import student_graph
from edgefm.models.head import Head
from edgefm.models.images import decode_image
from edgefm.models.student_graph import int8_files
from edgefm.models.versions import GRAPH_FILE, HEAD_FILE, TAIL_FILE, TRUNK_FILE, StudentManifest

FRAMES = 120
LABELS = sorted({photograph.label for photograph in PHOTOGRAPHS})


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, synclip) -> tuple[Path, list[StudentManifest], Registry]:
    """A data folder whose environment has learnt once, and its versions."""
    data_dir = tmp_path_factory.mktemp("int8")
    images = [frame.image_bytes for frame in walk(DAY, 0, FRAMES)]
    embeddings = np.vstack([synclip.embed_images([decode_image(image)]) for image in images])

    async def work() -> Environments:
        learning = CustomizationConfig(first_at=FRAMES, prior_samples=100.0, int8_may_cost=1.0)
        environments = Environments(synclip, CloudConfig(data_dir, student="lite0-64-int8", customization=learning))
        await environments.start()
        await environments.register("yard", LABELS, "")
        changed = environments.watch("yard")
        found = compare(embeddings, environments.pool("yard")[0], [1] * FRAMES)
        for image, recognised in zip(images, found, strict=True):
            await environments.keep(NewSample("yard", image, recognised.labelled, 1.0, "device"))
        await asyncio.wait_for(changed.wait(), 120)
        await environments.close()
        return environments

    registry = asyncio.run(work()).registry
    return data_dir, [registry.manifest("yard", number) for number in registry.versions("yard")], registry


def test_the_first_customized_version_is_quantised_and_a_device_runs_it(learnt, tmp_path):
    _, (version0, quantised), registry = learnt
    assert version0.precision == "float" and quantised.precision == "int8"
    assert version0.profile == quantised.profile == "lite0-64-int8"
    assert {ref.name for ref in version0.files} == {GRAPH_FILE, TRUNK_FILE, TAIL_FILE, HEAD_FILE}
    assert {ref.name for ref in quantised.files} == {GRAPH_FILE, HEAD_FILE}  # nothing that it does not use
    assert sum(ref.size_bytes for ref in quantised.files) < 0.8 * sum(ref.size_bytes for ref in version0.files)
    assert len(quantised.calibration.margins) > 10  # its own, not those of the float one it was made from
    registry.materialise(quantised, tmp_path)
    student = Student(quantised, tmp_path)
    frames = list(walk(DAY, 1, 40))
    pool, _ = registry.pool("yard")
    embeddings = np.vstack([student.embed(student.preprocess(decode_image(frame.image_bytes))) for frame in frames])
    answers = pool.answers(pool.recognise(embeddings, top_k=1))
    assert np.mean([answer == frame.label for answer, frame in zip(answers, frames, strict=True)]) > 0.5


@pytest.fixture
def own_process() -> Iterator[None]:
    """Undoes what a run sets for the process it has to itself."""
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("own_process")
def test_where_quantising_costs_more_than_it_may_the_version_stays_in_float(learnt, tmp_path, monkeypatch, capfd):
    """The quantised graph is given another head, so that it is bad for sure."""
    data_dir, (version0, _), registry = learnt

    def bad(profile, head, tail, batches):
        other = np.random.default_rng(0).normal(size=head.weight.shape).astype(np.float32)
        return int8_files(profile, Head(other, head.bias), tail, batches)

    for name in ("running", "version0", "output"):
        (tmp_path / name).mkdir()
    for name in ("running", "version0"):
        registry.materialise(version0, tmp_path / name)
        (tmp_path / name / "manifest.json").write_text(version0.to_json())
    config = CustomizationConfig(threads=1, prior_samples=100.0)
    pool = registry.blob_path(registry.pool("yard")[1].sha256)
    job = Job(
        data_dir / "store", "yard", pool, tmp_path / "running", tmp_path / "version0", tmp_path / "output", config
    )
    monkeypatch.setattr(student_graph, "int8_files", bad)
    outcome = run(job)
    assert "event=int8_left" in capfd.readouterr().err
    assert outcome.precision == "float" and outcome.files == (HEAD_FILE,) and outcome.accepted
    assert set(outcome.pretrained) == {GRAPH_FILE, TRUNK_FILE, TAIL_FILE}
    monkeypatch.undo()
    (tmp_path / "again").mkdir()
    assert run(replace(job, output=tmp_path / "again", config=replace(config, int8_may_cost=1.0))).precision == "int8"
