"""An agent is killed again and again, while it starts, answers, spools, uploads and swaps versions."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

from edgefm.edge.local_state import LocalState, no_fetch
from edgefm.edge.operator import Operator
from edgefm.models.versions import HEAD_FILE

KILLS = 50


def holds(state_dir: Path) -> int | None:
    """The version that a device could start from with no network; every file of it must be whole."""
    state = LocalState(state_dir, "yard")
    good = state.last_good()
    if good is None:
        return None
    state.student_folder(good[0], no_fetch)
    state.load_pool(good[1], no_fetch)
    return good[0].version


def test_fifty_kills_leave_state_spool_answers_and_store_whole(
    start_cloud, start_agent, cloud_flags, files_of, until, stored, waiting, digests
):
    cloud = start_cloud(*cloud_flags)
    # No query comes back within a millisecond: every sample is spooled, and most are uploaded a moment later.
    flags = ("--deadline-ms", "1", "--fps", "60")
    start_agent(cloud.target, *flags, "--limit", "1").finish(None)  # the cloud makes version 0
    began = time.monotonic()
    agent = start_agent(cloud.target, *flags)
    until(lambda: agent.count("fallback") > 1)
    start_s = time.monotonic() - began
    agent.kill()
    files = files_of(cloud.data_dir)
    files.publish({HEAD_FILE: files.other_head(0)})

    moments, spooled, ran = random.Random(0), waiting(agent.state_dir), Counter[int | None]()
    with Operator(cloud.target) as operator:
        operator.rollback("yard", 1)
        agent, began, answered = start_agent(cloud.target, *flags), time.monotonic(), agent.count("fallback")
        until(lambda: agent.count("fallback") > answered)
        change_s = time.monotonic() - began
        agent.kill()
        for kill in range(KILLS):
            operator.rollback("yard", kill // 2 % 2)
            agent = start_agent(cloud.target, *flags, "--shuffle-seed", str(kill))
            if kill % 2:  # while it takes the other version, answers and uploads; else in its start
                until(lambda: "event=registered" in agent.log.read_text())  # noqa: B023
                time.sleep(moments.uniform(0.0, 1.5) * change_s)
            else:
                time.sleep(moments.uniform(0.0, 0.8) * start_s)
            assert agent.process.poll() is None, agent.log.read_text()
            agent.kill()
            assert "damaged" not in agent.log.read_text()
            ran[holds(agent.state_dir)] += 1
            spooled |= waiting(agent.state_dir)
            for line in agent.answers.read_bytes().splitlines()[:-1]:
                json.loads(line)
    assert ran.keys() == {0, 1}  # some were killed before, some after a swap
    assert spooled  # some always wait when a kill comes

    answered = agent.count("fallback")
    agent = start_agent(cloud.target, *flags, "--fps", "10")  # its pictures last until it is asked to end
    until(lambda: agent.count("fallback") > answered and not agent.spooled())
    agent.finish()
    cloud.stop()
    store = stored(cloud.data_dir)
    assert spooled <= store.rows.keys() <= set(digests.values())
    assert set(store.rows.values()) == {1} and store.rows == store.files and store.labelled == len(store.rows)
    assert [path.name for path in agent.state_dir.rglob(".*")] == [] == list((agent.state_dir / "partial").iterdir())
    assert "Traceback" not in cloud.log.read_text()
