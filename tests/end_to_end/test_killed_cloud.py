"""The cloud is killed in mid-run and comes back on the same port and folder."""

from __future__ import annotations

import signal
from collections import Counter


def test_a_killed_cloud_costs_no_answer_and_no_sample(
    start_cloud, start_agent, cloud_flags, until, stored, waiting, digests
):
    cloud = start_cloud(*cloud_flags)
    agent = start_agent(cloud.target, "--fps", "20")
    until(lambda: agent.count("cloud") >= 60)
    cloud.stop(signal.SIGKILL)
    until(lambda: agent.count("fallback") >= 60)
    assert agent.spooled() >= 50

    cloud = start_cloud(*cloud_flags, "--port", str(cloud.port))
    answered = agent.count("cloud")
    until(lambda: agent.count("cloud") >= answered + 60)
    until(lambda: agent.spooled() < 50)  # uploads go on; the last ones when it ends
    summary = agent.finish()
    answers = agent.lines()
    routes = Counter(line["route"] for line in answers)
    assert summary["frames"] == len(answers) and set(Counter(line["sample_id"] for line in answers).values()) == {1}
    assert {route: summary[route] for route in routes} == routes
    assert summary["uploads_left"] == summary["uploads_dropped"] == 0 and not waiting(agent.state_dir)

    cloud.stop()
    store = stored(cloud.data_dir)
    asked = {digests[line["sample_id"]] for line in answers if line["route"] != "edge"}
    uploaded = {digests[line["sample_id"]] for line in answers if line["route"] == "fallback"}
    assert uploaded <= store.rows.keys() <= asked  # a query's sample may be under way to the disk at the kill
    assert set(store.rows.values()) == {1} and store.rows == store.files and store.labelled == len(store.rows)
    assert "Traceback" not in agent.log.read_text() + cloud.log.read_text()
