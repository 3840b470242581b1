"""The FM without a service: full batches, one after another, as fast as it goes.

As in the cloud, the next batch is decoded and preprocessed by as many threads as there are cores while the model is at this
one. Nothing waits for company and nothing is sent: what a service loses against it is the price of serving.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

from ...cloud.recognition import Prepared, Query, Recognised, preparer, recogniser
from ...models.foundation import FoundationModel, build_pool, load_foundation_model
from ...models.pool import LabelPool


@dataclass(frozen=True)
class Computed:
    samples: int
    seconds: float
    cpu_s: float


@cache
def _model(name: str) -> FoundationModel:
    return load_foundation_model(name)


@cache
def _pool(name: str, labels: tuple[str, ...]) -> LabelPool:
    return build_pool(_model(name), labels)


def compute(
    fm: str, labels: tuple[str, ...], images: Sequence[bytes], batch: int, warm_up_s: float, seconds: float
) -> Computed:
    """Recognises `images` again and again, `batch` at a time."""
    pool, prepare, recognise = _pool(fm, labels), preparer(_model(fm)), recogniser(_model(fm))
    place = 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:

        def begin() -> list[Future[Prepared]]:
            nonlocal place
            queries = [Query(images[(place + i) % len(images)], pool, 5) for i in range(batch)]
            place += batch
            return [threads.submit(prepare, query) for query in queries]

        def until(end_s: float, preparing: list[Future[Prepared]]) -> tuple[int, list[Future[Prepared]]]:
            samples = 0
            while time.perf_counter() < end_s:
                prepared = [future.result() for future in preparing]
                preparing = begin()
                found: list[Recognised] = recognise(prepared)
                samples += len(found)
            return samples, preparing

        _, preparing = until(time.perf_counter() + warm_up_s, begin())
        began, cpu_s = time.perf_counter(), time.process_time()
        samples, preparing = until(began + seconds, preparing)
        done = Computed(samples, time.perf_counter() - began, time.process_time() - cpu_s)
        for future in preparing:
            future.cancel()
    return done


def occupy(share: float, seconds: float) -> None:
    """Takes that share of a core, in slices of 10 ms, as a load process would."""
    end_s = time.perf_counter() + seconds
    while (now_s := time.perf_counter()) < end_s:
        while time.perf_counter() - now_s < 0.01 * share:
            pass
        time.sleep(0.01 * (1 - share))
