"""`edgefm demo`: a cloud and an agent as two processes over a shaped link, a student that learns, and a report."""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..cloud.registry import Registry
from ..edge.operator import Operator
from ..models.errors import ConfigError, EdgeFMError, InputError, StoreError, disk_reason
from .demo_data import DemoEnvironment, camera_environments, data_environment
from .demo_label import LabelAddition
from .demo_results import EnvironmentRun, assemble
from .demo_watch import AlarmWatch
from .live import LiveState, LiveTable
from .processes import child_process, cloud_process, edgefm, follow_records, last_words
from .report import summarize, write_report
from .shaper import LinkShaper, ShaperThread
from .timeline import ROUTES
from .traces import LTE_DOWN, LTE_UP, Trace, downlink_beside, open_trace, synthetic_trace, with_outage
from .weights import packaged

PROPAGATION_MS = 10.0
CAMERA_FRAMES = 2500
LINK_OUTAGE_S = (32.0, 4.0)
"""Of the default link in every minute, start and length: something stands before the antenna, and nothing gets through."""
DATA_FRAMES = 3000
ADD_LABEL_AT = 0.1
"""Fraction of the first environment's frames after which the held-back label is added."""
DESCRIPTION_PATIENCE_S = 60.0
"""How long a stream that has ended waits for the language model's description."""
_RECENT = 200
_SETTINGS = """# A demo lasts minutes: its drift tests look back over fewer samples than those of a service.
cloud.drift.baseline = 100
cloud.drift.window = 80
cloud.drift.effective = 30
"""
_CAMERA_SETTINGS = """
# The larger students know the camera's few photographs by day without learning.
cloud.student = "lite0-64"

# The frames of one visit to a photograph resemble each other, so a hundred show too few scenes to learn from.
cloud.customization.first_at = 200
cloud.customization.tail_from = 200

# After the first, only an alarm starts a run.
cloud.customization.growth = 10

# More than usual: the drift tests live on audits.
agent.switcher.audit_share = 0.1
"""


@dataclass(frozen=True)
class DemoOptions:
    """See `edgefm demo --help`."""

    data: tuple[Path, ...] = ()
    trace: str | None = None
    trace_down: str | None = None
    frames: int | None = None
    fps: float = 30.0
    accuracy_target: float = 0.99
    labels: tuple[str, ...] = ()
    seed: int = 0
    output: Path = Path("edgefm-demo")
    json_file: Path | None = None

    def __post_init__(self) -> None:
        if self.frames is not None and self.frames < 50:
            raise ConfigError(f"the demo needs at least 50 frames in each environment, got {self.frames}")
        if self.fps <= 0:
            raise ConfigError(f"fps must be positive, got {self.fps}")


def run_demo(options: DemoOptions, console: Console | None = None) -> dict[str, Any]:
    """Runs it and writes `report.html`, `result.json` and logs into `options.output`; returns the result.

    Raises:
        EdgeFMError: bad data or trace, a process that failed (its last words are in the message), a full disk.
    """
    console = console or Console()
    uplink, downlink = _traces(options)
    folder = _fresh_folder(options.output)
    with console.status("Preparing the images ..."):
        environments = _environments(options, folder / "streams")
    added = environments[0].labels[-1]
    with ExitStack() as stack:
        with console.status("Starting the cloud (the first start exports its models, half a minute) ..."):
            settings = _SETTINGS if options.data else _SETTINGS + _CAMERA_SETTINGS
            (folder / "edgefm.toml").write_text(settings, encoding="utf-8")
            weights = packaged("smollm2")
            language = [f"--language={weights}"] if weights is not None else []
            cloud = stack.enter_context(cloud_process(folder, f"--config={folder / 'edgefm.toml'}", *language))
        shaper = LinkShaper("127.0.0.1", "127.0.0.1", cloud.port, uplink, downlink, PROPAGATION_MS)
        link = stack.enter_context(ShaperThread(shaper))
        target = cloud.target
        runs = []
        for position, environment in enumerate(environments):
            session = _Session(options, folder, environment, link.port, target, weights is not None)
            label_to_add = added if position == 0 and len(environment.labels) > 2 else None
            runs.append(session.run(console, label_to_add))
        with console.status("Scoring every version on the same images ..."):
            registry = Registry(folder / "cloud" / "registry")
            result, timeline = assemble(
                runs,
                registry,
                target,
                objective={"name": "accuracy_target", "target": options.accuracy_target},
                link={"uplink": uplink.name, "downlink": downlink.name, "propagation_ms": PROPAGATION_MS},
                traffic=(link.bytes_up, link.bytes_down),
                settings=settings,
                seed=options.seed,
            )
    report, json_files = folder / "report.html", [folder / "result.json"]
    if options.json_file is not None:
        json_files.append(options.json_file)
    try:
        write_report(result, timeline, report)
        for path in json_files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write the results: {error}") from error
    for sentence in summarize(result):
        console.print(f"- {sentence}", highlight=False, markup=False)
    console.print(f"Report: {report.resolve()}", highlight=False, soft_wrap=True)
    console.print(f"JSON:   {json_files[-1].resolve()}", highlight=False, soft_wrap=True)
    return result


def _traces(options: DemoOptions) -> tuple[Trace, Trace]:
    if options.trace is None:
        if options.trace_down is not None:
            raise ConfigError("--trace-down needs --trace")
        up, down = (synthetic_trace(options.seed, states=states) for states in (LTE_UP, LTE_DOWN))
        return with_outage(up, *LINK_OUTAGE_S), with_outage(down, *LINK_OUTAGE_S)
    return open_trace(options.trace), open_trace(options.trace_down or downlink_beside(options.trace))


def _environments(options: DemoOptions, folder: Path) -> list[DemoEnvironment]:
    if not options.data:
        return camera_environments(folder, options.frames or CAMERA_FRAMES, options.seed)
    frames = options.frames or DATA_FRAMES
    found = [data_environment(path, folder, frames, options.seed, options.labels) for path in options.data]
    repeated = [name for name, count in Counter(e.name for e in found).items() if count > 1]
    if repeated:
        raise InputError(f"two data sets are called {repeated[0]!r}; rename one of the folders or archives")
    return found


def _fresh_folder(path: Path) -> Path:
    """An empty folder; what an earlier demo left there is moved aside, never deleted."""
    try:
        if path.exists() and any(path.iterdir()):
            path.rename(path.with_name(f"{path.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime())}"))
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot use the output folder {path}: {disk_reason(error)}") from error
    return path


@dataclass
class _Session:
    """One agent in one environment."""

    options: DemoOptions
    folder: Path
    environment: DemoEnvironment
    link_port: int
    cloud: str
    describes: bool
    records: list[dict[str, Any]] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    alarms: list[dict[str, Any]] = field(default_factory=list)

    def run(self, console: Console, label_to_add: str | None) -> EnvironmentRun:
        """Runs the agent to the end of its stream; adds the label while it runs."""
        environment = self.environment
        pool = len(environment.labels) - (label_to_add is not None)
        own = [image for image, truth in environment.scoring if label_to_add and truth == label_to_add]
        answers, log = self.folder / f"{environment.name}.jsonl", self.folder / f"{environment.name}.log"
        command = self._command(answers, [label for label in environment.labels if label != label_to_add])
        with (
            Operator(self.cloud) as operator,
            child_process(command, log, stdout=subprocess.PIPE) as child,
            LiveTable(console) as table,
        ):
            alarms = AlarmWatch(operator, environment.place)
            addition = (
                LabelAddition(operator, self.cloud, environment.place, label_to_add, own, self.describes)
                if label_to_add
                else None
            )
            table.event(f"{environment.name}: an agent with {pool} labels, {environment.frames} frames")
            for record in follow_records(answers, child):
                self._tell(record, table)
                self.records.append(record)
                for alarm in alarms.new_alarms():
                    self.alarms.append({**alarm, "time_s": record["time_s"]})
                    table.event(f"{environment.name}: drift alarm, {alarm['kind']}")
                self.answered[record["route"]] += 1
                table.update(self._state(pool))
                if addition is None:
                    continue
                if addition.result is None and len(self.records) >= ADD_LABEL_AT * environment.frames:
                    pool = addition.add()
                    table.event(f"{environment.name}: label {label_to_add!r} added by its text")
                elif addition.described():
                    table.event(f"{environment.name}: {label_to_add!r} described by the language model")
            assert child.stdout is not None
            summary = child.stdout.read()
            if child.wait() != 0:
                raise EdgeFMError(f"the agent failed with exit code {child.returncode}; {log}: {last_words(log)}")
            if addition is not None:
                addition.wait(DESCRIPTION_PATIENCE_S)
        return EnvironmentRun(
            environment=environment,
            records=self.records,
            summary=json.loads(summary.strip().splitlines()[-1]),
            alarms=self.alarms,
            added_label=addition.result if addition is not None else None,
        )

    def _command(self, answers: Path, labels: list[str]) -> list[str]:
        options, label_file = self.options, self.folder / f"{self.environment.name}.labels"
        label_file.write_text("\n".join(labels), encoding="utf-8")
        return edgefm(
            "agent",
            str(self.environment.stream),
            f"--config={self.folder / 'edgefm.toml'}",
            f"--output={answers}",
            f"--cloud=127.0.0.1:{self.link_port}",
            f"--environment={self.environment.place}",
            f"--labels=@{label_file}",
            f"--state-dir={self.folder / 'agent'}",
            f"--accuracy-target={options.accuracy_target}",
            f"--fps={options.fps}",
        )

    def _tell(self, record: dict[str, Any], table: LiveTable) -> None:
        """What is new in this answer."""
        recent = self.records[-_RECENT:]
        if recent and record["student_version"] > max(r["student_version"] for r in recent):
            table.event(f"{self.environment.name}: student version {record['student_version']} swapped in")
        if record["route"] == "fallback" and not any(r["route"] == "fallback" for r in recent):
            table.event(f"{self.environment.name}: the FM cannot be asked in time, the edge answers (fallback)")

    def _state(self, pool: int) -> LiveState:
        recent = self.records[-_RECENT:]
        latest = recent[-1]
        by_route = {route: [r["total_ms"] for r in recent if r["route"] == route] for route in ROUTES}
        return LiveState(
            environment=self.environment.name,
            frame=len(self.records),
            frames=self.environment.frames,
            answered=dict(self.answered),
            edge_share_recent=len(by_route["edge"]) / len(recent),
            threshold=latest["threshold"],
            bandwidth_mbps=latest["bandwidth_mbps"],
            student_version=latest["student_version"],
            pool_size=pool,
            samples_labelled=latest["samples_labelled"],
            p50_ms={route: float(np.median(values)) if values else None for route, values in by_route.items()},
        )
