"""`edgefm cloud` as a process: how it ends."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import grpc
import pytest
from edgefm.models.student_graph import student_files, version0_head
from edgefm.models.students import PROFILES
from edgefm.proto.limits import PROTOCOL_VERSION
from edgefm.proto.v1 import edgefm_pb2 as pb
from edgefm.proto.v1 import edgefm_pb2_grpc as rpc


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_serves_the_embedded_model_without_pytorch(start_cloud, synclip):
    """Its seconds and its memory are for those who train or have a model that needs it."""
    student_files(
        PROFILES["lite0-64"], version0_head(PROFILES["lite0-64"], synclip)
    )  # exports, where that is still to be done
    cloud = start_cloud("--labels", "cat, rocket", "--student", "lite0-64")
    with grpc.insecure_channel(cloud.target) as channel:
        register = pb.RegisterRequest(protocol=PROTOCOL_VERSION, device_id="d", environment="yard")
        rpc.EdgeFMStub(channel).Register(register, timeout=30)
    loaded = Path(f"/proc/{cloud.process.pid}/maps").read_text()
    assert "onnxruntime" in loaded and "libtorch" not in loaded


def test_ends_cleanly_on_an_interrupt_and_does_not_share_its_port(start_cloud, edgefm, tmp_path: Path):
    cloud = start_cloud("--labels", "cat, rocket", "--student", "lite0-64")
    with grpc.insecure_channel(cloud.target) as channel:
        stub = rpc.EdgeFMStub(channel)
        stub.Register(pb.RegisterRequest(protocol=PROTOCOL_VERSION, device_id="d", environment="yard"), timeout=30)
        watch = stub.Watch(pb.WatchRequest(device_id="d", environment="yard"), timeout=60)
        assert next(watch).WhichOneof("change") == "pool" and next(watch).WhichOneof("change") == "student"

        second = edgefm("cloud", "--port", str(cloud.port), "--data-dir", tmp_path / "second")
        assert second.returncode == 2
        assert f"edgefm: cannot listen on 127.0.0.1:{cloud.port}" in second.stderr
        assert "is another cloud running there?" in second.stderr and "Traceback" not in second.stderr

        # A device is connected and watches; the cloud does not wait for it to leave.
        started = time.monotonic()
        assert cloud.stop(signal.SIGINT) == 0
        assert time.monotonic() - started < 8
        with pytest.raises(grpc.RpcError):
            next(watch)
    assert "event=stopping" in cloud.log.read_text() and "Traceback" not in cloud.log.read_text()
    assert (cloud.data_dir / "registry" / "environments" / "yard" / "current").read_text() == "0"
