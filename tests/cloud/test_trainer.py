"""When customization runs, also after a restart, and what of it the gate lets into the registry."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from edgefm.cloud.config import CustomizationConfig
from edgefm.cloud.environments import Environments
from edgefm.cloud.learning import held_out_mask
from edgefm.cloud.registry import RUNS_FOLDER
from edgefm.cloud.trainer import Past, Schedule
from edgefm.models.pool import normalise
from edgefm.models.versions import GRAPH_FILE, HEAD_FILE, TAIL_FILE, TRUNK_FILE

from .conftest import FRAMES, LABELS, NEVER, ONE_THREAD, Pictures


async def until(happened: Callable[[], bool], timeout_s: float = 180) -> None:
    async def poll() -> None:
        while not happened():
            await asyncio.sleep(0.05)

    await asyncio.wait_for(poll(), timeout_s)


def test_the_gate_lets_a_better_head_through_and_stops_a_worse_one(
    tmp_path: Path, synclip, pictures: Pictures, caplog, cloud_config, keep_all
):
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
    tmp_path: Path, synclip, pictures: Pictures, caplog, cloud_config, keep_all
):
    caplog.set_level(logging.INFO, "edgefm.cloud")

    async def work() -> None:
        environments = Environments(synclip, cloud_config(tmp_path, first_at=FRAMES, prior_samples=100.0))
        await environments.start()
        await environments.register("yard", LABELS, "")
        version0 = environments.registry.current("yard")
        parent = environments.registry.publish(version0.model_copy(update={"parent": 0}), {})
        await keep_all(environments, "yard", pictures.images, pictures.embeddings)  # starts a run from version 1
        await until(lambda: any(environments.registry.root.glob(f"{RUNS_FOLDER}/*/job.json")))  # it has its parent
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


def test_a_restart_repeats_no_run_and_loses_none(
    tmp_path: Path, synclip, pictures: Pictures, caplog, cloud_config, keep_all
):
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


def test_a_disk_that_refuses_costs_no_alarm_and_damaged_files_no_start(tmp_path: Path, synclip, caplog, cloud_config):
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
