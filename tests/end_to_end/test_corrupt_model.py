"""A bit flips in a student's file: in the cloud's registry, in what a device keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgefm.edge.local_state import LocalState
from edgefm.edge.operator import Operator
from edgefm.models.errors import CloudError
from edgefm.models.versions import HEAD_FILE, TRUNK_FILE

NOBODY = "127.0.0.1:1"


def flip(path: Path) -> None:
    """Another file with one bit changed in its middle: of hard links only this one is hit."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.unlink()
    path.write_bytes(data)


def kept(state_dir: Path, name: str) -> Path:
    """The device's blob of its last good student's file of that name."""
    good = LocalState(state_dir, "yard").last_good()
    assert good is not None
    return state_dir / "blobs" / next(ref.sha256 for ref in good[0].files if ref.name == name)


def test_a_corrupt_version_in_the_registry_is_refused_and_the_next_one_taken(
    start_cloud, start_agent, cloud_flags, files_of, until, tmp_path
):
    cloud = start_cloud(*cloud_flags)
    start_agent(cloud.target, "--limit", "1").finish(None)
    files = files_of(cloud.data_dir)
    bad, good = (files.publish({HEAD_FILE: files.other_head(0, scale)}) for scale in (0.5, 0.25))
    with Operator(cloud.target) as operator:
        operator.rollback("yard", bad)
        flip(files.path(HEAD_FILE, bad))
        with pytest.raises(CloudError, match=r"is damaged: .* bytes, sha256 .*, expected"):
            operator.rollback("yard", bad)

        agent = start_agent(cloud.target, "--fps", "10")
        until(lambda: operator.status("yard").environments[0].refusals)
        (reported,) = operator.status("yard").environments[0].refusals
        assert reported.refusal.student_version == bad and "is damaged" in reported.refusal.reason
        until(agent.lines)
        assert {line["student_version"] for line in agent.lines()} == {0}
        operator.rollback("yard", good)
        until(lambda: agent.lines()[-1]["student_version"] == good)
    summary = agent.finish()
    (refused,) = summary["refused"]
    assert refused.startswith(f"student version {bad}: damaged: ") and summary["swaps"] == 1

    # The same on the device's disk. With the cloud, the file comes again.
    blob = kept(agent.state_dir, HEAD_FILE)
    flip(blob)
    agent = start_agent(cloud.target, "--limit", "1")
    assert agent.finish(None)["bytes_received"] == blob.stat().st_size
    assert agent.lines()[-1]["student_version"] == good
    # Without it, the version before answers; and with nothing whole, the device says so and starts when it can.
    impatient = tmp_path / "impatient.toml"
    impatient.write_text("[agent]\nconnect_timeout_s = 0.5\n")
    alone = ("--limit", "1", "--config", str(impatient))
    flip(blob)
    agent = start_agent(NOBODY, *alone)
    agent.finish(None)
    assert agent.lines()[-1]["student_version"] == 0 and "event=last_good_damaged" in agent.log.read_text()
    flip(kept(agent.state_dir, TRUNK_FILE))
    agent = start_agent(NOBODY, *alone)
    assert agent.process.wait(60) != 0
    said = agent.log.read_text()
    assert "event=blob_damaged name=trunk.fp16.bin" in said and "cannot be reached" in said and "Traceback" not in said
    agent = start_agent(cloud.target, "--limit", "1")
    agent.finish(None)
    assert agent.lines()[-1]["student_version"] == good
