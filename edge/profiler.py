"""Measures what each student costs on this device, without a cloud and without torch.

The students are real graphs: those that `edgefm students export` wrote, or those in an agent's state folder. Each
measurement runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from ..models.device_profile import StudentCost
from ..models.errors import InputError, ModelError
from ..models.runtime import OnnxModel
from ..models.students import INT8_SUFFIX, PROFILES, student_profile
from ..models.versions import GRAPH_FILE
from .local_state import LocalState, existing_state
from .machine import peak_rss_mb, usable_cores

WARM_UP_RUNS = 10
LEAST_RUNS = 20


@dataclass(frozen=True)
class ProfileOptions:
    """How to measure.

    Attributes:
        threads: numbers of threads to try; empty: 1, 2, 4, ... and all usable cores.
        frame_size: width and height of the decoded frame that is preprocessed, in pixels.
        runs: frames timed for each figure.
        patience_s: after so long, fewer frames do, but `LEAST_RUNS` at least.
    """

    threads: tuple[int, ...] = ()
    frame_size: tuple[int, int] = (640, 480)
    runs: int = 100
    patience_s: float = 20.0

    @property
    def tried_threads(self) -> tuple[int, ...]:
        cores = usable_cores()
        return self.threads or tuple(sorted({*(n for n in (1, 2, 4, 8) if n < cores), cores}))


def find_students(folder: Path) -> dict[str, Path]:
    """Folders with a student's files, by profile name: exported ones, or the last good ones of an agent's state folder.

    Raises:
        InputError: there is none.
        ModelError: an agent's state is damaged. StoreError: the agent is running, or the disk refused.
    """
    found = {name: folder / name for name in PROFILES if (folder / name / GRAPH_FILE).is_file()}
    environments = folder / "environments"
    if environments.is_dir():
        with existing_state(folder):  # a running agent's files must not be linked anew
            for environment in sorted(environments.iterdir()):
                state = LocalState(folder, environment.name)
                last = state.last_good()
                if last is not None and last[0].profile in PROFILES:
                    name = last[0].profile if last[0].precision == "int8" else last[0].profile.removesuffix(INT8_SUFFIX)
                    found.setdefault(name, state.student_folder(last[0], _not_there))
    if not found:
        raise InputError(
            f"{folder} holds no student; make some with 'edgefm students export DIR' where the cloud is installed and "
            "copy DIR here, or give the state folder of an agent that has run"
        )
    return {name: found[name] for name in PROFILES if name in found}


def _not_there(sha256: str, offset: int) -> Iterator[bytes]:
    raise ModelError(f"the agent's state lacks the file {sha256[:12]}...; run the agent once with its cloud")


def profile_students(
    students: dict[str, Path], options: ProfileOptions, tell: Callable[[str], None]
) -> list[StudentCost]:
    """Measures every student at every number of threads. `tell` hears what is measured next.

    Raises:
        ModelError: a student cannot be loaded or run here.
    """
    costs = []
    for name, folder in students.items():
        for threads in options.tried_threads:
            tell(f"{name}, {threads} thread{'s' if threads > 1 else ''}")
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                try:
                    costs.append(process.submit(measure_student, name, folder, threads, options).result())
                except BrokenProcessPool as error:
                    raise ModelError(
                        f"the process that ran {name} was ended by the system; is the memory enough?"
                    ) from error
    return costs


def measure_student(name: str, folder: Path, threads: int, options: ProfileOptions) -> StudentCost:
    """One student, one frame at a time, in this process: its peak memory is what this process has taken so far."""
    importlib.import_module(".agent", __package__)  # the agent's libraries count
    preprocess = student_profile(name).preprocess
    picture = picture_of(options.frame_size)
    started = time.perf_counter()
    model = OnnxModel(folder / GRAPH_FILE, threads)
    load_ms = (time.perf_counter() - started) * 1e3
    for _ in range(WARM_UP_RUNS):
        model(preprocess(picture)[None])
    preprocess_ms, session_ms = [], []
    began = time.perf_counter()
    while len(session_ms) < options.runs:
        started = time.perf_counter()
        batch = preprocess(picture)[None]  # (1, 3, S, S)
        preprocessed = time.perf_counter()
        model(batch)
        ended = time.perf_counter()
        preprocess_ms.append((preprocessed - started) * 1e3)
        session_ms.append((ended - preprocessed) * 1e3)
        if ended - began > options.patience_s and len(session_ms) >= LEAST_RUNS:
            break
    return StudentCost(
        student=name,
        threads=threads,
        preprocess_ms=rounded(preprocess_ms, 50),
        session_p50_ms=rounded(session_ms, 50),
        session_p95_ms=rounded(session_ms, 95),
        peak_rss_mb=peak_memory_mb(),
        load_ms=round(load_ms, 1),
    )


def peak_memory_mb() -> float:
    """Of this process so far, in 10^6 bytes. Raises `InputError` where the system does not tell."""
    memory = peak_rss_mb()
    if memory is None:
        raise InputError("this system does not tell a process's peak memory (/proc/self/status); profile on Linux")
    return round(memory, 1)


def rounded(values: Sequence[float], percentile: float) -> float:
    return round(float(np.percentile(values, percentile)), 3)


def picture_of(size: tuple[int, int]) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
