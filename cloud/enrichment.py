"""Descriptions of labels from the language model, asked for in the background.

What is still to be asked, and what has been answered meanwhile, lies in the environment's `descriptions.json`: a cloud that
is stopped goes on at its next start. The pool is rebuilt once all labels that wait have their answers, since every new pool
has devices swap and drift begin anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from pydantic import TypeAdapter, ValidationError

from ..models.cache import write_atomic
from ..models.errors import (
    EdgeFMError,
    LabelError,
    LabelMissingError,
    NoLanguageModelError,
    OverloadedError,
    StoreError,
)
from ..models.pool import MAX_DESCRIPTIONS, LabelPool, check_descriptions, check_labels
from .label_pools import LabelPools
from .registry import Registry

log = logging.getLogger("edgefm.cloud.enrichment")

Describer = Callable[[str], Awaitable[tuple[str, ...]]]
"""From a label to what it looks like, perhaps nothing. Raises `EdgeFMError`."""
AT_ONCE = 8
"""Labels that the language model is asked about together."""


@dataclass
class Asked:
    """Of one environment.

    Attributes:
        waiting: labels to be described, with what has been answered; None: not yet.
        failed: labels of which nothing came, and why.
        announced: labels that are about to be added, and then described.
    """

    waiting: dict[str, tuple[str, ...] | None] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    announced: set[str] = field(default_factory=set)

    def forget(self, labels: Iterable[str]) -> None:
        for label in labels:
            self.waiting.pop(label, None)
            self.failed.pop(label, None)


_ASKED: TypeAdapter[Asked] = TypeAdapter(Asked)


class Enrichment:
    """Asks about labels, `AT_ONCE` of all environments together. Call it from the event loop only.

    Args:
        describer: None: there is no language model.
    """

    def __init__(self, pools: LabelPools, registry: Registry, describer: Describer | None) -> None:
        self._pools = pools
        self._registry = registry
        self._describer = describer
        self._asked: dict[str, Asked] = {}
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._saving = asyncio.Lock()
        self._room = asyncio.Semaphore(AT_ONCE)

    def start(self) -> None:
        """Goes on with what an earlier run was asked for."""
        for name in self._pools.names():
            self._asked[name] = self._load(name)
            if not self._asked[name].waiting:
                continue
            if self._describer is None:
                log.warning(
                    "event=descriptions_wait environment=%s labels=%d advice=%s",
                    name,
                    len(self._asked[name].waiting),
                    "start the cloud with '--language smollm2' and they are written",
                )
            else:
                self._work(name)

    async def close(self) -> None:
        jobs = list(self._jobs.values())
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    def waiting(self, environment: str) -> frozenset[str]:
        """Labels that are still to be described."""
        return frozenset(self._of(environment).waiting)

    def failure(self, environment: str, label: str) -> str:
        """Why the language model did not describe it; empty: it did, or was not asked."""
        return self._of(environment).failed.get(label, "")

    @property
    def possible(self) -> bool:
        """There is a language model to ask."""
        return self._describer is not None

    def require(self) -> Describer:
        """Raises `NoLanguageModelError` when there is none to ask."""
        if self._describer is None:
            raise NoLanguageModelError(
                "this cloud has no language model to describe labels with; start it with '--language smollm2', or write "
                "descriptions by hand with 'edgefm labels describe LABEL --text ...'"
            )
        return self._describer

    async def add(self, environment: str, labels: Sequence[str]) -> LabelPool:
        """Adds labels to the pool and has them described, also where the cloud dies in between.

        Raises:
            NoLanguageModelError: there is none; nothing is added then.
            LabelError: see `LabelPools.add`.
        """
        self.require()
        new: set[str] = set()
        if environment in self._pools:  # elsewhere nothing is written before there is a pool
            new = set(check_labels(labels)).difference(
                self._pools.get(environment)[0].labels, self._of(environment).announced
            )
            self._of(environment).announced |= new
            await self._save(environment)
        try:
            pool = await self._pools.add(environment, labels)
        except EdgeFMError:  # of another error, such as a caller's going away, nobody knows what the disk has
            if new:
                self._of(environment).announced -= new
                await self._save(environment)
            raise
        self._of(environment).announced -= new
        await self.ask(environment, labels)
        return pool

    async def ask(self, environment: str, labels: Sequence[str]) -> None:
        """Has labels of the pool described, in place of what describes them now.

        Raises:
            NoLanguageModelError: there is none.
            LabelMissingError: one is not in the pool; then none is described.
        """
        self.require()
        wanted = check_labels(labels)
        if not wanted:
            raise LabelError("no label given")
        missing = [label for label in wanted if label not in self._pools.get(environment)[0].labels]
        if missing:
            raise LabelMissingError(f"not in the pool of {environment}: {', '.join(missing)}")
        asked = self._of(environment)
        asked.forget(wanted)
        asked.waiting.update(dict.fromkeys(wanted))
        self._work(environment)  # before anything is awaited: whoever asks may go away
        await self._save(environment)

    async def forget(self, environment: str, labels: Sequence[str]) -> None:
        """Labels that were removed, or are about to be described by hand."""
        asked, gone = self._of(environment), set(check_labels(labels))
        if gone & (asked.waiting.keys() | asked.failed.keys()):
            asked.forget(gone)
            await self._save(environment)

    def _of(self, environment: str) -> Asked:
        return self._asked.setdefault(environment, Asked())

    def _work(self, environment: str) -> None:
        if environment not in self._jobs:
            self._jobs[environment] = asyncio.create_task(self._run(environment), name=f"describe-{environment}")

    async def _run(self, environment: str) -> None:
        try:
            await self._describe(environment)
        finally:  # at once, not in a callback a moment later: what is asked for then begins a job of its own
            self._jobs.pop(environment, None)

    async def _describe(self, environment: str) -> None:
        asked = self._of(environment)
        while asked.waiting:
            unanswered = [label for label, texts in asked.waiting.items() if texts is None][:AT_ONCE]
            if unanswered:
                await asyncio.gather(*(self._answer(environment, label) for label in unanswered))
            elif not await self._store(environment):
                return
            await self._save(environment)

    async def _answer(self, environment: str, label: str) -> None:
        asked = self._of(environment)
        try:
            async with self._room:
                texts = check_descriptions(label, (await self.require()(label))[:MAX_DESCRIPTIONS])
            reason = "" if texts else "the language model wrote nothing usable; write descriptions by hand"
        except OverloadedError as error:
            await asyncio.sleep(error.retry_after_ms / 1e3)
            return  # it waits on
        except Exception as error:  # whatever it is, it costs this label alone
            texts, reason = (), str(error) or type(error).__name__
        if label not in asked.waiting:
            return  # removed or described by hand meanwhile
        if texts:
            asked.waiting[label] = texts
            return
        asked.forget([label])
        asked.failed[label] = reason
        log.error("event=label_not_described environment=%s label=%s reason=%s", environment, label, reason)

    async def _store(self, environment: str) -> bool:
        """Rebuilds the pool; what the disk refuses waits for the next request or start."""
        asked = self._of(environment)
        found = {label: texts for label, texts in asked.waiting.items() if texts is not None}
        try:
            await self._pools.describe(environment, found)
        except LabelMissingError:  # removed while this waited for its turn
            asked.forget(found.keys() - set(self._pools.get(environment)[0].labels))
            return True
        except EdgeFMError as error:
            log.error(
                "event=descriptions_not_stored environment=%s labels=%d reason=%s", environment, len(found), error
            )
            return False
        asked.forget(label for label, texts in found.items() if asked.waiting.get(label) is texts)
        log.info("event=described environment=%s labels=%s", environment, ", ".join(found))
        return True

    def _load(self, environment: str) -> Asked:
        path = self._registry.descriptions_path(environment)
        try:
            asked = _ASKED.validate_json(path.read_bytes())
        except FileNotFoundError:
            return Asked()
        except (OSError, ValidationError) as error:
            log.error("event=descriptions_unreadable path=%s reason=%s", path, error)
            return Asked()
        labels = self._pools.get(environment)[0].labels
        asked.forget([label for label in (*asked.waiting, *asked.failed) if label not in labels])
        for label in asked.announced.intersection(labels):
            asked.waiting.setdefault(label)
        asked.announced.clear()
        return asked

    async def _save(self, environment: str) -> None:
        async with self._saving:
            content = _ASKED.dump_json(self._of(environment))
            try:
                await asyncio.to_thread(write_atomic, self._registry.descriptions_path(environment), content)
            except StoreError as error:
                log.error("event=descriptions_not_saved environment=%s reason=%s", environment, error)
