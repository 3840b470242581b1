"""Labels described in the background: what the pool becomes of it, failures, restarts, and changes in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from edgefm.cloud.enrichment import Describer, Enrichment
from edgefm.cloud.label_pools import BASE, LabelPools
from edgefm.cloud.registry import Registry
from edgefm.models.errors import (
    EnvironmentMissingError,
    LabelError,
    LabelExistsError,
    LabelMissingError,
    ModelError,
    NoLanguageModelError,
    OverloadedError,
    StoreError,
)
from edgefm.models.foundation import build_pool
from edgefm.models.pool import LabelPool

LABELS = ("cat", "rocket", "police van")


async def describer(label: str) -> tuple[str, ...]:
    """What a language model might say, as a function of the label."""
    await asyncio.sleep(0)
    return f"The {label} is a thing with a {label[0]}.", f"A {label} has {len(label)} letters."


class Gated:
    """Answers once it is let, and counts who asked."""

    def __init__(self) -> None:
        self.gate, self.asked = asyncio.Event(), []

    async def __call__(self, label: str) -> tuple[str, ...]:
        self.asked.append(label)
        await self.gate.wait()
        return await describer(label)


class Cloud:
    """Pools and their enrichment on a folder."""

    def __init__(self, folder: Path, model, describer: Describer | None) -> None:
        self.changes: list[tuple[str, str]] = []
        self.registry = Registry(folder)
        changed = lambda name, pool: self.changes.append((name, pool.version))  # noqa: E731
        self.pools = LabelPools(model, self.registry, asyncio.to_thread, asyncio.Lock(), changed)
        self.enrichment = Enrichment(self.pools, self.registry, describer)

    @property
    def pool(self) -> LabelPool:
        return self.pools.get(BASE)[0]

    async def settled(self) -> None:
        deadline = asyncio.get_running_loop().time() + 20
        while self.enrichment.waiting(BASE):
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.01)


@pytest.fixture
def opened(tmp_path: Path, synclip):
    """Opens a cloud on the folder, anew each time, with the labels in its base pool."""

    @asynccontextmanager
    async def open_cloud(describer: Describer | None, labels: Sequence[str] = LABELS):
        cloud = Cloud(tmp_path, synclip, describer)
        for name in cloud.registry.environments():
            cloud.pools.load(name)
        if BASE not in cloud.pools:
            await cloud.pools.put(BASE, labels)
        cloud.enrichment.start()
        yield cloud
        await cloud.enrichment.close()

    return open_cloud


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))  # pyright: ignore[reportArgumentType]


def test_the_pool_is_rebuilt_once_when_all_that_wait_are_described(opened, synclip):
    async def work() -> None:
        gated = Gated()
        async with opened(gated) as cloud:
            before = cloud.pool
            await cloud.enrichment.ask(BASE, ["cat", "rocket"])
            await cloud.enrichment.ask(BASE, ["police van"])
            assert cloud.enrichment.waiting(BASE) == set(LABELS) and cloud.pool is before
            gated.gate.set()
            await cloud.settled()
            assert gated.asked == list(LABELS) and cloud.changes == [(BASE, cloud.pool.version)]
            said = {label: await describer(label) for label in LABELS}
            assert cloud.pool.descriptions == said and cloud.pool.version != before.version
            assert np.array_equal(cloud.pool.embeddings, build_pool(synclip, LABELS, said).embeddings)
            assert cloud.registry.pool(BASE)[0].descriptions == said

    run(work)


def test_changes_of_labels_keep_the_descriptions_of_the_others(opened):
    async def work() -> None:
        async with opened(None) as cloud:
            await cloud.pools.describe(BASE, {"cat": ["A small predator."], "rocket": ["It flies."]})
            described = dict(zip(cloud.pool.labels, cloud.pool.embeddings, strict=True))
            await cloud.pools.add(BASE, ["owl"])
            await cloud.pools.remove(BASE, ["rocket"])
            assert cloud.pool.labels == ("cat", "police van", "owl")
            assert cloud.pool.descriptions == {"cat": ("A small predator.",)}
            assert np.allclose(cloud.pool.embeddings[0], described["cat"], atol=1e-6)
            await cloud.pools.describe(BASE, {"cat": []})
            assert cloud.pool.descriptions == {} and not np.allclose(
                cloud.pool.embeddings[0], described["cat"], atol=1e-3
            )

    run(work)


def test_what_cannot_be_done_changes_nothing(opened):
    async def work() -> None:
        async with opened(describer) as cloud:
            before = cloud.pool
            for error, change in (
                (LabelExistsError, lambda: cloud.pools.add(BASE, ["owl", "cat"])),
                (LabelMissingError, lambda: cloud.pools.remove(BASE, ["cat", "owl"])),
                (LabelMissingError, lambda: cloud.pools.describe(BASE, {"cat": ["Small."], "owl": ["Wise."]})),
                (LabelError, lambda: cloud.pools.describe(BASE, {"cat": ["Small."], "rocket": [" "]})),
                (LabelError, lambda: cloud.pools.describe(BASE, {})),
                (LabelError, lambda: cloud.pools.remove(BASE, LABELS)),
                (LabelMissingError, lambda: cloud.enrichment.ask(BASE, ["cat", "owl"])),
                (LabelError, lambda: cloud.enrichment.ask(BASE, [])),
            ):
                with pytest.raises(error):
                    await change()
            assert cloud.pool is before and cloud.changes == [] and not cloud.enrichment.waiting(BASE)
        async with opened(None) as cloud:
            with pytest.raises(NoLanguageModelError, match="--language smollm2"):
                await cloud.enrichment.ask(BASE, ["cat"])

    run(work)


def test_a_failure_is_told_and_costs_its_label_alone(opened, caplog):
    async def failing(label: str) -> tuple[str, ...]:
        if label == "cat":
            raise ModelError("the weights are gone")
        if label == "rocket":
            raise ZeroDivisionError
        return () if label == "police van" else await describer(label)

    async def work() -> None:
        async with opened(failing, (*LABELS, "owl")) as cloud:
            await cloud.enrichment.ask(BASE, (*LABELS, "owl"))
            await cloud.settled()
            assert set(cloud.pool.descriptions) == {"owl"} and cloud.pool.labels == (*LABELS, "owl")
            failures = [cloud.enrichment.failure(BASE, label) for label in cloud.pool.labels]
            assert failures[:2] == ["the weights are gone", "ZeroDivisionError"]
            assert "nothing usable" in failures[2] and failures[3] == ""
        async with opened(describer) as cloud:
            assert cloud.enrichment.failure(BASE, "cat") == "the weights are gone"  # still, after a restart
            await cloud.enrichment.ask(BASE, ["cat"])
            await cloud.settled()
            assert cloud.enrichment.failure(BASE, "cat") == "" and set(cloud.pool.descriptions) == {"cat", "owl"}

    run(work)
    assert sum("event=label_not_described" in record.getMessage() for record in caplog.records) == 3


def test_an_overloaded_language_model_is_asked_again(opened):
    refused: list[str] = []

    async def busy(label: str) -> tuple[str, ...]:
        if refused.count(label) < 2:
            refused.append(label)
            raise OverloadedError("256 requests wait already", 10)
        return await describer(label)

    async def work() -> None:
        async with opened(busy) as cloud:
            await cloud.enrichment.ask(BASE, LABELS)
            await cloud.settled()
            assert set(cloud.pool.descriptions) == set(LABELS) and len(refused) == 2 * len(LABELS)
            assert not any(cloud.enrichment.failure(BASE, label) for label in LABELS)

    run(work)


def test_a_caller_that_goes_away_leaves_its_job_running(opened):
    async def work() -> None:
        async with opened(describer) as cloud:
            asking = asyncio.create_task(cloud.enrichment.ask(BASE, ["cat"]))
            await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await cloud.settled()
            assert set(cloud.pool.descriptions) == {"cat"}

    run(work)


def test_a_restart_goes_on_where_the_job_was(opened, caplog):
    async def work() -> None:
        gated = Gated()
        async with opened(gated) as cloud:
            await cloud.enrichment.ask(BASE, ["cat", "rocket"])
            await asyncio.sleep(0.05)
            assert gated.asked == ["cat", "rocket"]
        async with opened(None) as cloud:  # a cloud without a language model leaves them waiting, and says so
            assert cloud.enrichment.waiting(BASE) == {"cat", "rocket"} and not cloud.pool.descriptions
            await cloud.pools.remove(BASE, ["rocket"])
            await cloud.enrichment.forget(BASE, ["rocket"])
        async with opened(describer) as cloud:
            await cloud.settled()
            assert set(cloud.pool.descriptions) == {"cat"}

    run(work)
    assert any("event=descriptions_wait environment=base labels=2" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("added", [True, False], ids=["after the pool was written", "before"])
def test_a_cloud_that_dies_while_it_adds_a_label_describes_it_if_it_is_there(opened, added: bool):
    class KilledError(BaseException):
        pass

    async def work() -> None:
        async with opened(describer) as cloud:
            await cloud.pools.describe(BASE, {"cat": ["By hand."]})
            add = cloud.pools.add

            async def dies(environment, labels):
                if added:
                    await add(environment, labels)
                raise KilledError

            cloud.pools.add = dies
            with pytest.raises(KilledError):
                await cloud.enrichment.add(BASE, ["teapot", "cat"] if not added else ["teapot"])
        async with opened(describer) as cloud:
            await cloud.settled()
            described = {"cat", "teapot"} if added else {"cat"}
            assert ("teapot" in cloud.pool.labels) == added and set(cloud.pool.descriptions) == described
            assert cloud.pool.descriptions["cat"] == ("By hand.",)

    run(work)


def test_labels_that_cannot_be_added_are_not_asked_about(opened, tmp_path: Path):
    async def work() -> None:
        async with opened(describer) as cloud:
            with pytest.raises(LabelExistsError):
                await cloud.enrichment.add(BASE, ["cat", "teapot"])
            with pytest.raises(EnvironmentMissingError):
                await cloud.enrichment.add("nowhere", ["teapot"])
            assert not list(tmp_path.rglob("nowhere"))
            await cloud.pools.add(BASE, ["teapot"])
            await cloud.enrichment.add(BASE, ["fox"])
            await cloud.settled()
        async with opened(describer) as cloud:
            await (
                cloud.settled()
            )  # the fox may be asked about again: the first cloud closed before it had noted the answer
            assert set(cloud.pool.descriptions) == {"fox"}

    run(work)


def test_what_an_operator_does_meanwhile_wins(opened):
    async def work() -> None:
        gated = Gated()
        async with opened(gated) as cloud:
            await cloud.enrichment.ask(BASE, LABELS)
            await asyncio.sleep(0.05)
            await cloud.enrichment.forget(BASE, ["cat"])
            await cloud.pools.describe(BASE, {"cat": ["By hand."]})
            await cloud.pools.remove(BASE, ["rocket"])  # nobody says so to the job: it finds out
            gated.gate.set()
            await cloud.settled()
            assert cloud.pool.labels == ("cat", "police van")
            assert cloud.pool.descriptions == {"cat": ("By hand.",), "police van": await describer("police van")}

    run(work)


def test_a_full_disk_loses_no_answer(opened, full_disk, caplog):
    async def work() -> None:
        gated = Gated()
        async with opened(gated) as cloud:
            await cloud.enrichment.ask(BASE, ["cat"])
            await asyncio.sleep(0.05)
            with full_disk():
                gated.gate.set()
                with pytest.raises(StoreError):
                    await cloud.pools.describe(BASE, {"rocket": ["It flies."]})
                await asyncio.sleep(0.5)
            assert cloud.enrichment.waiting(BASE) == {"cat"} and not cloud.pool.descriptions
            await cloud.enrichment.ask(BASE, ["rocket"])
            await cloud.settled()
            assert gated.asked == ["cat", "rocket"] and set(cloud.pool.descriptions) == {"cat", "rocket"}

    run(work)
    assert any("event=descriptions_not_stored environment=base" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("content", ["", "[]", '{"waiting": {"cat": 3}}'])
def test_a_damaged_list_of_what_waits_is_said_and_begun_anew(opened, tmp_path, caplog, content):
    async def work() -> None:
        async with opened(describer):
            pass
        (tmp_path / "environments" / BASE / "descriptions.json").write_text(content)
        async with opened(describer) as cloud:
            assert not cloud.enrichment.waiting(BASE)

    run(work)
    assert any("event=descriptions_unreadable" in record.getMessage() for record in caplog.records)
