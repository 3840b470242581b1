"""`edgefm bench soak`: a cloud and several agents through everything that goes wrong, all at once, for minutes.

One cloud; four agents, two of them with one id, behind one shaped link each, in two environments. Clouds and agents are
killed, stopped, frozen, run out of disk and find their models damaged; links are cut; an operator changes labels and
rolls back; mutated requests come in between. Then all is calm, and what was promised must hold (`soak_checks`).
"""

from __future__ import annotations

import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...edge.cloud_client import CloudClient
from ...models.errors import ConfigError, EdgeFMError
from ..camera import DAY, NIGHT, PHOTOGRAPHS, Look, walk
from .soak_agent import FPS, AgentSpec, SoakAgent, Stream
from .soak_checks import check_agent, check_store, check_uploads, read_logs
from .soak_cloud import SERVING_TIMEOUT_S, SoakCloud, SoakLink, free_port
from .soak_faults import Journal, Lane, agent_faults, cloud_faults, link_faults, operator_acts, request_faults
from .soak_memory import Memory
from .soak_report import show, summarise
from .soak_requests import MutatedRequests

STUDENT = "lite0-64"
"""The smallest: two cores carry a cloud and four agents."""
_MOST_FRAMES = 3000
_DAMAGED_EVERY = 97
_LEG_S = 60.0
_PAUSES_S = {"cloud": 20.0, "agent": 30.0, "link": 20.0, "operator": 30.0, "requests": 5.0}
_FULL_PACE_MINUTES = 4.0
"""A shorter soak has shorter pauses and legs, so that most faults come."""
_CALM_S = 20.0


def bench_soak(minutes: float, seed: int, console: Console) -> dict[str, Any]:
    """Returns what was done and found; `broken` lists the promises that did not hold.

    Raises:
        ConfigError: less than half a minute, or a system that is not Linux.
        EdgeFMError: cloud or agents do not even start.
    """
    if minutes < 0.5:
        raise ConfigError(f"a soak takes at least half a minute, got {minutes}")
    if not hasattr(resource, "prlimit"):
        raise ConfigError("a soak fills the disks of running processes, which needs Linux")
    folder = Path(tempfile.mkdtemp(prefix="edgefm-soak-"))
    try:
        with console.status("Making the frames ..."):
            soak = _Soak(minutes, seed, folder)
        with soak.resources:
            with console.status("Starting the cloud and its agents ..."):
                soak.begin()
            with console.status(f"Breaking things for {minutes:g} minutes ..."):
                soak.rage()
            with console.status("Calm: everything must come back ..."):
                soak.calm_down()
        result = soak.result()
    except BaseException:
        console.print(f"Logs: {folder}", highlight=False)
        raise
    show(result, console)
    if result["broken"]:
        console.print(f"Logs: {folder}", highlight=False)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return result


class _Soak:
    def __init__(self, minutes: float, seed: int, folder: Path) -> None:
        self.resources = ExitStack()
        self._seconds = minutes * 60
        self._seed = seed
        self._folder = folder
        self._pace = min(1.0, minutes / _FULL_PACE_MINUTES)
        self._memory = Memory()
        self.resources.callback(self._memory.close)
        rng = np.random.default_rng([seed, 0])
        self._cloud = SoakCloud(folder, free_port(rng), STUDENT, self._memory)
        yard, street = (self._stream(name, look) for name, look in (("yard", DAY), ("street", NIGHT)))
        specs = (
            AgentSpec("yard-1", "yard-camera", "uncertain", yard),
            AgentSpec("yard-2", "yard-camera", "uncertain", yard),  # the same id, and the same frames
            AgentSpec("street-1", "street-camera-1", "uncertain", street),
            AgentSpec("street-2", "street-camera-2", "all", street),
        )
        self._environments = (yard.environment, street.environment)
        self._agents: list[SoakAgent] = []
        for number, spec in enumerate(specs):
            link = SoakLink(free_port(rng), self._cloud.port, seed + number)
            leg_s = _LEG_S * self._pace
            self._agents.append(SoakAgent(spec, folder, link, leg_s, seed + number, self._memory))
        self._requests = MutatedRequests(self._cloud.target, yard.environment, yard.frames[0].read_bytes())
        self._journal = Journal()

    def _stream(self, name: str, look: Look) -> Stream:
        folder = self._folder / "streams" / name
        folder.mkdir(parents=True)
        count = min(_MOST_FRAMES, round(FPS * (self._seconds + 120)))
        frames = []
        for position, frame in enumerate(walk(look, self._seed, count)):
            path = folder / f"{position:06d}.jpg"
            whole = (position + 1) % _DAMAGED_EVERY
            path.write_bytes(frame.image_bytes if whole else frame.image_bytes[: len(frame.image_bytes) // 2])
            frames.append(path)
        damaged = frozenset(range(_DAMAGED_EVERY - 1, count, _DAMAGED_EVERY))
        return Stream(name, tuple(photograph.label for photograph in PHOTOGRAPHS), frames, damaged)

    def begin(self) -> None:
        """Raises `EdgeFMError` when an agent does not come to its first answer."""
        self.resources.callback(self._cloud.close)
        self._cloud.start()
        self.resources.callback(self._requests.close)
        for agent in self._agents:
            # Version 0 may take longer on a busy machine than a device waits that has nothing to start from.
            stream = agent.spec.stream
            with closing(CloudClient(self._cloud.target, "first", stream.environment, 1000.0)) as client:
                client.register(stream.labels, STUDENT, SERVING_TIMEOUT_S)
        for agent in self._agents:
            agent.link.mend()
            self.resources.callback(agent.link.cut)
            self.resources.callback(agent.close)
            agent.start()
        for agent in self._agents:
            if agent.wait_for_answer(0.0) is None:
                raise EdgeFMError(f"{agent.spec.name} does not answer; its log is {agent.logs[-1]}")

    def rage(self) -> None:
        self._journal.began_s = time.monotonic()
        lanes = self._lanes()
        for lane in lanes:
            lane.start()
        time.sleep(self._seconds)
        for lane in lanes:
            lane.end()
        for lane in lanes:
            lane.join()

    def _lanes(self) -> list[Lane]:
        cloud, journal = self._cloud, self._journal
        lanes = [
            ("cloud", "cloud", cloud_faults(cloud, self._environments)),
            ("operator", "operator", operator_acts(cloud, self._environments, journal)),
            ("requests", "requests", request_faults(self._requests, journal)),
        ]
        for agent in self._agents:
            lanes.append(("agent", agent.spec.name, agent_faults(agent, cloud)))
            lanes.append(("link", f"link of {agent.spec.name}", link_faults(agent)))
        return [
            Lane(target, faults, _PAUSES_S[kind] * self._pace, (self._seed, 1, number), journal)
            for number, (kind, target, faults) in enumerate(lanes)
        ]

    def calm_down(self) -> None:
        time.sleep(_CALM_S)
        for agent in self._agents:
            agent.finish()
        if not self._cloud.serving():
            self._journal.broken.append("the cloud is not well at the end")
        code = self._cloud.end(signal.SIGTERM)
        if code != 0:
            self._journal.broken.append(f"the cloud ended with exit code {code} after the last SIGTERM")

    def result(self) -> dict[str, Any]:
        journal, agents = self._journal, self._agents
        logs: Sequence[Path] = [*self._cloud.logs, *(log for agent in agents for log in agent.logs)]
        errors, broken = read_logs(logs)
        wanted, lost = check_uploads(agents, self._cloud.data_dir)
        broken += journal.broken + self._requests.unhandled + lost
        broken += check_store(self._cloud.data_dir, {agent.spec.stream.environment for agent in agents})
        for agent in agents:
            broken += check_agent(agent)
        return summarise(
            journal,
            agents,
            self._memory.report(),
            errors,
            uploads_checked=wanted,
            broken=broken,
            seconds=self._seconds,
            seed=self._seed,
            student=STUDENT,
        )
