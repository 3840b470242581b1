"""The link is cut in the middle of a student's file."""

from __future__ import annotations

import random

from edgefm.deploy.shaper import LinkShaper, ShaperThread
from edgefm.deploy.traces import constant_trace
from edgefm.edge.operator import Operator
from edgefm.models.versions import TRUNK_FILE

FAST = constant_trace(40.0)
CUTS = 3
ALLOWANCE = 128 * 1024
"""Bytes of a transfer of one file that are not the file's: framing, what was on its way at the cut, other calls."""


def test_a_download_cut_at_random_bytes_goes_on_where_it_stopped(
    start_cloud, start_agent, cloud_flags, files_of, until
):
    cloud = start_cloud(*cloud_flags)

    def link(port: int = 0) -> ShaperThread:
        return ShaperThread(LinkShaper("127.0.0.1", "127.0.0.1", cloud.port, FAST, FAST, 5.0, listen_port=port))

    shaped = link()
    agent = start_agent(f"127.0.0.1:{shaped.port}", "--fps", "5")
    until(lambda: agent.lines())
    files = files_of(cloud.data_dir)
    trunk = bytearray(files.path(TRUNK_FILE, 0).read_bytes())
    trunk[0] ^= 1  # other bytes, the same answers
    files.publish({TRUNK_FILE: bytes(trunk)})

    moments, carried = random.Random(0), 0
    with Operator(cloud.target) as operator:
        operator.rollback("yard", 1)
    for _ in range(CUTS):
        begun = shaped.bytes_down
        cut = begun + moments.randrange(len(trunk) // 10, len(trunk) // 4)
        until(lambda: shaped.bytes_down >= cut)  # noqa: B023
        shaped.close()
        carried += shaped.bytes_down - begun
        assert agent.lines()[-1]["student_version"] == 0
        shaped = link(shaped.port)
    until(lambda: agent.lines()[-1]["student_version"] == 1)
    carried += shaped.bytes_down
    shaped.close()
    assert len(trunk) <= carried <= len(trunk) + CUTS * ALLOWANCE
    summary = agent.finish()
    assert summary["swaps"] == 1 and summary["refused"] == []
    sizes = {ref.sha256: ref.size_bytes for version in (0, 1) for ref in files.registry.manifest("yard", version).files}
    _, pool = files.registry.pool("yard")
    assert summary["bytes_received"] == sum(sizes.values()) + pool.size_bytes  # every byte came once
    assert agent.log.read_text().count("event=watch_interrupted") >= CUTS
