"""The label pool of each environment, in memory and on the disk, and how its labels and descriptions change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ..models.errors import EnvironmentMissingError, LabelError, LabelExistsError, LabelMissingError
from ..models.foundation import FoundationModel, build_pool
from ..models.pool import LabelPool, check_descriptions, check_labels
from ..models.versions import BlobRef
from .registry import Registry

log = logging.getLogger("edgefm.cloud.label_pools")

BASE = "base"
"""The environment whose labels new environments start from; no device belongs to it."""


class LabelPools:
    """Call it from the event loop only; `load` from where slow work runs.

    Args:
        in_thread: runs slow work (text tower, disk) elsewhere, one piece at a time.
        change: held by every change of an environment, so that they happen in order.
        on_changed: called with an environment whose labels or descriptions have changed.
    """

    def __init__(
        self,
        model: FoundationModel,
        registry: Registry,
        in_thread: Callable[..., Awaitable[Any]],
        change: asyncio.Lock,
        on_changed: Callable[[str, LabelPool], None],
    ) -> None:
        self._model = model
        self._registry = registry
        self._in_thread = in_thread
        self._change = change
        self._on_changed = on_changed
        self._pools: dict[str, tuple[LabelPool, BlobRef]] = {}

    def __contains__(self, environment: str) -> bool:
        return environment in self._pools

    def names(self) -> list[str]:
        return sorted(self._pools)

    def get(self, environment: str) -> tuple[LabelPool, BlobRef]:
        """Raises `EnvironmentMissingError` for an environment that no device has registered."""
        try:
            return self._pools[environment]
        except KeyError:
            known = ", ".join(sorted(self._pools.keys() - {BASE})) or "none yet"
            text = f"unknown environment {environment!r}; known: {known}. A device registers it"
            raise EnvironmentMissingError(text) from None

    def load(self, environment: str) -> LabelPool:
        """What the disk has."""
        self._pools[environment] = self._registry.pool(environment)
        return self._pools[environment][0]

    async def put(
        self,
        environment: str,
        labels: Sequence[str],
        descriptions: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> LabelPool:
        """Makes a pool and keeps it; to be called while changes are held off."""
        pool = await self._in_thread(build_pool, self._model, labels, descriptions)
        ref = await self._in_thread(self._registry.set_pool, environment, pool)
        self._pools[environment] = (pool, ref)
        return pool

    async def add(self, environment: str, labels: Sequence[str]) -> LabelPool:
        """Adds all or none. Raises `LabelExistsError` for one that is there already."""
        added = _some(labels)
        async with self._change:
            if environment == BASE and BASE not in self:
                return await self._changed(environment, added, {})
            pool = self.get(environment)[0]
            there = [label for label in added if label in pool.labels]
            if there:
                raise LabelExistsError(f"already in the pool of {environment}: {', '.join(there)}")
            return await self._changed(environment, (*pool.labels, *added), pool.descriptions)

    async def remove(self, environment: str, labels: Sequence[str]) -> LabelPool:
        """Removes all or none. Raises `LabelMissingError` for one that is not there."""
        removed = _some(labels)
        async with self._change:
            pool = self._having(environment, removed)
            kept = tuple(label for label in pool.labels if label not in removed)
            if not kept:
                raise LabelError(f"the pool of {environment} would be empty; add another label first")
            return await self._changed(environment, kept, pool.descriptions)

    async def describe(self, environment: str, descriptions: Mapping[str, Sequence[str]]) -> LabelPool:
        """Replaces the descriptions of some labels, of all or of none; of one that gets none, its own are removed.

        Raises:
            LabelMissingError: one is not in the pool.
            LabelError: a description is unusable.
        """
        async with self._change:
            checked = self.checked(environment, descriptions)
            pool = self.get(environment)[0]
            return await self._changed(environment, pool.labels, {**pool.descriptions, **checked})

    def checked(self, environment: str, descriptions: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
        """What `describe` would take, tidied; raises what it would."""
        labels = _some(tuple(descriptions))
        self._having(environment, labels)
        return {
            label: check_descriptions(label, texts) for label, texts in zip(labels, descriptions.values(), strict=True)
        }

    def _having(self, environment: str, labels: Sequence[str]) -> LabelPool:
        pool = self.get(environment)[0]
        missing = [label for label in labels if label not in pool.labels]
        if missing:
            raise LabelMissingError(f"not in the pool of {environment}: {', '.join(missing)}")
        return pool

    async def _changed(
        self, environment: str, labels: Sequence[str], descriptions: Mapping[str, Sequence[str]]
    ) -> LabelPool:
        pool = await self.put(environment, labels, descriptions)
        self._on_changed(environment, pool)
        log.info(
            "event=pool_changed environment=%s labels=%d described=%d pool=%s",
            environment,
            len(pool.labels),
            len(pool.descriptions),
            pool.version,
        )
        return pool


def _some(labels: Sequence[str]) -> tuple[str, ...]:
    checked = check_labels(labels)
    if not checked:
        raise LabelError("no label given")
    return checked
